"""--levels, --target and --surrogate on every command that measures, and the gate that measures them again."""

import json

import pytest

from robbench.evaluation.options import Options
from robbench.gate.baseline import read_baseline
from robbench.gate.measure import measure_entry_again
from robbench.results.schema import read_result
from support.commands import run
from support.stored import write_transfer_suite

QUICK = ("-m", "digits/at", "--samples", 12, "-s", "fast")


def test_a_run_says_its_levels_and_can_be_verified(tmp_path):
    said = run("eval", *QUICK, "--levels", 255, "--save-adversarials", "--results", tmp_path)
    assert "255 levels" in said.stdout + said.stderr
    (file,) = tmp_path.glob("digits/at/*/result.json")
    assert read_result(file).identity["levels"] == 255
    assert ", 255 levels" in said.stdout
    assert run("verify", file).code == 0


def test_a_plan_is_of_the_run_with_levels_and_target(tmp_path):
    said = run("plan", *QUICK, "--levels", 255, "--target", "next", "--pilot", 12, "--results", tmp_path, "--json")
    (plan,) = json.loads(said.stdout)["plans"]
    assert "target next" in plan["title"] and "255 levels" in plan["title"]


def test_the_sanity_checks_take_levels(tmp_path):
    said = run("sanity", "digits/at", "--samples", 12, "--levels", 255, "--results", tmp_path, "--json")
    assert json.loads(said.stdout)["measured"]["levels"] == 255


@pytest.mark.parametrize("value", ["0", "1024"])
def test_other_levels_are_a_sentence(value, tmp_path):
    said = run("eval", *QUICK, "--levels", value, "--results", tmp_path, code=2)
    assert "levels: " in said.stderr and "allowed" in said.stderr


def test_the_gate_measures_levels_target_and_surrogate_again(tmp_path):
    out = tmp_path / "b.json"
    run("baseline", *QUICK, "--levels", 255, "--target", "next", "--out", out)
    (entry,) = read_baseline(out).runs
    assert (entry.identity["levels"], entry.identity["target"]) == (255, "next")
    assert run("check", "--baseline", out).code == 0
    suite = write_transfer_suite(tmp_path)
    run("baseline", "-m", "digits/at", "--samples", 12, "-s", suite, "--surrogate", "digits/trades", "--out", out)
    (entry,) = read_baseline(out).runs
    assert entry.surrogate == entry.identity["attacks"][0]["surrogate"] == "digits/trades"
    assert run("check", "--baseline", out).code == 0
    again = measure_entry_again(entry, Options(results=tmp_path / "again"))
    assert again.identity == entry.identity and again.surrogate == entry.surrogate


def test_a_surrogate_of_a_source_is_loaded_only_if_it_is_named(tmp_path):
    out, suite = tmp_path / "b.json", write_transfer_suite(tmp_path)
    source = "support.models:small"
    said = run("baseline", "-m", "digits/at", "--samples", 12, "-s", suite, "--surrogate", source, "--out", out)
    assert f"--surrogate {source}" in said.stdout, "the command that is printed runs"
    assert f"name it, --surrogate {source}" in run("check", "--baseline", out, code=2).stderr
    assert run("check", "--baseline", out, "--surrogate", source).code == 0


@pytest.mark.parametrize("args", [("eval",), ("plan",), ("baseline", "--out", "b.json")])
def test_a_surrogate_that_no_attack_uses_is_refused(tmp_path, args):
    said = run(*args, *QUICK, "--surrogate", "digits/none", cwd=tmp_path, code=2)
    assert "digits/none given, but no transfer attack runs in suite 'fast'" in said.stderr
    assert not list(tmp_path.glob("**/*.json"))


def test_a_check_refuses_a_surrogate_that_no_entry_uses(tmp_path):
    """Where some entries have transfers and others none, those alone take it."""
    out, suite = tmp_path / "b.json", write_transfer_suite(tmp_path)
    run("baseline", *QUICK, "--out", out)
    said = run("check", "--baseline", out, "--surrogate", "digits/none", code=2)
    assert "digits/none given, but no attack of the baseline is a transfer" in said.stderr
    (plain,) = read_baseline(out).runs
    run("baseline", "-m", "digits/at", "--samples", 12, "-s", suite, "--out", out)
    (transfer,) = read_baseline(out).runs
    assert transfer.has_transfer and not plain.has_transfer
    again = measure_entry_again(plain, Options(results=tmp_path / "again", surrogate="digits/none"))
    assert again.identity == plain.identity
