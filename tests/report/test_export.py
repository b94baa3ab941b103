"""Results in the form of RobustBench's leaderboard: AutoAttack's figure only from AutoAttack, nothing made up."""

import json

import pytest

from robbench.core.errors import ResultError
from robbench.core.stats import wilson
from robbench.models.card import Registry
from robbench.report.export import _list_gaps, build_robustbench_entry, export_result
from robbench.results.places import locate_result
from robbench.results.schema import Accuracy, AttackResult, read_result
from support.evidence import write_evidence

FIELDS = [
    "link", "name", "authors", "additional_data", "number_forward_passes", "dataset", "venue", "architecture", "eps",
    "clean_acc", "reported", "autoattack_acc", "footnote", "unreliable",
]  # fmt: skip


def accuracy(k, n=10000):
    low, high = wilson(k, n)
    return Accuracy(value=k / n, low=low, high=high)


@pytest.fixture
def stored(repo):
    return read_result(repo / "results/cifar10/natural_resnet18/whitebox/result.json")


def attacked(result, suite, *kinds):
    attacks = [
        AttackResult(
            name=kind, robust_accuracy=accuracy(5000), forwards=0, backwards=0, seconds=0.0, config={"kind": kind},
            refuted=0, zero_gradient_share=0.0,
        )
        for kind in kinds
    ]  # fmt: skip
    changed = {"suite": suite, "attacks": attacks, "n": 10000, "robust_accuracy": accuracy(4925)}
    return result.model_copy(update=changed)


def test_a_committed_result_exports_with_all_fields(repo):
    text, notes = export_result(repo / "results/digits/at/whitebox", "robustbench", Registry.default())
    entry, stored = json.loads(text), read_result(repo / "results/digits/at/whitebox/result.json")
    assert list(entry) == FIELDS
    clean = f"{100 * stored.clean_accuracy.value:.2f}"
    assert (entry["dataset"], entry["eps"], entry["clean_acc"]) == ("digits", "0.2", clean)
    assert (entry["architecture"], entry["additional_data"], entry["number_forward_passes"]) == (
        "digits_convnet",
        False,
        1,
    )
    assert entry["autoattack_acc"] == entry["reported"] == entry["link"] == ""
    assert (
        f"{100 * stored.robust_accuracy.value:.2f} % of 899 images" in entry["footnote"]
        and "Not an AutoAttack evaluation" in entry["footnote"]
    )
    assert any("no leaderboard for digits" in note for note in notes)
    assert text == export_result(repo / "results/digits/at/whitebox/result.json", "robustbench", Registry.default())[0]


@pytest.mark.parametrize(
    ("suite", "kinds", "expected"),
    [
        ("autoattack", ["apgd", "apgd", "fab", "square"], "49.25"),
        ("autoattack", ["autoattack:standard"], "49.25"),
        ("autoattack", ["pgd"], ""),  # a file of that name that is something else
        ("whitebox", ["apgd", "fab", "square"], ""),
        ("autoattack-like", ["apgd", "fab", "square"], ""),
    ],
)
def test_only_autoattack_fills_its_field(stored, suite, kinds, expected):
    entry = build_robustbench_entry(attacked(stored, suite, *kinds), None)
    assert entry["autoattack_acc"] == expected
    assert ("Not an AutoAttack" in entry["footnote"]) is not bool(expected)
    assert "external" not in entry  # readers would take it for the robust accuracy


def test_a_result_on_levels_of_pixels_is_no_autoattack_evaluation(stored):
    result = attacked(stored, "autoattack", "apgd", "fab", "square")
    assert build_robustbench_entry(result, None)["autoattack_acc"] == "49.25"
    rounded = result.model_copy(update={"identity": result.identity | {"levels": 255}})
    entry = build_robustbench_entry(rounded, None)
    assert entry["autoattack_acc"] == "" and "255 levels" in entry["footnote"]
    assert "Not an AutoAttack evaluation" in entry["footnote"]
    assert any("with a target or levels, not every break counts" in note for note in _list_gaps(rounded, None))


def test_a_targeted_result_is_no_autoattack_evaluation(stored):
    result = attacked(stored, "autoattack", "apgd", "fab", "square")
    targeted = result.model_copy(update={"identity": result.identity | {"target": "next"}})
    entry = build_robustbench_entry(targeted, None)
    assert entry["autoattack_acc"] == "" and "Not an AutoAttack" in entry["footnote"]
    assert "only predictions of the target count as breaks (target next)" in entry["footnote"]
    assert "arget" not in build_robustbench_entry(result, None)["footnote"]


def test_what_is_not_known_stays_empty(stored, tmp_path):
    unknown = stored.model_copy(update={"identity": {}, "flags": {"randomized": "It rolls dice."}})
    folder = locate_result(tmp_path, write_evidence(tmp_path, unknown))
    text, notes = export_result(folder, "robustbench", Registry.default())
    entry = json.loads(text)
    assert (entry["architecture"], entry["additional_data"], entry["number_forward_passes"]) == ("", None, None)
    assert entry["unreliable"] is True and "Flags: randomized" in entry["footnote"]
    assert any("No card has the weights" in note for note in notes)
    assert any("256 images were measured" in note for note in notes)


def test_names_of_networks_are_the_fields(stored):
    identity = {"model": {"architecture": {"name": "wide_resnet", "args": {"depth": 28, "widen_factor": 10}}}}
    assert (
        build_robustbench_entry(stored.model_copy(update={"identity": identity}), None)["architecture"]
        == "WideResNet-28-10"
    )


def test_wrong_input_is_named(tmp_path):
    with pytest.raises(ResultError, match=r"No result at .*result\.json"):
        export_result(tmp_path, "robustbench", Registry.default())
    with pytest.raises(ResultError, match="Did you mean robustbench"):
        export_result(tmp_path, "robustbnch", Registry.default())
