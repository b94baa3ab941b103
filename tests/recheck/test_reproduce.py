"""A stored result is run again from its own description; what differs is named, and what it ran on is in the record."""

import json
import subprocess

import pytest

from robbench.attacks import PGD
from robbench.core import machine
from robbench.core.errors import ModelError, ResultError
from robbench.core.version import __version__
from robbench.evaluation.run import evaluate
from robbench.recheck.reproduce import reproduce
from robbench.results.consistency import derive_summary
from robbench.results.records import pack_rows, read_rows
from robbench.results.schema import dump_sealed, read_result
from support.commands import run
from support.models import small

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
    assert found.circumstances == [] and found.lines()[-1].endswith("equal, record by record.")
    assert reproduce(made / "result.json", samples=5).n == 5


def test_every_difference_is_named(made, tmp_path):
    place = tmp_path / made.name
    place.mkdir()
    stored = read_result(made / "result.json")
    rows = read_rows(made / "outcomes.parquet")
    broken, robust = (rows.index[rows["status"] == s][0] for s in ("broken", "robust"))
    mine = rows["sample"] == rows.at[broken, "sample"]
    rows.loc[mine & rows["status"].isin(["broken", "skipped"]), "status"] = "robust"
    rows.loc[robust, "forwards"] += 1
    (place / "outcomes.parquet").write_bytes(pack_rows(rows, stored.run_id))
    forged = derive_summary(stored.model_copy(update={"versions": stored.versions | {"torch": "1.0"}}), rows)
    (place / "result.json").write_bytes(dump_sealed(forged))
    found = reproduce(place)
    (detail,) = found.details
    verdict = next(v for v in found.verdicts if v.attack == rows.at[broken, "attack"])
    assert {v.sample for v in found.verdicts} == {verdict.sample}
    assert (verdict.sample, verdict.stored, verdict.again) == (rows.at[broken, "sample"], "robust", "broken")
    assert (detail.sample, detail.column) == (rows.at[robust, "sample"], "forwards")
    assert found.circumstances[0][:2] == ("versions.torch", "1.0")
    told = "\n".join(found.lines())
    assert f"sample {verdict.sample}, {verdict.attack}: status was robust, is broken" in told
    assert found.as_json()["equal"] is False
    assert reproduce(made).as_json()["equal"] is True


def test_what_can_no_longer_be_made_is_refused_by_field(made, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(PGD, "version", 9)
        with pytest.raises(ResultError, match=r"attacks\[\d\]\.version: stored 1, this run 9"):
            reproduce(made)
    with pytest.raises(ResultError, match=r"No result at"):
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
    assert "20 images: equal, record by record" in done.stdout
    assert not list(tmp_path.iterdir()), "nothing is stored"
    parsed = json.loads(run("reproduce", made, "--json", "--samples", 3, cwd=tmp_path).stdout)
    assert parsed["equal"] is True and parsed["n"] == 3
