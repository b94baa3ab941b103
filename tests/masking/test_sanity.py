"""The verdict: what it follows from, how it is stored and found again, and where it is shown."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch import nn
from typer.testing import CliRunner

from robbench.commands.app import app
from robbench.core.errors import CardError, ModelError, ResultError, RobbenchError
from robbench.evaluation.run import evaluate
from robbench.masking import run as sanity_run
from robbench.masking.checks import load_thresholds, run_checks
from robbench.masking.compare import compare_attacks
from robbench.masking.dropout import keep_dropout_on
from robbench.masking.landscape_record import POINTS
from robbench.masking.measure import CheckBudget
from robbench.masking.measurements import Challenge
from robbench.masking.record import FILE, LANDSCAPE, CheckResult, dump_sanity, read_sanity
from robbench.masking.run import examine
from robbench.masking.stored import VerdictIndex, find_foreign_facts, read_verdict
from robbench.masking.verdict import MIN_CORRECT, advise_next_suite, decide_verdict, is_too_little
from robbench.models.card import Registry
from robbench.models.load import load_model
from robbench.report.sheet import draw_sheet
from robbench.results.consistency import find_record_mismatches
from robbench.results.reader import read_results
from robbench.results.schema import dump_sealed, read_result
from robbench.results.store import read_rows
from support.leaderboard import read_leaderboard
from support.masks import NoGradient, Noisy, Temperature

pytestmark = pytest.mark.whole


def digits(name):
    return load_model(Registry.default([]).find(f"digits/{name}")).module


def check(name, decides=""):
    return CheckResult(
        name=name, title="t", value=1.0, threshold="below 1", status="fail" if decides else "pass", reason="r",
        source="s", decides=decides,
    )  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def on_few_images():
    """Every measurement on a handful of images: these tests are about what becomes of them."""
    few = CheckBudget(
        gradients=8, traces=8, unstable=4, curve=8, grid=8, binarization=4, linear=8, transfers=8, randomness=16
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("robbench.masking.measure.CheckBudget", lambda: few)
        yield


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A results tree with one sanity run on 40 images of the digits, and what it returned."""
    root = tmp_path_factory.mktemp("results")
    return root, examine("digits/natural", samples=40, results=root)


@pytest.mark.parametrize(
    ("asked", "verdict", "by"),
    [
        ([], "trustworthy", []),
        (["suspicious", "suspicious"], "suspicious", ["0", "1"]),
        (["suspicious", "masked"], "masked", ["1"]),
        (["masked", "randomized", "suspicious"], "randomized", ["1"]),
    ],
)
def test_the_gravest_verdict_counts_and_names_its_checks(asked, verdict, by):
    checks = [check(str(i), decides) for i, decides in enumerate(asked)]
    assert decide_verdict([*checks, check("fine")]) == (verdict, by)


def test_a_run_with_too_little_to_judge_is_undecided_unless_something_was_found(tree):
    assert decide_verdict([check("fine")], too_little=True) == ("undecided", [])
    assert decide_verdict([check("bad", "masked")], too_little=True) == ("masked", ["bad"])
    m, threat = tree[1].measurements, tree[1].threat
    none, few = threat.model_copy(update={"eps": "0"}), m.model_copy(update={"correct": MIN_CORRECT - 1})
    assert [is_too_little(m, threat), is_too_little(m, none), is_too_little(few, threat)] == [False, True, True]
    assert "Too little to judge" in advise_next_suite("undecided", [], m).reason


def test_one_image_is_not_called_trustworthy():
    assert examine("digits/at", samples=1).verdict == "undecided"
    assert examine("digits/at", samples=12, eps=0, norm="Linf").verdict == "undecided"


def test_what_is_advised_follows_from_what_broke(tree):
    m = tree[1].measurements

    def with_challenge(role, broken, **changed):
        c = Challenge(name=role, role=role, given=30, broken=broken, beyond=broken, behind=0, alone=0)
        return m.model_copy(update={"challenges": [c], **changed})

    assert advise_next_suite("trustworthy", [], m).suite == ""
    assert advise_next_suite("randomized", ["randomized"], m).suite == "eot"
    assert advise_next_suite("masked", ["square"], with_challenge("square", 9)).suite == "blackbox"
    assert advise_next_suite("masked", ["step_sizes"], with_challenge("other steps", 9)).suite == "masked"
    assert advise_next_suite("suspicious", ["finite_differences"], with_challenge("other steps", 0)).suite == "masked"
    dead = with_challenge("other loss", 9, differentiable=False)
    assert advise_next_suite("masked", ["zero_gradients"], dead).suite == "blackbox"
    gain = advise_next_suite("masked", [], with_challenge("square", 9)).gain
    assert gain == pytest.approx(100 * (m.pgd.value - m.best.value))


def test_an_honest_model_is_trustworthy_and_everything_is_stored(tree):
    root, found = tree
    assert found.verdict == "trustworthy" and not found.decided_by
    folder = root / "digits" / "natural" / "sanity"
    assert read_sanity(folder / FILE) == found
    assert found.measurements.best.value == read_result(folder / "result.json").robust_accuracy.value
    frame = pd.read_parquet(folder / LANDSCAPE)
    assert frame.groupby(["sample", "plane"]).size().tolist() == [POINTS**2] * 16
    middle = frame[(frame["a"] == 0) & (frame["b"] == 0)]
    assert middle.groupby("sample")["margin"].nunique().tolist() == [1] * 8  # both planes pass through the image


def test_the_landscape_is_the_models_own(tree):
    root, _ = tree
    frame = pd.read_parquet(root / "digits" / "natural" / "sanity" / LANDSCAPE)
    from robbench.data.sets import load

    data = load("digits", "test", None)
    x, y = torch.from_numpy(data.x[:8]).float() / data.scale, torch.from_numpy(data.y[:8])
    with torch.no_grad():
        logits = digits("natural")(x)
    true = logits.gather(1, y[:, None]).squeeze(1)
    expected = logits.scatter(1, y[:, None], -torch.inf).amax(1) - true
    middle = frame[(frame["a"] == 0) & (frame["b"] == 0) & (frame["plane"] == "random")]
    assert np.allclose(middle["margin"], expected, atol=1e-4)


def test_a_known_run_is_not_measured_again(tree, monkeypatch):
    root, found = tree
    monkeypatch.setattr("robbench.masking.run.run_measurements", None)
    assert examine("digits/natural", samples=40, results=root) == found
    with pytest.raises(TypeError):  # other images are another measurement
        examine("digits/natural", samples=41, results=root)


def test_checks_are_made_again_by_the_thresholds_of_today(tree, monkeypatch):
    root, found = tree
    strict = load_thresholds().model_copy(deep=True)
    limit = strict.check["logit_range"].model_copy(update={"fail": 1.0, "on_fail": "suspicious"})
    monkeypatch.setattr(
        "robbench.masking.checks.load_thresholds",
        lambda: strict.model_copy(update={"check": {**strict.check, "logit_range": limit}}),
    )
    assert examine("digits/natural", samples=40, results=root).decided_by == ["logit_range"]
    monkeypatch.undo()
    assert examine("digits/natural", samples=40, results=root) == found


def test_the_same_seed_measures_the_same(tree, tmp_path):
    again = examine("digits/natural", samples=40, results=tmp_path)
    _, found = tree
    left, right = (json.loads(dump_sanity(f)) for f in (again, found))
    for f in (left, right):
        for name in ("seconds", "date"):
            del f[name]
        del f["measurements"]["cost"]
    assert left == right


def test_the_verdict_holds_for_these_weights_and_this_threat_alone(tree):
    root, found = tree
    result = read_result(root / "digits" / "natural" / "sanity" / "result.json")
    verdicts = VerdictIndex(root)
    assert verdicts.find(result) == found.verdict
    for change in ({"weights": "0" * 64}, {"threat": {"norm": "Linf", "eps": "0.1"}}, {"data": "other"}):
        assert verdicts.find(result.model_copy(update={"identity": result.identity | change})) == "unchecked"
    assert verdicts.find(result.model_copy(update={"model": "at"})) == "unchecked"
    assert VerdictIndex(None).find(result) == "unchecked"


def test_a_damaged_file_is_named(tmp_path):
    path = tmp_path / FILE
    path.write_text('{"schema_version": 7}')
    with pytest.raises(ResultError, match=r"sanity\.json"):
        read_sanity(path)


def test_thresholds_have_a_table_for_every_check():
    with pytest.raises(ResultError, match="differ in"):
        load_thresholds('version = 1\n[check.noise]\ntitle = "t"\nsense = "at most"\nsource = "s"\nthreshold = "t"\n')
    with pytest.raises(ResultError, match="sense"):
        load_thresholds('version = 1\n[check.noise]\ntitle = "t"\nsense = "below"\nsource = "s"\nthreshold = "t"\n')
    for limit in load_thresholds().check.values():
        assert limit.source and limit.threshold and (limit.warn is not None or limit.fail is not None)


def test_chance_is_not_held_against_a_model(tree):
    """Four images more than the control of 200 are two points, but three against one are none."""
    m = tree[1].measurements

    def value(beyond, behind):
        control = Challenge(name="c", role="control", given=9, broken=behind, beyond=0, behind=0, alone=0)
        single = Challenge(name="s", role="single step", given=9, broken=beyond, beyond=beyond, behind=behind, alone=0)
        found = run_checks(m.model_copy(update={"n": 60, "challenges": [control, single]}))
        return next(c for c in found if c.name == "single_step")

    assert (value(4, 1).value, value(4, 1).status) == (5.0, "pass")
    assert (value(7, 0).status, value(7, 0).decides) == ("fail", "masked")


def test_models_that_hide_are_noticed_and_what_is_advised_lowers_the_number(tmp_path):
    model = nn.Sequential(Temperature(digits("natural"), 100.0), nn.Softmax(1)).eval()
    hot = examine(model, samples=8, dataset="digits", results=tmp_path, act=True)
    assert hot.verdict == "masked" and {"zero_gradients", "overestimation"} <= set(hot.decided_by)
    assert hot.acted is not None and hot.acted.suite == hot.advice.suite
    assert hot.acted.robust_accuracy.value < hot.measurements.pgd.value
    assert examine(model, samples=8, dataset="digits", results=tmp_path) == hot  # what was acted on is kept


def test_a_model_without_a_gradient_is_masked_not_refused():
    cut = examine(NoGradient(digits("natural")).eval(), samples=16, dataset="digits")
    assert cut.verdict == "masked" and not cut.measurements.differentiable
    assert {"unavailable_gradients", "transfer", "square"} <= set(cut.decided_by)


def test_random_answers_are_randomized():
    noisy = examine(Noisy(digits("natural"), 0.1).eval(), samples=8, dataset="digits")
    assert (noisy.verdict, noisy.decided_by, noisy.advice.suite) == ("randomized", ["randomized"], "eot")


def test_an_advised_suite_without_transfers_takes_no_surrogate():
    noisy = Noisy(digits("natural"), 0.1).eval()
    found = examine(noisy, samples=3, dataset="digits", act=True, surrogate="digits/natural")
    assert found.acted is not None and found.acted.suite == "eot"


def test_images_of_ones_own_need_no_surrogate():
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(24, 1, 6, 6, generator=generator)
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 3)).eval()
    with torch.no_grad():
        model[1].weight.copy_(torch.randn(3, 36, generator=generator))
    found = examine(model, samples=None, x=x, y=model(x).argmax(1), eps=0.05, norm="Linf", name="mine")
    assert found.verdict == "trustworthy"
    assert {c.name: c.status for c in found.checks}["transfer"] == "not applicable"


class NaNBetweenLevels(nn.Module):
    """Answers NaN to images whose pixels are not on the levels k / 16."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        away = (16 * x - (16 * x).round()).abs().flatten(1).amax(1, keepdim=True) > 1e-3
        return self.inner(x).masked_fill(away, torch.nan)


def test_a_model_that_always_answers_nan_around_images_is_masked_and_not_randomized():
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 17, (24, 1, 6, 6), generator=generator) / 16
    inner = nn.Sequential(nn.Flatten(), nn.Linear(36, 3)).eval()
    with torch.no_grad():
        inner[1].weight.copy_(torch.randn(3, 36, generator=generator))
    model = NaNBetweenLevels(inner).eval()
    found = examine(model, samples=None, x=x, y=inner(x).argmax(1), eps=0.05, norm="Linf", name="mine")
    assert found.verdict == "masked" and "zero_gradients" in found.decided_by
    assert {c.name: c.status for c in found.checks}["randomized"] == "pass"


def test_what_is_advised_runs_on_images_of_ones_own_too():
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(4, 1, 4, 4, generator=generator)
    inner = nn.Sequential(nn.Flatten(), nn.Linear(16, 3)).eval()
    with torch.no_grad():
        inner[1].weight.copy_(torch.randn(3, 16, generator=generator))
    found = examine(NoGradient(inner).eval(), samples=None, act=True, x=x, y=inner(x).argmax(1), eps=0.1, norm="Linf")
    assert found.advice.suite == "blackbox"
    assert found.acted is not None and found.acted.robust_accuracy.value <= found.measurements.pgd.value


def test_a_model_that_is_always_wrong_has_nothing_to_check():
    x = torch.rand(8, 1, 4, 4)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3)).eval()
    with pytest.raises(ModelError, match="none of 8 images right"):
        examine(model, samples=None, x=x, y=(model(x).argmax(1) + 1) % 3, eps=0.1, norm="Linf")


def test_a_challenge_gives_every_attack_what_the_first_left(tree):
    root, found = tree
    folder = root / "digits" / "natural" / "sanity"
    rows, result = read_rows(folder / "outcomes.parquet"), read_result(folder / "result.json")
    wide = rows.pivot(index="sample", columns="attack", values="status")
    first = wide[result.attacks[0].name]
    for attack in result.attacks[1:]:
        assert (wide.loc[first == "broken", attack.name] == "skipped").all()
        assert wide.loc[first == "robust", attack.name].isin(["broken", "robust"]).all()
    everything = (wide.isin(["robust", "skipped"]) & (first != "broken").to_numpy()[:, None]).all(axis=1)
    assert result.robust_accuracy.value == pytest.approx(everything.mean())
    assert compare_attacks(result, rows) == found.measurements.challenges


def test_eval_with_the_suite_gives_the_verdict_too(tree):
    root, _ = tree
    call = ["eval", "-m", "digits/natural", "--suite", "sanity", "--samples", "40", "--results", str(root)]
    shown = CliRunner().invoke(app, call)
    assert shown.exit_code == 0 and "trustworthy" in shown.stdout
    printed = json.loads(CliRunner().invoke(app, [*call, "--json"]).stdout)
    assert printed["verdict"] == "trustworthy" and printed["overestimation"] >= 0


def test_a_verdict_without_a_digest_of_its_landscape_gets_one(tree, tmp_path, monkeypatch):
    """Files of older versions have none. The landscape is measured again; all else stands."""
    _, found = tree
    root = shutil.copytree(tree[0], tmp_path / "tree")
    folder = root / "digits" / "natural" / "sanity"
    original = (folder / LANDSCAPE).read_bytes()
    (folder / FILE).write_bytes(dump_sealed(found.model_copy(update={"landscape": ""})))
    exchanged = pd.read_parquet(folder / LANDSCAPE).assign(margin=0.0)
    exchanged.to_parquet(folder / LANDSCAPE, index=False)
    monkeypatch.setattr("robbench.masking.run.run_measurements", None)
    assert examine("digits/natural", samples=40, results=root) == found == read_verdict(folder / FILE)
    assert (folder / LANDSCAPE).read_bytes() == original, "nothing vouched for the exchanged one"


def test_the_report_and_its_json(tree):
    root, found = tree
    call = ["sanity", "digits/natural", "--samples", "40", "--results", str(root)]
    shown = CliRunner().invoke(app, call)
    assert shown.exit_code == 0, shown.output
    for c in found.checks:
        assert c.name in shown.stdout
    assert json.loads(CliRunner().invoke(app, [*call, "--json"]).stdout) == json.loads(dump_sanity(found))
    with Image.open(root / "digits" / "natural" / "sanity" / "sheet.png") as sheet:
        assert sheet.size == (1600, 1500)


def test_the_sheet_is_a_function_of_what_is_stored(tree):
    root, found = tree
    landscape = root / "digits" / "natural" / "sanity" / LANDSCAPE
    assert draw_sheet(found, landscape) == draw_sheet(found, landscape) == landscape.with_name("sheet.png").read_bytes()


def test_the_verdict_stands_in_the_leaderboard(tree):
    root, _ = tree
    evaluate("digits/natural", "quick", samples=16, results=root)
    evaluate("digits/at", "quick", samples=16, results=root)
    lines = read_leaderboard(root).splitlines()
    assert sum("| trustworthy" in line for line in lines) == 3  # natural, over all suites and in both
    assert sum("| unchecked" in line for line in lines) == 2
    assert len(read_results(root).results) == 3


def test_gradients_of_nan_are_named_where_zero_ones_are_counted(repo):
    folder = repo / "results/digits/at/sanity"
    stored = read_sanity(folder / FILE)
    odd = stored.measurements.model_copy(update={"nonfinite_gradients": True})
    named = {c.name for c in run_checks(odd) if "Entries of NaN or infinity count as zero" in c.reason}
    assert named == {"unavailable_gradients", "zero_gradients"}
    assert not find_foreign_facts(stored, folder)
    told = find_foreign_facts(stored.model_copy(update={"measurements": odd}), folder)
    assert "nonfinite_gradients is True; False follows from the result" in told


def test_stored_verdicts_are_those_of_todays_checks(repo):
    for path in sorted((repo / "results").glob(f"*/*/sanity*/{FILE}")):
        stored = read_sanity(path)
        checks = run_checks(stored.measurements)
        assert checks == stored.checks, f"{path} is stale: robbench sanity {stored.dataset}/{stored.model}"
        assert decide_verdict(checks) == (stored.verdict, stored.decided_by)


def test_the_documentation_has_the_thresholds_in_force(repo):
    text = (repo / "docs" / "sanity.md").read_text(encoding="utf-8")
    for name, limit in load_thresholds().check.items():
        sign = "≥" if limit.sense == "at most" else "<"
        shown = [f"{sign} {v:g}" if v is not None else "–" for v in (limit.warn, limit.fail)]
        (row,) = [line for line in text.splitlines() if line.startswith(f"| `{name}` |")]
        cells = [cell.strip() for cell in row.split("|")]
        assert cells[3:5] == shown and cells[6] == limit.source


class AsksForMode(nn.Module):
    def forward(self, x):
        return x if self.training else -x


def test_dropout_left_on_is_kept_on_and_nothing_else():
    layers = [nn.Flatten(), nn.Dropout(0.5), nn.Linear(16, 3)]
    model = nn.Sequential(*layers).train()
    ours = keep_dropout_on(model)
    x = torch.rand(64, 1, 4, 4)
    assert not any(part.training for part in ours.modules()) and model.training
    assert not torch.equal(ours(x), ours(x))
    left = nn.Sequential(*ours[:2])(torch.ones(64, 1, 4, 4))
    assert set(left.unique().tolist()) == {0.0, 2.0}
    assert keep_dropout_on(model.eval()) is model
    for other in (nn.BatchNorm1d(16), AsksForMode()):
        mixed = nn.Sequential(nn.Flatten(), other, nn.Dropout(0.5)).train()
        assert keep_dropout_on(mixed) is mixed  # refused by the run, with a reason


def test_more_samples_of_a_challenge_continue_it(tmp_path):
    both = evaluate("digits/at", "sanity", samples=6, results=tmp_path / "a")
    both = evaluate("digits/at", "sanity", samples=12, results=tmp_path / "a")
    whole = evaluate("digits/at", "sanity", samples=12, results=tmp_path / "b")
    rows = [read_rows(tmp_path / f / "digits/at/sanity/outcomes.parquet").drop(columns="seconds") for f in "ab"]
    pd.testing.assert_frame_equal(*rows)
    assert both.robust_accuracy == whole.robust_accuracy
    names = [a.name for a in whole.attacks]
    assert not list(find_record_mismatches(rows[0], names, "challenge"))
    second = rows[0]["attack"] == names[1]
    stands = second & (rows[0]["status"] != "skipped") & (rows[0]["status"] != "misclassified")
    forged = rows[0].assign(status=rows[0]["status"].mask(stands, "skipped"))
    assert "no earlier attack broke" in str(next(find_record_mismatches(forged, names, "challenge")))


def test_a_surrogate_that_is_not_there_is_left_out_only_where_the_suite_says_so(tmp_path):
    text = (
        'version = 1\n[[attack]]\nname = "a"\nkind = "pgd"\n[[attack]]\nname = "t"\nkind = "transfer"\n'
        'surrogate = "nowhere"\nattack = "pgd"\n'
    )
    path = tmp_path / "mine.toml"
    call = {"samples": 4, "eps": 0.1, "norm": "Linf"}
    path.write_text(text)
    with pytest.raises(CardError, match="nowhere"):
        evaluate("digits/at", str(path), **call)
    path.write_text(text + "optional = true\n")
    assert [a.name for a in evaluate("digits/at", str(path), **call).attacks] == ["a"]


def test_more_images_than_memory_holds_are_refused_before_any_attack(monkeypatch, tmp_path):
    monkeypatch.setattr(sanity_run, "_MOST_BYTES", 10 * 64 * 4)
    monkeypatch.setattr(sanity_run, "run_here", None)
    with pytest.raises(RobbenchError, match=r"11 images of 1 × 8 × 8 .* allowed: --samples 10 or fewer"):
        examine("digits/at", samples=11, results=tmp_path)
    with pytest.raises(TypeError):
        examine("digits/at", samples=10, results=tmp_path)
