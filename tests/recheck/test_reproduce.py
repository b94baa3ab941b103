"""A stored result is run again from its own description; what differs is named, and what it ran on is in the record."""

import json
import shutil
import subprocess

import pytest
import torch

from robbench.attacks import PGD
from robbench.core import machine
from robbench.core.errors import ModelError, ResultError
from robbench.core.version import __version__
from robbench.evaluation.run import evaluate
from robbench.recheck.reproduce import reproduce
from robbench.results.consistency import derive_summary
from robbench.results.records import TIMING_COLUMNS, pack_rows, read_rows
from robbench.results.schema import dump_sealed, read_result
from support.commands import run
from support.models import small
from support.stored import write_suite

pytestmark = pytest.mark.whole


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("made")
    evaluate("digits/at", "quick", samples=20, sample_seed=3, eps="0.1", seed=2, lanes=16, results=root)
    (place,) = root.glob("digits/at/*")
    return place


def test_a_result_reproduces_record_by_record(made):
    found = reproduce(made)
    assert (found.verdicts, found.details, found.n) == ([], [], 20)
    assert found.again.run_id == found.stored.run_id
    assert found.circumstances == [] and found.lines()[-1].endswith("the record holds, equal record by record.")
    assert reproduce(made / "result.json", samples=5).n == 5


def write_edited(at, edit, versions):
    """Edit the records of a result. Its summary follows from them, as a reader demands."""
    stored, rows = read_result(at / "result.json"), edit(read_rows(at / "outcomes.parquet"))
    stored = derive_summary(stored.model_copy(update={"versions": stored.versions | versions}), rows)
    (at / "result.json").write_bytes(dump_sealed(stored))
    (at / "outcomes.parquet").write_bytes(pack_rows(rows, stored.run_id))
    (at / "timings.parquet").write_bytes(pack_rows(rows, stored.run_id, TIMING_COLUMNS))


@pytest.fixture(scope="module")
def examined(tmp_path_factory):
    """Store a result with adversarial examples, and return a function that changes it and reproduces the copy."""
    root = tmp_path_factory.mktemp("examined")
    model, x = small(), torch.rand(60, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    call = {"x": x, "y": (model(x).argmax(1) + (torch.arange(60) % 10 == 0)) % 10}
    suite = write_suite(root)
    evaluate(model, suite, name="small", eps=0.03, results=root / "r", save_adversarials=True, **call)
    (place,) = (root / "r").glob("custom/small/*")

    def change(at, edit=lambda rows: rows, versions=True, points=False):
        shutil.copytree(place, at)
        write_edited(at, edit, {"torch": "1.0"} if versions else {})
        if not points:
            (at / "adversarials.safetensors").unlink()
        return reproduce(at, model, suite=suite, **call)

    return change


def by_image(rows):
    return rows.pivot(index="sample", columns="attack", values="status")


def setting(where, column, value):
    """Return an edit: the rows at `where` (attack, images) get another value."""

    def edit(rows):
        attack, images = where(by_image(rows))
        at = rows["sample"].isin(images) & (rows["attack"] == attack if attack else True)
        assert at.any()
        rows.loc[at, column] = value
        return rows

    return edit


def both_break(count):
    return lambda wide: ("FGSM", wide.index[(wide == "broken").all(axis=1)][:count])


def pgd_alone_breaks(wide):
    return "PGD", wide.index[(wide["FGSM"] == "robust") & (wide["PGD"] == "broken")][:1]


def none_breaks(wide):
    return "PGD", wide.index[(wide == "robust").all(axis=1)][:1]


def one(wide):
    return None, wide.index[5:6]


HARMLESS = {
    "one attack missed what another broke": setting(both_break(1), "status", "robust"),
    "five of them": setting(both_break(5), "status", "robust"),
    "another cost": setting(one, "forwards", 99),
    "another class at the last point": setting(none_breaks, "prediction", -7),
}
MATTERS = {
    "worst case was robust": (setting(pgd_alone_breaks, "status", "robust"), "worst case was not broken, is broken"),
    "worst case was broken": (setting(none_breaks, "status", "broken"), "the worst case was broken, is not broken"),
    "clean verdict": (setting(one, "status", "misclassified"), "status was misclassified, is "),
    "label": (setting(one, "label", 77), "label was 77"),
    "attack became stronger": (setting(both_break(12), "status", "robust"), "FGSM: 0 verdicts went from broken to"),
}


@pytest.mark.parametrize("name", HARMLESS)
def test_differences_of_rounding_do_not_matter(examined, tmp_path, name):
    found = examined(tmp_path / "s", HARMLESS[name])
    assert found.matters == [] and len(found.verdicts) + len(found.details) > 0
    assert "the record holds" in found.lines()[-1] and found.circumstances[0][:2] == ("versions.torch", "1.0")
    about = found.as_json()
    assert about["holds"] is True and about["equal"] is False and about["conclusion"] == found.conclude()


@pytest.mark.parametrize("name", MATTERS)
def test_a_broken_promise_of_the_record_matters(examined, tmp_path, name):
    edit, words = MATTERS[name]
    found = examined(tmp_path / "s", edit)
    (sentence,) = found.matters
    assert words in sentence
    assert f"matters: {sentence}" in found.lines() and "NOT hold here: 1 differences matter" in found.lines()[-1]
    assert found.as_json()["holds"] is found.as_json()["equal"] is False


def test_stored_points_are_asked_again(examined, tmp_path):
    assert examined(tmp_path / "a", points=True).matters == []
    found = examined(tmp_path / "b", setting(both_break(1), "distance", 0.5), points=True)
    assert len(found.matters) == 1 and "distance 0.5 is recorded" in found.matters[0]


def test_few_differences_are_printed_and_all_are_in_the_json(examined, tmp_path):
    found = examined(tmp_path / "s", lambda rows: rows.assign(forwards=99, status="broken"))
    assert len(found.lines()) < 15 and len(found.details) + len(found.verdicts) > 60
    about = found.as_json()
    assert (len(about["details"]), len(about["verdicts"])) == (len(found.details), len(found.verdicts))
    assert "more (--json lists all)" in "\n".join(found.lines()) and f"{found.records} verdicts" in found.lines()[-1]


def test_what_can_no_longer_be_made_is_refused_by_field(made, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(PGD, "version", 9)
        with pytest.raises(ResultError, match=r"attacks\[\d\]\.version: stored 1, this run 9"):
            reproduce(made)
    with pytest.raises(ResultError, match=r"No .*nothing.*expected: the folder of a finished result"):
        reproduce(tmp_path / "nothing")


def test_a_model_without_a_card_is_not_loaded_on_a_files_word(problem, tmp_path):
    model, x, y = problem
    evaluate(model, "quick", x=x, y=y, name="mine", eps=0.05, results=tmp_path)
    (place,) = tmp_path.glob("custom/mine/*")
    with pytest.raises(ResultError, match=r"Sequential.*--model"):
        reproduce(place)
    assert reproduce(place, model, x=x, y=y).verdicts == []
    with pytest.raises(ResultError, match=r"weights: stored"):
        reproduce(place, small(5), x=x, y=y)
    with pytest.raises(ModelError, match="Unknown source"):
        reproduce(place, "no such:source")


def test_the_record_says_what_it_ran_on(made):
    about = read_result(made / "result.json").environment
    assert {"revision", "platform", "machine", "threads", "packages", "cpu_capability"} <= set(about)
    assert {"numpy", "pandas", "pyarrow"} <= set(about["packages"])
    assert len(about["revision"].get("commit", "0" * 40)) == 40
    stored = read_result(made / "result.json")
    assert stored.hardware and {"torch", "python", "robbench"} <= set(stored.versions)


def test_the_revision_of_a_checkout_tells_changed_files(tmp_path, monkeypatch):
    def git(*args):
        subprocess.run(["git", "-C", tmp_path, "-c", "user.name=x", "-c", "user.email=x@x", *args], check=True)

    package = tmp_path / "robbench"
    package.mkdir()
    (package / "__init__.py").write_text("")
    monkeypatch.setattr(machine, "PACKAGE", package)
    asked = machine.revision.__wrapped__  # not the answer that the process keeps
    assert asked() == {"package": __version__}
    git("init", "-q")
    assert "package" in asked(), "a package inside some other repository is no checkout"
    git("add", ".")
    git("commit", "-qm", "x")
    assert len(asked()["commit"]) == 40 and asked()["modified"] is False
    (package / "__init__.py").write_text("x = 1")
    assert asked()["modified"] is True


def test_the_reproduce_command_compares_record_by_record(made, tmp_path):
    done = run("reproduce", made, cwd=tmp_path)
    assert "20 images: the record holds, equal record by record" in done.stdout
    assert not list(tmp_path.iterdir()), "nothing is stored"
    parsed = json.loads(run("reproduce", made, "--json", "--samples", 3, cwd=tmp_path).stdout)
    assert parsed["equal"] is True and parsed["n"] == 3
    place = tmp_path / made.name
    shutil.copytree(made, place)
    for column, value, code in (("forwards", 1, 0), ("label", 77, 1)):
        write_edited(place, lambda rows: rows.assign(**{column: value}), {})  # noqa: B023
        told = run("reproduce", place, code=code).stdout.splitlines()
        assert ("the record holds" in told[-1]) is (code == 0) and len(told) < 15
