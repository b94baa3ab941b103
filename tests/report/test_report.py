"""The leaderboard: ranks, ties, groups, and bytes that only results determine."""

from pathlib import Path

import pytest

from robbench.commands.pages import leaderboard
from robbench.core.errors import StorageError
from robbench.core.stats import wilson
from robbench.evaluation.request import RunRequest
from robbench.evaluation.run import make_run
from robbench.models.card import Registry
from robbench.report.leaderboard import build_group_table, compute_overestimation, rank_results
from robbench.report.leaderboard_pages import PAGE, render_leaderboard
from robbench.results.places import locate_result
from robbench.results.schema import Accuracy, AttackResult, ResultFile, ThreatResult, read_result
from support.evidence import write_evidence
from support.leaderboard import read_leaderboard


def accuracy(k, n=1000):
    low, high = wilson(k, n)
    return Accuracy(value=k / n, low=low, high=high)


def result(model, robust, dataset="cifar10", eps="0.2", **changed):
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


def put(root: Path, r: ResultFile) -> ResultFile:
    """Store a result with the counts of another one; its only attack leaves the worst case."""
    attacks = [a.model_copy(update={"robust_accuracy": r.robust_accuracy}) for a in r.attacks]
    return write_evidence(root, r.model_copy(update={"attacks": attacks}))


def test_overlapping_intervals_are_ties_with_the_best_of_the_rank():
    group = [result("d", 100), result("b", 490), result("a", 500), result("c", 440)]
    # 500 reaches down to 469; 490 and 440's upper end 471 overlap it; 100 does not.
    assert [(rank, r.model) for rank, r in rank_results(group)] == [("1=", "a"), ("1=", "b"), ("1=", "c"), ("4", "d")]
    chain = [result("a", 500), result("b", 460), result("c", 420)]
    # b overlaps a, c overlaps b but not a: c does not ride along.
    assert [rank for rank, _ in rank_results(chain)] == ["1=", "1=", "3"]


def of(root: Path, model: str, robust: list[bool], **changed) -> ResultFile:
    """Store a result by which images are robust."""
    return write_evidence(root, result(model, 0, **changed), {"PGD": ["robust" if ok else "broken" for ok in robust]})


def test_a_result_at_chance_has_no_rank():
    lost, weak = result("lost", 0, flags={"chance": "At chance."}), result("weak", 0)
    assert [(rank, r.model) for rank, r in rank_results([lost])] == [("–", "lost")]
    assert [(rank, r.model) for rank, r in rank_results([lost, weak])] == [("1", "weak"), ("–", "lost")]
    (row,) = build_group_table([lost])
    assert row["Rank"] == "–"


def test_ties_are_what_the_same_images_do_not_tell_apart(tmp_path):
    """Seven images that only one withstands, of 1000: far inside the intervals, p = 1/64."""
    good = [True] * 500 + [False] * 500
    worse = [False] * 7 + good[7:]
    mixed = [False] * 10 + good[10:500] + [True] * 6 + good[506:]  # 10 against 6 of 1000: p = 0.45
    group = [of(tmp_path, "good", good), of(tmp_path, "worse", worse), of(tmp_path, "mixed", mixed)]
    assert [(rank, r.model) for rank, r in rank_results(group, tmp_path)] == [
        ("1=", "good"),
        ("1=", "mixed"),
        ("3", "worse"),
    ]
    assert [rank for rank, _ in rank_results(group)] == ["1=", "1=", "1="]  # intervals cannot tell


@pytest.mark.parametrize("case", ["other data", "no records"])
def test_without_common_images_intervals_decide(tmp_path, case):
    good = [True] * 500 + [False] * 500
    worse = [False] * 7 + good[7:]
    data = {"data": "other"} if case == "other data" else {}
    first, second = of(tmp_path, "good", good), of(tmp_path, "worse", worse, identity=data)
    if case == "no records":
        (locate_result(tmp_path, second) / "outcomes.parquet").unlink()
    assert [rank for rank, _ in rank_results([first, second], tmp_path)] == ["1=", "1="]


def test_fewer_images_are_compared_where_they_are_common_and_by_intervals(tmp_path):
    good = of(tmp_path, "good", [True] * 500 + [False] * 400 + [True] * 50 + [False] * 50)
    # p = 1/64 on the common images, and overlapping intervals
    part = of(tmp_path, "part", [False] * 7 + [True] * 493 + [False] * 400)
    assert [(rank, r.model) for rank, r in rank_results([good, part], tmp_path)] == [("1", "good"), ("2", "part")]
    # p = 1/16 on five common images, and intervals that do not overlap
    few = of(tmp_path, "few", [False] * 5)
    assert [rank for rank, _ in rank_results([good, few], tmp_path)] == ["1", "2"]
    # neither tells them apart
    similar = of(tmp_path, "similar", [True] * 500 + [False] * 400)
    assert [rank for rank, _ in rank_results([good, similar], tmp_path)] == ["1=", "1="]
    # worse where it can be compared, better by its other images: the order is not sure
    odd = of(tmp_path, "odd", [False] * 7 + [True] * 493 + [False] * 390)
    assert [(rank, r.model) for rank, r in rank_results([good, odd], tmp_path)] == [("1=", "odd"), ("1=", "good")]


def test_a_paired_test_can_tie_what_intervals_tell_apart(tmp_path):
    """McNemar looks at the images that differ; a tie is no statement that two models are equally good."""
    group = [of(tmp_path, "all", [True] * 5), of(tmp_path, "none", [False] * 5)]  # p = 1/16
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
    larger = put(root, result("at", 300, eps="0.3", overrides={"eps": "0.3"}))
    put(root, result("at", 500, overrides={"seed": "1"}))
    text = read_leaderboard(root)
    assert text == read_leaderboard(root)
    titles = [line for line in text.splitlines() if line.startswith("## ")]
    assert titles == [
        "## cifar10, Linf 0.2",
        "## cifar10, Linf 0.3",
        "## cifar10, Linf 0.2, suite whitebox",
        "## cifar10, Linf 0.2, suite whitebox (seed 1)",
        "## cifar10, Linf 0.3, suite whitebox",
    ]
    assert "[at](at/whitebox/result.json)" in text
    assert f"[at](at/whitebox@{larger.run_id[:8]}/result.json)" in text
    assert "- at, randomized: It rolls dice." in text
    assert text.index("[at]") < text.index("[natural]")
    rows = build_group_table([result("natural", 20)])
    assert rows[0]["Worst case"].startswith("2.0 [")
    assert rows[0]["Fwd + bwd per image"] == "3"


def test_a_model_without_some_attack_shows_a_dash():
    other = result("b", 100)
    renamed = other.model_copy(update={"attacks": [other.attacks[0].model_copy(update={"name": "APGD"})]})
    rows = build_group_table([result("a", 500), renamed])
    assert rows[0]["APGD"] == "–" and rows[1]["PGD"] == "–"


def test_names_and_flags_are_no_markup(tmp_path):
    root = tmp_path / "results"
    put(root, result("a|b<i>(c)", 20, flags={"x<script>": "`y` | [z](w)\n# n"}))
    text = read_leaderboard(root)
    assert r"[a\|b&lt;i&gt;(c)](a%7Cb%3Ci%3E%28c%29/whitebox/result.json)" in text
    assert r"x&lt;script&gt;: \`y\` \| [z\](w) # n" in text and "<script" not in text


def test_an_empty_tree_says_what_to_do(tmp_path):
    assert "robbench eval" in read_leaderboard(tmp_path)


@pytest.mark.parametrize("change", [('"n": 1000', '"n": 999'), ('"low"', '"x"'), ("{", "[")])
def test_a_damaged_result_is_named_and_in_no_table(tmp_path, change):
    put(tmp_path, result("a", 10))
    put(tmp_path, result("sound", 10))
    path = tmp_path / "cifar10/a/whitebox/result.json"
    path.write_text(path.read_text().replace(*change, 1))
    text = read_leaderboard(tmp_path)
    assert "- cifar10/a/whitebox: damaged: cifar10/a/whitebox/result.json" in text
    assert "| [sound]" in text and "| [a]" not in text and str(tmp_path) not in text


def test_the_committed_results_are_those_of_todays_suites(repo):
    """Their commands would go on with them; otherwise they ask for --overwrite in a fresh checkout."""
    found = {
        path: read_result(path) for path in (repo / "results/digits").glob("*/*/result.json") if "@" not in str(path)
    }
    registry = Registry.default()
    found = {p: r for p, r in found.items() if registry.find(f"digits/{r.model}").card.shipped}
    assert len(found) > 8
    for path, stored in found.items():
        run = make_run(
            RunRequest.of(f"digits/{stored.model}", stored.suite, samples=stored.n, results=repo / "results")
        )
        assert run.store.run_id == stored.run_id, path


@pytest.mark.whole
def test_the_committed_leaderboard_is_current(repo):
    pages = render_leaderboard(repo / "results", repo / PAGE)
    assert len(pages) == 4
    for page, text in pages.items():
        assert page.read_text(encoding="utf-8") == text, page
    first = pages[repo / PAGE].splitlines()
    assert max(map(len, first)) <= 100, "nobody scrolls sideways"


def render(root: Path, beside: bool = False) -> dict[str, str]:
    """Make the pages of a tree, with places relative to the folder of the first page."""
    pages = render_leaderboard(root, root.parent / PAGE, beside)
    return {str(place.relative_to(root.parent)): text for place, text in pages.items()}


def list_rows(text: str) -> list[list[str]]:
    """List the cells of the tables of a page, without headings."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [
        [cell.strip() for cell in line.strip("|").split("| ")] for line in lines if not line.startswith(("| #", "| :"))
    ]


def test_the_first_page_has_the_worst_case_over_all_suites(tmp_path):
    """Two suites break different images; the row counts both.

    Seven images that only `whole` withstands, of 100: within the intervals, p = 1/64.
    """
    root = tmp_path / "results"
    of(root, "split", [False] * 21 + [True] * 79, n=100)
    of(root, "split", [True] * 80 + [False] * 20, n=100, suite="fast", date="2026-03-02T03:04:05+00:00")
    of(root, "whole", [False] * 21 + [True] * 59 + [False] * 13 + [True] * 7, n=100)
    pages = render(root)
    assert list(pages) == ["leaderboard.md", "results/cifar10/leaderboard.md"]
    low, high = (f"{100 * value:.1f}" for value in wilson(59, 100))
    assert list_rows(pages["leaderboard.md"]) == [
        ["1", "[whole][1]", "100.0", "66.0 [56.3, 74.5]", "whitebox", "unchecked", "100", "2026-01"],
        ["2", "[split][2]", "100.0", f"59.0 [{low}, {high}]", "whitebox +20", "unchecked", "100", "2026-03"],
    ]
    assert "- split: whitebox, and 20 more images by fast." in pages["leaderboard.md"]
    assert "[1]: results/cifar10/whole/whitebox/result.json\n" in pages["leaderboard.md"]
    assert "](results/cifar10/leaderboard.md)" in pages["leaderboard.md"]
    assert "](../../leaderboard.md)" in pages["results/cifar10/leaderboard.md"]


def test_curves_over_radii_do_not_fill_the_first_page(tmp_path):
    """What `quick` and `sanity` alone measured under another threat than theirs is in the details."""
    root = tmp_path / "results"
    for suite, eps, changed in (
        ("quick", "0.2", {}),
        ("quick", "0.1", {"eps": "0.1"}),
        ("sanity", "0.15", {"eps": "0.15"}),
    ):
        of(root, "a", [True] * 9 + [False], n=10, suite=suite, eps=eps, overrides=changed)
    of(root, "b", [True] * 9 + [False], n=10, eps="0.3", overrides={"eps": "0.3"})
    first, details = render(root).values()
    titles = [line for line in first.splitlines() if line.startswith("## ")]
    assert titles == ["## cifar10, Linf 0.2", "## cifar10, Linf 0.3", "## Other threats"]
    assert "- cifar10, Linf 0.1\n- cifar10, Linf 0.15\n" in first
    assert "## cifar10, Linf 0.1, suite quick" in details and "## cifar10, Linf 0.15, suite sanity" in details


def test_details_lie_beside_a_page_elsewhere(tmp_path):
    root = tmp_path / "results"
    put(root, result("a", 20))
    put(root, result("b", 20, dataset="mnist"))
    pages = render(root, beside=True)
    assert list(pages) == ["leaderboard.md", "leaderboard-cifar10.md", "leaderboard-mnist.md"]
    assert "](leaderboard-mnist.md)" in pages["leaderboard.md"]
    assert "[b](results/mnist/b/whitebox/result.json)" in pages["leaderboard-mnist.md"]
    assert "[a]" not in pages["leaderboard-mnist.md"]


def test_details_of_damaged_results_alone_keep_no_old_number(tmp_path):
    root = tmp_path / "results"
    put(root, result("a", 20))
    (root / "cifar10/a/whitebox/result.json").write_text("{")
    details = render(root)["results/cifar10/leaderboard.md"]
    assert "All results are damaged." in details and "## " not in details


def test_details_are_not_written_through_a_link(tmp_path, monkeypatch):
    """A tree may come from somebody else."""
    root, other = tmp_path / "results", tmp_path / "other.md"
    put(root, result("a", 20))
    other.write_text("precious")
    (root / "cifar10" / PAGE).symlink_to(other)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StorageError, match="is a link"):
        leaderboard(results=Path("results"))
    assert other.read_text() == "precious" and not Path(PAGE).exists()
    leaderboard(results=Path("results"), output=Path("mine.md"))
    assert Path("mine-cifar10.md").exists()
