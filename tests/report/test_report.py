"""The leaderboard: ranks, ties, groups, and bytes that only results determine."""

from pathlib import Path

import pandas as pd
import pytest

from robbench.core.errors import ResultError
from robbench.core.stats import wilson
from robbench.evaluation.request import RunRequest
from robbench.evaluation.run import make_run
from robbench.report.leaderboard import build_group_table, compute_overestimation, rank_results, render_leaderboard
from robbench.results.schema import Accuracy, AttackResult, ResultFile, ThreatResult, dump_result, read_result
from robbench.results.store import COLUMNS, locate_result


def accuracy(k, n=1000):
    low, high = wilson(k, n)
    return Accuracy(value=k / n, low=low, high=high)


def result(model, robust, dataset="digits", eps="0.2", **changed):
    attack = AttackResult(
        name="PGD", robust_accuracy=accuracy(robust + 10), forwards=2000, backwards=1000, seconds=1.0, config={},
        refuted=0, zero_gradient_share=0.0,
    )  # fmt: skip
    values = {
        "schema_version": 2, "run_id": "ab" * 32, "model": model, "dataset": dataset,
        "threat": ThreatResult(norm="Linf", eps=eps), "suite": "whitebox", "n": 1000, "seed": 0,
        "clean_accuracy": accuracy(950), "robust_accuracy": accuracy(robust), "attacks": [attack], "judge": "any",
        "mode": "full", "overrides": {}, "flags": {}, "identity": {}, "selection": "all 1000", "forwards": 2000,
        "backwards": 1000, "seconds": 1.0, "lanes": 8, "hardware": "a machine", "versions": {},
        "date": "2026-01-02T03:04:05+00:00",
    }  # fmt: skip
    return ResultFile(**{**values, **changed})


def put(root: Path, r: ResultFile, folder="whitebox"):
    path = root / r.dataset / r.model / folder / "result.json"
    path.parent.mkdir(parents=True)
    path.write_text(dump_result(r))


def test_overlapping_intervals_are_ties_with_the_best_of_the_rank():
    group = [result("d", 100), result("b", 490), result("a", 500), result("c", 440)]
    # 500 reaches down to 469; 490 and 440's upper end 471 overlap it; 100 does not.
    assert [(rank, r.model) for rank, r in rank_results(group)] == [("1=", "a"), ("1=", "b"), ("1=", "c"), ("4", "d")]
    chain = [result("a", 500), result("b", 460), result("c", 420)]
    # b overlaps a, c overlaps b but not a: c does not ride along.
    assert [rank for rank, _ in rank_results(chain)] == ["1=", "1=", "3"]


def records(root: Path, r: ResultFile, robust: list[bool], first=0):
    """Write per-image records beside a result."""
    rows = [
        {name: 0 for name in COLUMNS}
        | {"sample": first + i, "attack": "PGD", "status": "robust" if ok else "broken", "claimed": not ok}
        for i, ok in enumerate(robust)
    ]
    path = locate_result(root, r) / "outcomes.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows)[list(COLUMNS)].astype(COLUMNS).to_parquet(path, index=False)


def of(model, robust, **changed):
    return result(model, 0, n=len(robust), robust_accuracy=accuracy(sum(robust), len(robust)), **changed)


def test_ties_are_what_the_same_images_do_not_tell_apart(tmp_path):
    """Seven images that only one withstands, of 1000: far inside the intervals, p = 1/64."""
    good = [True] * 500 + [False] * 500
    worse = [False] * 7 + good[7:]
    mixed = [False] * 10 + good[10:500] + [True] * 6 + good[506:]  # 10 against 6 of 1000: p = 0.45
    group = [of("good", good), of("worse", worse), of("mixed", mixed)]
    for r, robust in zip(group, (good, worse, mixed), strict=True):
        records(tmp_path, r, robust)
    assert [(rank, r.model) for rank, r in rank_results(group, tmp_path)] == [
        ("1=", "good"),
        ("1=", "mixed"),
        ("3", "worse"),
    ]
    assert [rank for rank, _ in rank_results(group)] == ["1=", "1=", "1="]  # intervals cannot tell
    # Order of the records does not matter, the images do.
    path = locate_result(tmp_path, group[1]) / "outcomes.parquet"
    shuffled = pd.read_parquet(path).sample(frac=1, random_state=0)
    shuffled.to_parquet(path, index=False)
    assert [rank for rank, _ in rank_results(group, tmp_path)] == ["1=", "1=", "3"]


@pytest.mark.parametrize("case", ["other images", "other data", "fewer images", "no records"])
def test_without_common_images_intervals_decide(tmp_path, case):
    good = [True] * 500 + [False] * 500
    worse = [False] * 7 + good[7:]
    second = of("worse", worse, identity={"data": "other"} if case == "other data" else {})
    records(tmp_path, of("good", good), good)
    if case != "no records":
        shown = worse[:900] if case == "fewer images" else worse
        records(tmp_path, second, shown, first=7 if case == "other images" else 0)
    assert [rank for rank, _ in rank_results([of("good", good), second], tmp_path)] == ["1=", "1="]


def test_a_paired_test_can_tie_what_intervals_tell_apart(tmp_path):
    """McNemar looks at the images that differ; a tie is no statement that two models are equally good."""
    group = [of("all", [True] * 5), of("none", [False] * 5)]  # p = 1/16
    for r, robust in zip(group, (True, False), strict=True):
        records(tmp_path, r, [robust] * 5)
    assert [rank for rank, _ in rank_results(group)] == ["1", "2"]
    assert [rank for rank, _ in rank_results(group, tmp_path)] == ["1=", "1="]


@pytest.mark.parametrize(
    ("configs", "mode", "expected"),
    [
        (
            [{"kind": "fgsm", "objective": "ce", "restarts": 1}, {"kind": "pgd", "objective": "ce", "restarts": 1}],
            "full",
            1,
        ),
        (
            [{"kind": "pgd", "objective": "ce", "restarts": 5}, {"kind": "pgd", "objective": "ce", "restarts": 1}],
            "full",
            1,
        ),
        (
            [{"kind": "pgd", "objective": "ce", "restarts": 1}, {"kind": "pgd", "objective": "ce", "restarts": 1}],
            "full",
            0,
        ),
        ([{"kind": "pgd", "objective": "margin", "restarts": 1}, {"kind": "apgd", "objective": "ce"}], "full", None),
        ([{"kind": "fgsm", "objective": "ce"}, {"kind": "pgd", "objective": "ce", "restarts": 1}], "cascade", None),
        ([{"kind": "pgd", "objective": "ce", "restarts": 1}, {}], "cascade", 0),
    ],
)
def test_overestimation_is_by_the_first_single_start_of_pgd(configs, mode, expected):
    base = result("a", 400, mode=mode)
    attacks = [
        base.attacks[0].model_copy(update={"config": c, "robust_accuracy": accuracy(500 - 50 * i)})
        for i, c in enumerate(configs)
    ]
    points = compute_overestimation(base.model_copy(update={"attacks": attacks}))
    assert points == (None if expected is None else pytest.approx([10.0, 5.0][expected]))


def test_the_leaderboard_has_one_group_per_threat_and_suite(tmp_path):
    root = tmp_path / "results"
    put(root, result("natural", 20))
    put(root, result("at", 500, flags={"randomized": "It rolls dice."}))
    others = result("at", 300, eps="0.3", overrides={"eps": "0.3"}), result("at", 500, overrides={"seed": "1"})
    for digits, other in zip(("cd", "ef"), others, strict=True):
        put(root, other.model_copy(update={"run_id": digits * 32}), f"whitebox@{digits * 4}")
    text = render_leaderboard(root)
    assert text == render_leaderboard(root)
    titles = [line for line in text.splitlines() if line.startswith("## ")]
    assert titles == [
        "## digits, Linf 0.2, suite whitebox",
        "## digits, Linf 0.2, suite whitebox (seed 1)",
        "## digits, Linf 0.3, suite whitebox",
    ]
    assert "[at](results/digits/at/whitebox/result.json)" in text
    assert "[at](results/digits/at/whitebox@cdcdcdcd/result.json)" in text
    assert "- at, randomized: It rolls dice." in text
    assert text.index("[at]") < text.index("[natural]")
    frame = build_group_table([result("natural", 20)])
    assert frame.loc[0, "Worst case"].startswith("2.0 [")
    assert frame.loc[0, "Fwd + bwd per image"] == "3"


def test_a_model_without_some_attack_shows_a_dash():
    other = result("b", 100)
    renamed = other.model_copy(update={"attacks": [other.attacks[0].model_copy(update={"name": "APGD"})]})
    frame = build_group_table([result("a", 500), renamed])
    assert frame.loc[0, "APGD"] == "–" and frame.loc[1, "PGD"] == "–"


def test_names_and_flags_are_no_markup(tmp_path):
    root = tmp_path / "results"
    put(root, result("a|b<i>(c)", 20, flags={"x<script>": "`y` | [z](w)\n# n"}))
    text = render_leaderboard(root)
    assert r"[a\|b&lt;i&gt;(c)](results/digits/a%7Cb%3Ci%3E%28c%29/whitebox/result.json)" in text
    assert r"x&lt;script&gt;: \`y\` \| [z\](w) # n" in text and "<script" not in text


def test_an_empty_tree_says_what_to_do(tmp_path):
    assert "robbench eval" in render_leaderboard(tmp_path)


@pytest.mark.parametrize(("change", "where"), [('"n": 1000', "n"), ('"low"', "low"), ("{", "")])
def test_a_damaged_result_is_named(tmp_path, change, where):
    put(tmp_path, result("a", 10))
    path = tmp_path / "digits/a/whitebox/result.json"
    path.write_text(path.read_text().replace(change, '"x": 1' if where == "n" else "[", 1))
    with pytest.raises(ResultError, match=r"result\.json"):
        render_leaderboard(tmp_path)


def test_the_committed_results_are_those_of_todays_suites(repo):
    """Their commands would go on with them; otherwise they ask for --overwrite in a fresh checkout."""
    found = {
        path: read_result(path) for path in (repo / "results/digits").glob("*/*/result.json") if "@" not in str(path)
    }
    assert len(found) > 8
    for path, stored in found.items():
        run = make_run(
            RunRequest.of(f"digits/{stored.model}", stored.suite, samples=stored.n, results=repo / "results")
        )
        assert run.store.run_id == stored.run_id, path


@pytest.mark.whole
def test_the_committed_leaderboard_is_current(repo):
    assert (repo / "leaderboard.md").read_text(encoding="utf-8") == render_leaderboard(repo / "results")
