"""The gate's decision on made-up verdicts: what fails, what does not, and how often it is wrong."""

import json
import re
import tomllib

import numpy as np
import pandas as pd
import pytest
from scipy import stats as scipy_stats

from robbench.core.errors import ResultError
from robbench.core.files import digest
from robbench.gate.baseline import BaselineEntry, Given, build_entry, read_baseline, write_baseline
from robbench.gate.decision import GateOutcome, Policy, decide_gate, is_certain_to_pass, run_gate_check
from robbench.gate.paired import Comparison, PairedTest, compare_entries
from robbench.report.gate import format_markdown, format_text
from robbench.results.store import COLUMNS
from robbench.results.summary import make_accuracy


def made(verdicts, *, weights="w", steps=20, samples=None, **changed):
    """Make an entry from a letter per image and attack."""
    n = len(next(iter(verdicts.values())))
    lost = [any(v[i] in "mb" for v in verdicts.values()) for i in range(n)]
    clean = sum(all(v[i] != "m" for v in verdicts.values()) for i in range(n))
    identity = {
        "model": {"dataset": "d"},
        "weights": weights,
        "data": "images",
        "suite": {"name": "s", "judge": "any", "mode": "full"},
        "attacks": [{"name": name, "kind": "pgd", "steps": steps} for name in verdicts],
        "threat": {"norm": "Linf", "eps": "1/5"},
        "seed": 0,
    }
    fields = {
        "model": "m",
        "dataset": "d",
        "given": Given(model="d/m"),
        "suite": "s",
        "n": n,
        "seed": 0,
        "sample_seed": 0,
        "selection": f"{n} drawn",
        "clean_accuracy": make_accuracy(clean, n),
        "robust_accuracy": make_accuracy(n - sum(lost), n),
        "run_id": "r",
        "identity": {**identity, **changed.pop("identity", {})},
        "versions": {"torch": "2"},
        "hardware": "cpu",
        "date": "",
        "code": {"engine.py": "0"},
        "attacks": list(verdicts),
        "samples": " ".join(map(str, range(n) if samples is None else samples)),
        "verdicts": verdicts,
    }
    return BaselineEntry(**{**fields, **changed})


def written(verdicts, **changed):
    """Make the entry of a file: it has the digest of its identity, and the selection of its samples."""
    entry = made(verdicts, **changed)
    return entry.model_copy(
        update={"run_id": digest(entry.identity), "selection": f"all {entry.n}", "sample_seed": None}
    )


def flipped(letters, *changes):
    """Change letters: (from, to, how many) of the first that are `from`."""
    letters = list(letters)
    original = list(letters)
    for was, to, count in changes:
        for i in [i for i, c in enumerate(original) if c == was][:count]:
            letters[i] = to
    return "".join(letters)


BASE = "m" * 20 + "b" * 180 + "r" * 300


def by_what(decision):
    return {f.test.what: f for f in decision.findings}


def test_the_same_run_passes_without_a_flip():
    c = compare_entries(made({"A": BASE, "B": BASE}), made({"A": BASE, "B": BASE}))
    decision = decide_gate([c], Policy())
    assert not decision.failed and not c.flips and not c.changes
    assert {f.outcome for f in decision.findings} == {GateOutcome.PASSED}


def test_a_drop_fails_with_the_exact_adjusted_p():
    now = made({"A": flipped(BASE, ("r", "b", 25), ("b", "r", 4))}, weights="v")
    c = compare_entries(made({"A": BASE}), now)
    found = by_what(decide_gate([c], Policy()))
    worst = found["worst case"]
    assert (len(worst.test.lost), len(worst.test.gained)) == (25, 4)
    assert worst.test.points == pytest.approx(-4.2)
    # Two tests: clean accuracy and worst case; the attack's rise is explained by the weights, and does not count.
    # The worst case weighs 8 of 9.
    assert worst.p == pytest.approx(9 / 8 * scipy_stats.binomtest(25, 29, alternative="greater").pvalue)
    assert worst.outcome is GateOutcome.FAILED and [c.field for c in worst.because] == ["weights"]
    assert found["clean accuracy"].outcome is GateOutcome.PASSED and not found["A"].test.counted
    flip = next(f for f in c.flips if f.sample == 200)
    assert flip.worst_case == "lost" and flip.attacks == {"A": ("robust", "broken")}


def test_a_drop_within_the_tolerance_and_one_that_chance_explains():
    now = made({"A": flipped(BASE, ("r", "b", 25), ("b", "r", 4))}, weights="v")
    worst = by_what(decide_gate([compare_entries(made({"A": BASE}), now)], Policy(max_drop=4.2)))["worst case"]
    assert worst.outcome is GateOutcome.TOLERATED
    now = made({"A": flipped(BASE, ("r", "b", 25), ("b", "r", 15))}, weights="v")
    worst = by_what(decide_gate([compare_entries(made({"A": BASE}), now)], Policy()))["worst case"]
    assert worst.test.points == -2 and worst.outcome is GateOutcome.UNCERTAIN


def test_a_clean_drop_fails_whatever_the_attacks_say():
    now = made({"A": flipped(BASE, ("b", "m", 15))}, weights="v")
    found = by_what(decide_gate([compare_entries(made({"A": BASE}), now)], Policy()))
    assert found["clean accuracy"].outcome is GateOutcome.FAILED and found["worst case"].outcome is GateOutcome.PASSED


def test_fewer_breaks_of_the_same_weights_are_a_weakened_attack():
    weak = flipped(BASE, ("b", "r", 15))
    # B still breaks them all, so the worst case does not move: only the attack's own records tell.
    c = compare_entries(made({"A": BASE, "B": BASE}), made({"A": weak, "B": BASE}, steps=5))
    found = by_what(decide_gate([c], Policy()))
    assert found["A"].outcome is GateOutcome.FAILED and found["B"].outcome is GateOutcome.PASSED
    assert found["worst case"].test.points == 0
    assert [str(x) for x in found["A"].because] == ["attack A: steps 20 → 5"]


def test_a_weakened_attack_whose_parameters_are_the_same_is_told_by_code():
    now = made({"A": flipped(BASE, ("b", "r", 15))}, code={"engine.py": "1", "rng.py": "2"})
    (finding,) = [
        f for f in decide_gate([compare_entries(made({"A": BASE}), now)], Policy()).findings if f.outcome == "failed"
    ]
    assert [str(x) for x in finding.because] == ["code: robbench's own engine.py, rng.py"]


@pytest.mark.parametrize(("steps", "outcome"), [(20, GateOutcome.EXPLAINED), (5, GateOutcome.FAILED)])
def test_new_weights_explain_a_rise_but_not_that_of_a_changed_attack(steps, outcome):
    now = made({"A": flipped(BASE, ("b", "r", 40))}, weights="v", steps=steps)
    decision = decide_gate([compare_entries(made({"A": BASE}), now)], Policy())
    assert by_what(decision)["A"].outcome is outcome and decision.failed == (steps == 5)


def test_an_attack_that_is_gone_fails():
    c = compare_entries(made({"A": BASE, "B": BASE}), made({"A": BASE}))
    decision = decide_gate([c], Policy())
    assert c.removed == ["B"] and decision.failed
    added = compare_entries(made({"A": BASE}), made({"A": BASE, "B": BASE}))
    assert not decide_gate([added], Policy()).failed and "attack B: is new in the suite" in map(str, added.changes)


def test_an_attack_is_compared_on_the_images_that_both_runs_gave_it():
    first = flipped(BASE, ("b", "r", 15))  # A is weaker, so B gets 15 images more and breaks them
    before = {"A": BASE, "B": BASE.replace("b", "s")}
    now = {"A": first, "B": "m" * 20 + "b" * 15 + "s" * 165 + "r" * 300}
    found = by_what(decide_gate([compare_entries(made(before), made(now))], Policy()))
    assert found["A"].outcome is GateOutcome.FAILED
    assert found["B"].test.n == 300 and found["B"].outcome is GateOutcome.PASSED
    assert found["worst case"].test.points == 0


@pytest.mark.parametrize(
    ("now", "message"),
    [
        (made({"A": BASE}, identity={"data": "others"}), "images and labels: images in the baseline, others now"),
        (made({"A": BASE}, identity={"threat": {"norm": "Linf", "eps": "1/10"}}), "threat: Linf 1/5"),
        (made({"A": BASE}, dataset="e"), "data set: d"),
        (made({"A": BASE[:400]}), "100 of the 500 images"),
    ],
)
def test_what_cannot_be_compared_is_refused(now, message):
    with pytest.raises(ResultError, match=message):
        compare_entries(made({"A": BASE}), now)


def test_holm_over_all_tests_of_the_check():
    """Eight images lost are certain for one model (two tests), and not among six models (twelve tests)."""
    before, now = made({"A": BASE}), made({"A": flipped(BASE, ("r", "b", 8))}, weights="v")
    still = compare_entries(before, made({"A": BASE}, weights="v"))
    assert decide_gate([compare_entries(before, now)], Policy()).failed
    assert not decide_gate([compare_entries(before, now), *[still] * 5], Policy()).failed
    assert decide_gate([compare_entries(before, now)], Policy()).resolution == 7
    assert decide_gate([compare_entries(before, now), *[still] * 5], Policy()).resolution == 10


def test_policies_that_mean_nothing():
    for wrong in ({"alpha": 0.0}, {"alpha": 1.0}, {"max_drop": -1.0}, {"max_drop": 101.0}):
        with pytest.raises(ResultError, match="allowed"):
            Policy(**wrong)


# --- how often it is wrong


def drawn(generator, chances, order=None):
    """Draw verdicts: each image breaks under each of three attacks with its own chance; the first tenth is wrong."""
    broken = generator.random((3, len(chances))) < chances
    letters = np.where(broken, "b", "r")
    letters[:, : len(chances) // 10] = "m"
    return made({f"A{i}": "".join(row) for i, row in enumerate(letters)}, samples=order)


def test_unchanged_models_fail_no_more_often_than_alpha():
    """Both runs have seeds of their own; a third of the images break by chance, far more than on real models."""
    generator = np.random.default_rng(0)
    chances = np.concatenate([np.zeros(60), generator.random(80), np.ones(60)])
    alpha, checks = 0.2, 300
    failed = sum(
        decide_gate(
            [compare_entries(drawn(generator, chances), drawn(generator, chances))], Policy(max_drop=0, alpha=alpha)
        ).failed
        for _ in range(checks)
    )
    assert 0 < failed <= scipy_stats.binom.ppf(0.99, checks, alpha)


def prefix(run, n):
    samples, verdicts = run.samples.split()[:n], {name: v[:n] for name, v in run.verdicts.items()}
    return made(verdicts, samples=samples, weights=run.identity["weights"])


def test_a_sequential_check_of_unchanged_models_fails_no_more_often_than_alpha():
    generator = np.random.default_rng(1)
    chances = generator.permutation(np.concatenate([np.zeros(60), generator.random(80), np.ones(60)]))
    alpha, checks, failed = 0.3, 100, 0
    for _ in range(checks):
        before, now = drawn(generator, chances), drawn(generator, chances)
        failed += run_gate_check(
            [before], lambda _, n, now=now: prefix(now, n), Policy(max_drop=0, alpha=alpha), sequential=True
        ).failed
    assert 0 < failed <= scipy_stats.binom.ppf(0.99, checks, alpha)


@pytest.mark.parametrize(("bad", "n"), [(11, 1000), (6, 400), (51, 5000)])
def test_passing_early_is_rarely_wrong(bad, n):
    """One image more than the allowed point is lost among all n: the share of orders in which a look lets it pass."""
    generator = np.random.default_rng(2)
    alpha, orders, wrong = 0.25, 150, 0
    before = made({"A": "r" * n})
    policy = Policy(alpha=alpha, max_drop=1)
    plan = [(0.125, 1 / 16), (0.25, 1 / 16), (0.5, 1 / 8), (0.75, 1 / 4)]
    for _ in range(orders):
        places = generator.choice(n, bad, replace=False)
        for where, share in plan:
            k = round(where * n)
            lost = tuple(range(int((places < k).sum())))
            question = PairedTest("d/m", "worst case", "drop", k, k, k - len(lost), lost, ())
            if is_certain_to_pass(Comparison(before, before, [question], [], [], [], k), policy, share):
                wrong += 1
                break
    assert wrong <= scipy_stats.binom.ppf(0.99, orders, alpha / 2), "the last look's half is not spent on it"


def test_a_sequential_check_stops_early_either_way():
    asked = []

    def measure(run, n):
        asked.append(n)
        return prefix(current, n)

    generator = np.random.default_rng(3)
    letters = "".join(generator.permutation(list("b" * 800 + "r" * 1200)))
    before = made({"A": letters})
    current = before
    passed = run_gate_check([before], measure, Policy(), sequential=True)
    assert not passed.failed and asked == [250, 500, 1000]
    assert passed.early == "the answer was certain after 1000 of 2000 images"
    asked.clear()
    # A tenth of the images that stood fall.
    fallen = "".join("b" if c == "r" and u < 0.1 else c for c, u in zip(letters, generator.random(2000), strict=True))
    current = made({"A": fallen}, weights="v")
    failed = run_gate_check([before], measure, Policy(), sequential=True)
    assert failed.failed and asked[-1] < 1000 and failed.early


def test_a_sequential_check_that_cannot_decide_early_measures_everything():
    before = made({"A": BASE})
    now = made({"A": flipped(BASE, ("r", "b", 4), ("b", "r", 2))}, weights="v")
    decision = run_gate_check([before], lambda _, n: prefix(now, n), Policy(), sequential=True)
    assert decision.early is None and not decision.failed and decision.comparisons[0].n == 500
    official = made({"A": BASE}, sample_seed=None)
    with pytest.raises(ResultError, match="order must be random"):
        run_gate_check([official], lambda _, n: now, Policy(), sequential=True)


def test_reseeded_runs_of_a_digits_model_pass(repo):
    """Stored verdicts of 20 seeds of the attacks on one model: 200 pairs of them, none of which may fail."""
    stored = json.loads((repo / "tests/data/reseeded.json").read_text())
    base = BaselineEntry.model_validate(stored["baseline"])
    runs = [base.model_copy(update={"verdicts": v, "seed": i}) for i, v in enumerate(stored["verdicts_by_seed"])]
    assert len(runs) == 20 and len({json.dumps(r.verdicts) for r in runs}) == 20, "every seed found something else"
    generator = np.random.default_rng(0)
    pairs = [generator.choice(20, 2, replace=False) for _ in range(200)]
    failed = sum(decide_gate([compare_entries(runs[a], runs[b])], Policy(max_drop=0)).failed for a, b in pairs)
    assert failed <= scipy_stats.binom.ppf(0.99, 200, 0.01)
    # The same verdicts, with two points of the images that stand taken away, fail.
    dropped = runs[1].model_copy(
        update={
            "verdicts": {k: flipped(v, ("r", "b", 12)) for k, v in runs[1].verdicts.items()},
            "identity": {**base.identity, "weights": "other"},
        }
    )
    assert decide_gate([compare_entries(runs[1], dropped)], Policy()).failed


# --- the file


def test_a_baseline_comes_back_as_it_was(tmp_path):
    runs = [written({"A": BASE, "B": BASE}), written({"A": BASE}, model="o")]
    write_baseline(tmp_path / "b.json", runs)
    assert read_baseline(tmp_path / "b.json").runs == runs
    first = (tmp_path / "b.json").read_bytes()
    write_baseline(tmp_path / "b.json", runs)
    assert (tmp_path / "b.json").read_bytes() == first
    assert runs[0].index().tolist() == list(range(500)) and list(runs[0].letters()) == ["A", "B"]
    assert (runs[0].letters()["A"] == "b").sum() == 180


@pytest.mark.parametrize(
    ("verdicts", "message"),
    [
        ({"A": "m" * 9, "B": "m" * 9}, "all images are misclassified"),
        ({"A": "mrb", "B": "rrb"}, "misclassified .m. under one attack and not"),
        ({"A": "rrb", "B": "rmb"}, "misclassified .m. under one attack and not"),
        ({"A": "srb", "B": "rrb"}, "skipped .s. that no earlier"),
        ({"A": "srb", "B": "brb"}, "skipped .s. that no earlier"),
        ({"A": "rrb", "B": "rsb"}, "skipped .s. that no earlier"),
        ({"A": "rrb", "B": "rrs"}, None),
        ({"A": "rmb", "B": "bms"}, None),
    ],
)
def test_verdicts_that_no_run_writes_are_refused(tmp_path, verdicts, message):
    """Edited ones could leave nothing that a gate compares."""
    write_baseline(tmp_path / "b.json", [written(verdicts)])
    if message is None:
        assert read_baseline(tmp_path / "b.json").runs[0].verdicts == verdicts
    else:
        with pytest.raises(ResultError, match=message):
            read_baseline(tmp_path / "b.json")


def test_verdicts_are_of_the_attacks_of_the_identity(tmp_path):
    entry = written({"A": "rrb"})
    for changed in ({"attacks": ["Z"], "verdicts": {"Z": "rrb"}}, {"attacks": [], "verdicts": {}}):
        write_baseline(tmp_path / "b.json", [entry.model_copy(update=changed)])
        with pytest.raises(ResultError, match="attacks are not those of the identity"):
            read_baseline(tmp_path / "b.json")
    none = written({"A": "rrb"}, identity={"attacks": []}).model_copy(update={"attacks": [], "verdicts": {}})
    write_baseline(tmp_path / "b.json", [none])
    with pytest.raises(ResultError, match="nothing could be compared"):
        read_baseline(tmp_path / "b.json")


def test_the_same_weights_do_not_get_far_more_images_right():
    before, now = made({"A": "m" * 60 + "r" * 40}), made({"A": "r" * 99 + "b"})
    with pytest.raises(ResultError, match="counts 40 of 100 images as classified correctly, and 100 are now"):
        compare_entries(before, now)
    assert compare_entries(before, made({"A": "r" * 99 + "b"}, weights="other")).n == 100
    assert compare_entries(made({"A": "mm" + "r" * 98}), now).n == 100, "rounding on other hardware may do that"
    assert compare_entries(now, before).n == 100, "a drop is for the tests to judge"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t["runs"][0]["verdicts"].update(A="x" * 500), "verdicts of A: expected 500 letters"),
        (lambda t: t["runs"][0]["verdicts"].update(A=BASE[1:]), "verdicts of A: expected 500 letters"),
        (lambda t: t["runs"][0].update(samples="1 1"), "samples holds 1"),
        (lambda t: t["runs"][0].update(attacks=["Z"]), "expected one line for each"),
        (lambda t: t["runs"][0]["robust_accuracy"].update(value=0.93), "robust_accuracy of d/m does not follow"),
        (lambda t: t["runs"][0]["clean_accuracy"].update(low=0.93), "clean_accuracy of d/m does not follow"),
        (lambda t: t["runs"][0]["verdicts"].update(A="r" * 500), "does not follow from its verdicts"),
        (lambda t: t["runs"][0].update(run_id="0" * 64), "run_id is not the digest"),
        (lambda t: t["runs"][0]["identity"]["threat"].update(eps="1/9"), "run_id is not the digest"),
        (lambda t: t["runs"][0].update(seed=3), "seed or sample_seed"),
        (lambda t: t["runs"][0].update(sample_seed=3), "seed or sample_seed"),
        (lambda t: t["runs"][0].update(selection="first 500 of 400"), "selection"),
        (lambda t: t["runs"][0].update(samples=" ".join(map(str, range(1, 501)))), "does not hold sample 1"),
        (lambda t: t.update(schema_version=9), "schema_version"),
        (lambda t: t["runs"].append(t["runs"][0]), "each model once"),
        (lambda t: t.update(runs=[]), "at least one"),
    ],
)
def test_a_damaged_baseline_is_refused(tmp_path, change, message):
    path = tmp_path / "b.json"
    write_baseline(path, [written({"A": BASE})])
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ResultError, match=message):
        read_baseline(path)
    with pytest.raises(ResultError, match="robbench baseline --model"):
        read_baseline(tmp_path / "none.json")


def test_incomplete_records_make_no_baseline():
    rows = pd.DataFrame({"sample": [3, 3, 4], "attack": ["A", "B", "A"], "status": "robust"})
    rows = rows.reindex(columns=list(COLUMNS), fill_value=0).astype(COLUMNS)

    class Result:
        attacks = (type("A", (), {"name": "A"}), type("B", (), {"name": "B"}))
        dataset, model, n = "d", "m", 2

    with pytest.raises(ResultError, match="not complete"):
        build_entry(Result(), rows, Given(model="d/m"), suite="s", sample_seed=None, code={})


@pytest.mark.parametrize("dataset", ["digits", "mnist"])
def test_the_baselines_of_this_repository_hold_the_models_that_the_makefile_names(repo, dataset):
    runs = read_baseline(repo / f"baselines/{dataset}.json").runs
    named = re.search(rf"^{dataset.upper()} *:= (.*)$", (repo / "Makefile").read_text(), flags=re.MULTILINE)[1].split()
    assert [r.model for r in runs] == named
    for run in runs:
        card = tomllib.loads((repo / f"models/{run.name}.toml").read_text())
        assert run.identity["weights"] == card["weights"]["sha256"], "the weights are those of the card"
        assert run.sample_seed == 0, "in random order, so that a sequential check can stop early"


def test_a_changed_judge_is_named_even_where_the_gate_passes(repo):
    entry = read_baseline(repo / "baselines/digits.json").runs[0]
    assert "engine/judge.py" in entry.code, "the digests cover the judge"
    now = entry.model_copy(update={"code": {**entry.code, "engine/judge.py": "0" * 16}})
    decision = decide_gate([compare_entries(entry, now)], Policy())
    assert not decision.failed
    for page in (format_text(decision), format_markdown(decision)):
        assert "not that of the baseline" in page and "engine/judge.py" in page
    same = decide_gate([compare_entries(entry, entry)], Policy())
    assert "not that of the baseline" not in format_text(same)


def test_a_run_that_changed_nothing_but_its_verdicts_is_noted():
    base = "r" * 60 + "b" * 40
    before = made({"A": base})
    text = "A file was edited, or the model is not deterministic."
    for now, is_noted in (
        (made({"A": flipped(base, ("b", "r", 2))}), True),
        (made({"A": base}), False),
        (made({"A": flipped(base, ("b", "r", 2))}, run_id="other"), False),
        (made({"A": flipped(base, ("b", "r", 2))}, hardware="another cpu"), False),
        (made({"A": flipped(base, ("b", "r", 2))}, code={"engine.py": "1"}), False),
    ):
        page = format_text(decide_gate([compare_entries(before, now)], Policy()))
        assert (text in " ".join(page.split())) == is_noted, now
        assert not is_noted or "the verdicts of 2 images differ" in " ".join(page.split())
