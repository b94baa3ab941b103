"""What README.md and docs/commands.md promise: commands and code run, numbers are those of the committed results."""

import re
import shlex
import shutil
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

from robbench.attacks import ATTACKS
from robbench.commands.app import app
from robbench.report.leaderboard import format_percent, format_with_interval, rank_results
from robbench.results.reader import read_results
from robbench.suite import load_suite

pytestmark = pytest.mark.whole

# Left to other tests or to a person: they need a network, other data, or write into the registry.
ELSEWHERE = (
    "robbench data fetch", "robbench train", "robbench eval --model cifar10/", "robbench eval --model hf:",
    "robbench eval --model robustbench:", "robbench eval --model mine:", "robbench eval --model my_net:",
    "robbench sanity my_net:", "robbench sanity digits/ls095_sigma03 --act",
    "make ", "pip ", "export ", "robbench eval --executor ray",
)  # fmt: skip


COMMANDS = (
    "eval", "list", "show", "train", "data", "fetch", "leaderboard", "table", "export", "measure", "figure",
    "verify", "baseline", "check", "sanity", "runs", "reproduce", "plan", "certify",
)  # fmt: skip


PAGES = ("README.md", "docs/commands.md")


def blocks(repo, language):
    text = "".join((repo / page).read_text(encoding="utf-8") for page in PAGES)
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def commands(repo):
    """List the commands of all pages, each once."""
    lines = [line.split("  #")[0].strip() for block in blocks(repo, "console") for line in block.splitlines()]
    return list(dict.fromkeys(line for line in lines if line))


def test_the_commands_run(repo, tmp_path, monkeypatch):
    """The commands run, and what they write is ignored by git."""
    ran = 0
    monkeypatch.chdir(tmp_path)
    assert "export ROBBENCH_RESULTS=mine" in commands(repo)
    monkeypatch.setenv("ROBBENCH_RESULTS", "mine")
    shutil.copy(repo / ".gitignore", tmp_path)
    shutil.copy(repo / "models/weights/digits/natural.safetensors", tmp_path / "mine.safetensors")
    for line in sorted(commands(repo), key=lambda line: line == "robbench report"):  # of what the others made
        if line.startswith(ELSEWHERE):
            continue
        words = shlex.split(line)
        assert words[0] == "robbench", line
        if words[1] in ("eval", "baseline", "sanity", "reproduce"):
            words = [w for w in words if w not in ("--samples", "200", "300")] + ["--samples", "8"]
        done = CliRunner().invoke(app, words[1:])  # in this process: torch is imported once
        assert done.exit_code == 0, (line, done.output, done.exception)
        ran += 1
    assert ran >= 5
    for command in (["init", "-q"], ["add", ".gitignore", "mine.safetensors"]):
        subprocess.run(["git", *command], check=True)
    status = ["git", "status", "--porcelain", "--untracked-files=all"]
    written = subprocess.run(status, capture_output=True, text=True, check=True).stdout.splitlines()
    assert {line[:2] for line in written} == {"A "} and len(written) == 2, written
    assert (tmp_path / "mine/digits/at/whitebox/result.json").exists()


def test_every_option_named_exists(repo):
    for line in commands(repo):
        words = shlex.split(line)
        if words[0] != "robbench":
            continue
        command = [w for w in words[1:3] if w in COMMANDS]
        done = CliRunner().invoke(app, [*command, "--help"])
        for option in (w for w in words if w.startswith("--")):
            assert option in done.stdout, line


def test_the_code_runs(repo, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10)).eval()
    images = torch.rand(12, 1, 8, 8)
    for block in blocks(repo, "python"):
        exec(block, {"model": model, "images": images, "labels": model(images).argmax(1)})
    assert "value=" in capsys.readouterr().out
    assert list((tmp_path / "mine" / "custom" / "my-net").glob("whitebox@*/result.json"))


def test_the_table_is_the_committed_one(repo):
    text = (repo / "README.md").read_text(encoding="utf-8")
    table = text.split("<!-- table: digits whitebox -->")[1].split("<!-- end -->")[0]
    shown = [[c.strip() for c in line.strip("| ").split("|")] for line in table.strip().splitlines()[2:]]
    models = {row[0] for row in shown}
    makefile = (repo / "Makefile").read_text(encoding="utf-8")
    demo = re.search(r"^DEMO *:= *(.*)$", makefile, flags=re.MULTILINE)[1].split()
    assert models == {name.removeprefix("digits/") for name in demo}
    stored = [
        r
        for r in read_results(repo / "results").results
        if r.dataset == "digits" and r.suite == "whitebox" and not r.overrides and r.model in models
    ]
    expected = [
        [
            r.model,
            format_percent(r.clean_accuracy),
            *[format_percent(a.robust_accuracy) for a in r.attacks],
            format_with_interval(r.robust_accuracy),
        ]
        for _, r in rank_results(stored)
    ]
    assert shown == expected


@pytest.mark.parametrize(
    "name",
    [
        "README.md",
        "CONTRIBUTING.md",
        "docs/design.md",
        "docs/commands.md",
        "docs/files.md",
        "docs/models.md",
        "docs/tables.md",
        "docs/figures.md",
        "docs/gate.md",
        "docs/tutorial.md",
    ],
)
def test_links_lead_somewhere(repo, name):
    page = repo / name
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), (name, target)


def test_the_readme_is_short(repo):
    """The README is a front page. What does not fit goes to docs/."""
    assert len((repo / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_the_demo_installs_no_extras_and_the_tests_install_all(repo, tmp_path):
    for name in ("Makefile", "pyproject.toml"):
        (tmp_path / name).write_bytes((repo / name).read_bytes())
    done = {}
    for goal in ("demo", "lint"):
        command = ["make", "--dry-run", f"PYTHON={sys.executable}", goal]
        done[goal] = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert "pip install" in done["demo"] and "[" not in done["demo"].split("pip install")[1].splitlines()[0]
    assert done["demo"].count("pip install") == 1 and "'.[all,dev]'" in done["lint"]


def test_the_page_of_commands_names_every_attack_and_its_suite_can_be_loaded(repo, tmp_path):
    page = (repo / "docs/commands.md").read_text()
    for kind in ATTACKS:
        assert f"`{kind}`" in page, kind
    (text,) = re.findall(r"```toml\n(.*?)```", page, re.DOTALL)
    (tmp_path / "my.toml").write_text(text)
    suite = load_suite(tmp_path / "my.toml")
    assert [a.kind for a in suite.stages("digits")] == ["relax", "brief"]
