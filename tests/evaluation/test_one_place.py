"""A run has one identity and one folder: in every spelling of its options, and in trees of older versions."""

import json
import shutil

import pytest

import robbench
from robbench.core.numbers import parse_threat
from robbench.report.leaderboard import group_results
from robbench.results.places import locate_result
from robbench.results.reader import read_results
from robbench.results.run_files import find_runs
from support.commands import run
from support.leaderboard import read_leaderboard
from support.stored import TWO_ATTACKS


@pytest.fixture
def call(problem, tmp_path):
    """Return a function that evaluates the small model with a suite that has a threat of its own."""
    model, x, y = problem
    suite = tmp_path / "s.toml"
    suite.write_text(TWO_ATTACKS.replace("MODE", "full") + '\n[threat.custom]\nnorm = "Linf"\neps = "0.05"\n')
    given = {"x": x, "y": y, "name": "small", "results": tmp_path / "r"}
    return lambda **changes: robbench.evaluate(model, suite, **(given | changes))


def names(root):
    return sorted(p.name for p in (root / "custom/small").iterdir())


@pytest.mark.parametrize(
    "spelling",
    [{"eps": e} for e in (0.05, "0.05", "1/20", "0.050", "5e-2", "51/1020")]
    + [{"norm": "Linf", "eps": 0.05}, {"seed": 0}, {"sample_seed": None}, {"samples": 60}],
    ids=str,
)
def test_options_that_repeat_the_suites_own_values_make_no_other_run(call, spelling, tmp_path):
    before = call()
    files = {p: p.read_bytes() for p in (tmp_path / "r/custom").rglob("*.*")}
    again = call(**spelling)
    assert again.run_id == before.run_id and again.overrides == {}
    assert {p: p.read_bytes() for p in (tmp_path / "r/custom").rglob("*.*")} == files, "nothing was made again"


def test_one_radius_in_two_spellings_is_one_run(call, tmp_path):
    results = [*call(eps=["1/8", 0.125, "0.1250"]), call(eps="1/8", norm="Linf")]
    assert {json.dumps(r.overrides) for r in results} == {'{"eps": "0.125"}'}
    assert names(tmp_path / "r") == [f"s@{results[0].run_id[:8]}"]
    long = call(eps="0.12345678901")
    assert parse_threat("Linf", long.overrides["eps"]).eps * 10**11 == 12345678901, "no digit is lost"
    other = call(eps=0.05, norm="L2")
    assert other.overrides == {"norm": "L2", "eps": "0.05"}, "a radius in another norm is another threat"


def test_a_run_stays_where_it_is_when_the_suite_takes_its_radius(call, tmp_path):
    before = call(eps=0.1)
    suite = tmp_path / "s.toml"
    suite.write_text(suite.read_text().replace('"0.05"', '"0.1"'))
    again = call()
    assert (again.run_id, again.date) == (before.run_id, before.date)
    assert names(tmp_path / "r") == [f"s@{before.run_id[:8]}"]
    more = call(save_adversarials=True)
    assert more.overrides == {} and locate_result(tmp_path / "r", more).name == f"s@{before.run_id[:8]}"


@pytest.mark.parametrize("more", ["plain", "second", "equal"])
def test_of_a_run_in_two_folders_the_one_with_more_images_counts(call, tmp_path, more):
    root = tmp_path / "r"
    small = call(samples=20)
    plain, second = root / "custom/small/s", root / f"custom/small/s@{small.run_id[:8]}"
    shutil.copytree(plain, second)
    if more != "equal":
        call()
    if more == "second":
        plain.rename(tmp_path / "s")
        second.rename(plain)
        (tmp_path / "s").rename(second)
    counts = second if more == "second" else plain
    (kept,) = read_results(root).results
    assert kept.n == (20 if more == "equal" else 60) and locate_result(root, kept) == counts
    notes = {r.folder: r.note for r in find_runs(root)}
    other = plain if counts == second else second
    assert notes == {counts: "", other: f"the same run as {counts.name}, which counts"}
    assert read_leaderboard(root).count("| [small](") == 1
    again = call()
    assert again.n == 60 and read_results(root).results[0].n == 60
    assert locate_result(root, again) == counts, "a run goes on where it counts"


def test_groups_list_a_run_once_and_two_names_of_a_model_twice(call, tmp_path):
    first, again = call(), call(samples=20)
    other = call(name="copy")
    assert other.run_id == first.run_id
    ((_, members),) = group_results([again, first, other, first])
    assert [(r.model, r.n) for r in members] == [("small", 60), ("copy", 60)]


@pytest.mark.whole
def test_show_lists_a_run_once(tmp_path):
    args = ["eval", "-m", "digits/natural", "-s", "quick", "--samples", 10]
    run(*args, cwd=tmp_path)
    run(*args, "--eps", "0.20", "--seed", 0, cwd=tmp_path)
    folder = tmp_path / "results/digits/natural"
    assert [p.name for p in folder.iterdir()] == ["quick"]
    (result,) = read_results(tmp_path / "results").results
    shutil.copytree(folder / "quick", folder / f"quick@{result.run_id[:8]}")
    shown = run("show", "digits/natural", cwd=tmp_path).stdout
    assert shown.count("│ natural") == 1 and "1=" not in shown
    assert len(json.loads(run("show", "digits/natural", "--json", cwd=tmp_path).stdout)["results"]) == 1
