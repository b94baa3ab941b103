"""The leaderboard: ranks, ties, groups, and bytes that only results determine."""

from pathlib import Path

import pytest

from robbench.errors import ResultError
from robbench.report.leaderboard import leaderboard, ranked, table
from robbench.stats import wilson
from robbench.store import Accuracy, AttackResult, ResultFile, ThreatResult, dump_result


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
    assert [(rank, r.model) for rank, r in ranked(group)] == [("1=", "a"), ("1=", "b"), ("1=", "c"), ("4", "d")]
    chain = [result("a", 500), result("b", 460), result("c", 420)]
    # b overlaps a, c overlaps b but not a: c does not ride along.
    assert [rank for rank, _ in ranked(chain)] == ["1=", "1=", "3"]


def test_groups_and_bytes(tmp_path):
    root = tmp_path / "results"
    put(root, result("natural", 20))
    put(root, result("at", 500, flags={"randomized": "It rolls dice."}))
    put(root, result("at", 300, eps="0.3", overrides={"eps": "0.3"}), "whitebox@abababab")
    put(root, result("at", 500, overrides={"seed": "1"}), "whitebox@cdcdcdcd")
    text = leaderboard(root)
    assert text == leaderboard(root)
    titles = [line for line in text.splitlines() if line.startswith("## ")]
    assert titles == [
        "## digits, Linf 0.2, suite whitebox",
        "## digits, Linf 0.2, suite whitebox (seed 1)",
        "## digits, Linf 0.3, suite whitebox",
    ]
    assert "[at](results/digits/at/whitebox/result.json)" in text
    assert "[at](results/digits/at/whitebox@abababab/result.json)" in text
    assert "- at, randomized: It rolls dice." in text
    assert text.index("[at]") < text.index("[natural]")
    frame = table([result("natural", 20)])
    assert frame.loc[0, "Worst case"].startswith("2.0 [")
    assert frame.loc[0, "Fwd + bwd per image"] == "3"


def test_a_model_without_some_attack_shows_a_dash():
    other = result("b", 100)
    renamed = other.model_copy(update={"attacks": [other.attacks[0].model_copy(update={"name": "APGD"})]})
    frame = table([result("a", 500), renamed])
    assert frame.loc[0, "APGD"] == "–" and frame.loc[1, "PGD"] == "–"


def test_an_empty_tree_says_what_to_do(tmp_path):
    assert "robbench eval" in leaderboard(tmp_path)


@pytest.mark.parametrize(("change", "where"), [('"n": 1000', "n"), ('"low"', "low"), ("{", "")])
def test_a_damaged_result_is_named(tmp_path, change, where):
    put(tmp_path, result("a", 10))
    path = tmp_path / "digits/a/whitebox/result.json"
    path.write_text(path.read_text().replace(change, '"x": 1' if where == "n" else "[", 1))
    with pytest.raises(ResultError, match=r"result\.json"):
        leaderboard(tmp_path)


def test_the_committed_leaderboard_is_current(repo):
    assert (repo / "leaderboard.md").read_text(encoding="utf-8") == leaderboard(repo / "results")
