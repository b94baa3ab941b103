"""`robbench table` and `robbench export` as a user meets them."""

import json
import re
import shutil
import subprocess
import sys

import pytest
from typer.testing import CliRunner

import robbench.evaluation.run
from robbench.commands.app import app
from robbench.papers.published import TABLES
from support.commands import run

pytestmark = pytest.mark.whole


@pytest.fixture
def mine(tmp_path, repo):
    """A registry whose one card claims a row of Seguin et al., Table 1, and has weights; an empty results tree."""
    card = (repo / "models/cifar10/st_resnet18.toml").read_text(encoding="utf-8")
    card = card.replace("shipped = false\n", "")
    card = re.split(r"\n\[(?:weights|trained)\]", card)[0] + f'\n\n[weights]\npath = "x"\nsha256 = "{"a" * 64}"\n'
    (tmp_path / "mine/cifar10").mkdir(parents=True)
    (tmp_path / "mine/cifar10/my_resnet18.toml").write_text(card, encoding="utf-8")
    (tmp_path / "results").mkdir()
    return tmp_path


def test_a_table_of_a_registry_of_ones_own(mine):
    shown = run("table", "seguin2021-1", "--models", "mine", cwd=mine).stdout
    assert "cifar10/my_resnet18" in shown and "94.5 ± 0.20" in shown
    assert "robbench eval -m cifar10/my_resnet18 --suite whitebox --models mine" in shown
    run("table", "seguin2021-1", "--models", "mine", "--format", "html", "--output", "page.html", cwd=mine)
    assert "cifar10/my_resnet18" in (mine / "page.html").read_text(encoding="utf-8")


def test_all_writes_every_table_and_notices_staleness(mine):
    run("table", "all", cwd=mine)
    folder = mine / "results/tables"
    first = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert sorted(first) == sorted(f"{name}.{ending}" for name in TABLES for ending in ("csv", "md"))
    run("table", "all", cwd=mine)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == first
    assert "up to date" in run("table", "all", "--check", cwd=mine).stdout
    (folder / "shafahi2019-6.md").write_text("something else")
    assert (
        "shafahi2019-6.md is stale: run `robbench table all`" in run("table", "all", "--check", cwd=mine, code=1).stderr
    )
    assert "No results in `results/`" in _board(mine), "tables are no results"


def _board(folder):
    run("leaderboard", "--output", "board.md", cwd=folder)
    return (folder / "board.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["table", "8"], "Unknown table '8'. Known: all, goibert2019"),
        (["table", "shafahi-5"], "Did you mean shafahi2019-5"),
        (["table", "seguin2021-2", "--format", "markdwn"], "Did you mean markdown"),
        (["table", "all", "--format", "csv"], "go with one table"),
        (["table", "seguin2021-2", "--check"], "--check goes with all"),
        (["table", "seguin2021-2", "--results", "nowhere"], "No results tree at nowhere"),
        (["export", "nowhere"], "No result at nowhere"),
        (["export", "results", "--format", "json"], "Known: robustbench"),
    ],
)
def test_wrong_input_exits_2_and_says_what_to_do(mine, args, message):
    assert message in run(*args, cwd=mine, code=2).stderr


def test_run_makes_what_is_missing_and_can_be_made(mine, monkeypatch):
    made = []
    monkeypatch.setattr(robbench.evaluation.run, "evaluate", lambda *args, **options: made.append((*args, options)))
    monkeypatch.chdir(mine)
    done = CliRunner().invoke(app, ["table", "seguin2021-1", "--run", "--models", "mine", "--samples", "8"])
    assert done.exit_code == 0, done.output
    mine_only = [call for call in made if call[0] == "cifar10/my_resnet18"]
    assert [(model, suite) for model, suite, _ in mine_only] == [("cifar10/my_resnet18", "whitebox")]
    options = mine_only[0][2]
    assert options["samples"] == 8 and options["overwrite"] is False and str(options["results"]) == "results"
    assert "wait for training" in done.output


def test_tables_come_without_torch(mine):
    for args in (["table", "seguin2021-2"], ["table", "all"]):
        code = f"import sys; sys.modules['torch'] = None; sys.argv = ['robbench', *{args}]\n"
        code += "from robbench.commands.app import app\n"
        subprocess.run([sys.executable, "-c", code + "app()"], check=True, cwd=mine, capture_output=True)


def test_the_export_command_prints_and_writes_the_same(mine, repo):
    shutil.copytree(repo / "results/digits/natural", mine / "results/digits/natural")
    done = run("export", "results/digits/natural/whitebox", cwd=mine)
    assert json.loads(done.stdout)["dataset"] == "digits" and "note: autoattack_acc is empty" in done.stderr
    run("export", "results/digits/natural/whitebox/result.json", "--output", "entry.json", cwd=mine)
    assert (mine / "entry.json").read_text(encoding="utf-8") == done.stdout
