"""Hostile text in every string of every file: no command obeys it, and none ends with a traceback."""

from __future__ import annotations

import copy
import csv
import io
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pandas as pd
import pytest
import tomlkit
from rich.table import Table

from robbench.core.errors import RobbenchError
from robbench.core.files import digest
from robbench.gate.baseline import read_baseline
from robbench.linear.record import LinearFile, read_linear, read_linear_files
from robbench.masking.compare import compare_attacks
from robbench.masking.record import SanityFile, read_sanity
from robbench.masking.stored import VerdictIndex, describe_subject, judge_measurements, read_verdict
from robbench.models.card import load_card
from robbench.report.console import SafeStream, make_console, protect_terminal
from robbench.report.escape import escape_control, escape_markdown, escape_spreadsheet, escape_tex
from robbench.report.linear import make_linear_rows
from robbench.report.sanity import print_sanity
from robbench.report.sheet import draw_sheet
from robbench.report.spread import build_spread, print_spreads
from robbench.report.sweep import build_sweep, print_sweep, write_sweep
from robbench.report.terminal import print_results
from robbench.results.consistency import derive_summary
from robbench.results.reader import read_results
from robbench.results.records import OUTCOMES, TIMING_COLUMNS, TIMINGS, pack_rows, read_rows
from robbench.results.run_files import read_description
from robbench.results.schema import ResultFile, dump_sealed, read_result, seal
from support.commands import run

CONTROL = "x\x1b[2J\x9b31m\x07\b\r\u202e\u2066\u200b\u2028\U000e0041\x00\n"
MARKUP = "=[/red]m$^$|<b>![i](http://e)`c`\\x"
HOSTILE = MARKUP + CONTROL + MARKUP
FREE_TABLES = ("flags", "overrides", "versions", "environment", "paper", "code", "figures")  # keys are text too
COLOUR = re.compile(r"\x1b\[[\d;]*m")
KEPT = ("model", "dataset", "suite", "weights", "data", "threat", "judge", "mode")  # or no command gets further
TERMINAL = {"COLUMNS": "80", "FORCE_COLOR": "1", "TERM": "xterm-256color"}


def assert_harmless(text: str) -> None:
    """Check that text holds no control character but line breaks and colours."""
    left = COLOUR.sub("", text)
    assert all(c.isprintable() or c == "\n" for c in left), [c for c in left if not c.isprintable() and c != "\n"]


def strings(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """List the paths of all strings in a JSON value. The path of a key of a table ends with None."""
    if isinstance(value, str):
        yield path
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        if path and path[-1] in FREE_TABLES:
            yield (*path, key, None)
        yield from strings(inner, (*path, key))


def put(value: Any, path: tuple[Any, ...], text: str) -> Any:
    """Copy a JSON value with another string at a path."""
    changed = copy.deepcopy(value)
    holder = changed
    is_key = path[-1] is None
    *way, last = path[:-1] if is_key else path
    for key in way:
        holder = holder[key]
    if is_key:
        holder[text] = holder.pop(last)
    else:
        holder[last] = text
    return changed


def poison(path: Path, dump: Callable[[Any], str], read: Callable[[Path], object], keep: tuple[str, ...] = ()) -> int:
    """Put hostile text into every string of a file that its reader takes it in. What it refuses, it refuses in words.

    Strings below a key of `keep` stay as they are: with another value, a command would not reach the others.
    """
    load = tomllib.loads if path.suffix == ".toml" else json.loads
    value = load(path.read_text())
    value.pop("sha256", None)  # `dump` makes it again
    taken = 0
    number = itertools.count()
    for place in sorted(strings(value), key=lambda p: (-len(p), p[-1] is None)):  # a key after what it holds
        if set(place) & set(keep):
            continue
        for text in (f"{MARKUP}{next(number)}{CONTROL}{MARKUP}", f"{MARKUP}{next(number)}", "m$^$"):
            before = path.read_text()
            try:
                changed = put(value, place, text)
                path.write_text(dump(changed))
                read(path)
            except RobbenchError:
                path.write_text(before)
            else:
                value, taken = changed, taken + 1
                break
    return taken


def write_sealed(fields: dict[str, Any]) -> str:
    """Return the text of a file whose digest is that of these fields."""
    return seal({name: value for name, value in fields.items() if name != "sha256"}).decode()


def poison_result(folder: Path, keep: tuple[str, ...]) -> tuple[ResultFile, pd.DataFrame]:
    """Put hostile text into a result. Then make its identity, records and summary agree again, or nothing prints it."""
    path = folder / "result.json"
    stored = json.loads(path.read_text()) | {"model": "evil", "flags": {"dead": "text"}}
    path.write_text(write_sealed(stored))
    names = [a["name"] for a in stored["attacks"]]
    rows = read_rows(folder / OUTCOMES)
    assert poison(path, write_sealed, read_result, (*keep, "selection")) > 30
    result = read_result(path)
    renamed = dict(zip(names, [a.name for a in result.attacks], strict=True))
    assert not set(names) & set(renamed.values())
    rows = rows.assign(attack=rows["attack"].map(renamed))
    identity = result.identity | {"attacks": [{"name": a.name, **a.config} for a in result.attacks]}
    result = derive_summary(result.model_copy(update={"identity": identity}), rows)
    path.write_bytes(dump_sealed(result))
    (folder / OUTCOMES).write_bytes(pack_rows(rows, result.run_id))
    (folder / TIMINGS).write_bytes(pack_rows(rows, result.run_id, TIMING_COLUMNS))
    return result, rows


def judge_again(file: SanityFile, result: ResultFile, rows: pd.DataFrame) -> SanityFile:
    """Make a sanity.json agree with the result of the suite again. Text that follows from nothing stays as it is."""
    described = {name: getattr(file, name) for name in ("acted", "seconds", "hardware", "versions", "date")}
    described |= describe_subject(result, file.n, "sanity", file.identity["probes"])
    measured = file.measurements.model_copy(update={"challenges": compare_attacks(result, rows)})
    return judge_measurements(described, measured)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A registry, a results tree, a baseline and an unfinished run with hostile text in every string."""
    repo, root = Path(__file__).resolve().parents[2], tmp_path_factory.mktemp("hostile")
    for name in ("whitebox", "sanity", "linear"):
        shutil.copytree(repo / "results/digits/at" / name, root / "results/digits/evil" / name)
    (root / "models/digits").mkdir(parents=True)
    card = root / "models/digits/evil.toml"
    shutil.copy(repo / "models/digits/at.toml", card)
    assert poison(card, tomlkit.dumps, load_card, ("dataset", "architecture", "weights", "recipe")) > 5
    shutil.copytree(repo / "models/weights/digits", root / "models/weights/digits")
    (root / "broken/digits").mkdir(parents=True)
    (root / "broken/digits/broken\x1b[31m.toml").write_bytes(b"\x00\xff\x1b[2J")
    folder = root / "results/digits/evil"
    poison_result(folder / "whitebox", KEPT)
    result, rows = poison_result(folder / "sanity", (*KEPT, "config"))  # or the attacks have no roles
    sanity = folder / "sanity/sanity.json"
    sanity.write_text(write_sealed(json.loads(sanity.read_text()) | {"model": "evil"}))
    assert poison(sanity, write_sealed, read_sanity, ("model", "dataset", "folder", "weights", "measured")) > 6
    (root / "poisoned").mkdir()
    shutil.copy(sanity, root / "poisoned/sanity.json")  # every string is hostile, so it does not follow from the result
    sanity.write_bytes(dump_sealed(judge_again(read_sanity(sanity), result, rows)))
    linear = folder / "linear/linear.json"
    stored = json.loads(linear.read_text()) | {"model": "evil", "flags": {"dead": "text"}}
    linear.write_text(write_sealed(stored))
    taken = poison(
        linear,
        lambda v: write_sealed(v | {"run_id": digest(v["identity"])}),
        lambda p: read_linear(p.parent),
        ("model", "dataset", "weights", "data", "run_id"),
    )
    assert taken > 8
    found = read_results(root / "results")
    assert not found.damaged and len(found.results) == 2, "their text would not be printed"
    assert not VerdictIndex(root / "results").list_damaged() and not read_linear_files(root / "results")[1]
    baseline = root / "baseline.json"
    runs = json.loads((repo / "baselines/digits.json").read_text())["runs"]
    baseline.write_text(json.dumps({"schema_version": 1, "runs": runs[:1]}))
    assert poison(baseline, json.dumps, read_baseline, ("samples",)) > 30
    description = json.loads((repo / "tests/data/run_example.json").read_text())
    partial = folder / "s/.partial"
    partial.mkdir(parents=True)
    (partial / "run.json").write_text(json.dumps(description))
    assert poison(partial / "run.json", json.dumps, read_description) > 20
    about = read_description(partial / "run.json")
    (partial / digest(about.identity)).mkdir()
    (partial / "run.json").rename(partial / digest(about.identity) / "run.json")
    return root


SUCCEED = [
    "list models --models broken", "show digits/evil", "show digits/evil --json", "runs", "runs --json",
    "leaderboard --output page.md", "trained --output trained.md", "table all", "table shafahi2019-5",
    "table audit --output audit.md",
    *(f"table shafahi2019-5 --format {kind}" for kind in ("markdown", "latex", "csv", "html")),
    "export results/digits/evil/whitebox", "baseline --result results/digits/evil/whitebox --out b.json",
    "check --baseline b.json --result results/digits/evil/whitebox --markdown m.md --junit j.xml",
    "check --baseline b.json --result results/digits/evil/whitebox --json",
    "figure accuracy-eps --dataset digits", "figure accuracy-steps --dataset digits",
    "figure per-class --dataset digits",
]  # fmt: skip
COMMANDS = [
    *SUCCEED, "show broken --models broken", "verify results/digits/evil/whitebox",
    "reproduce results/digits/evil/whitebox", "check --baseline baseline.json --result results/digits/evil/whitebox",
    "check --baseline baseline.json", "eval --resume", "figure shafahi2019-1 --dataset digits", "figure all --check",
]  # fmt: skip


def options(command: str) -> list[str]:
    takes_models = not command.startswith(("runs", "trained", "leaderboard", "eval --resume"))
    return [*command.split(), *(["--models", "models"] if takes_models else [])]


def test_no_command_obeys_text_from_files(tree: Path) -> None:
    done = {}
    for command in COMMANDS:
        done[command] = run(*options(command), cwd=tree, code=None, **TERMINAL)
        shown = done[command].stdout + done[command].stderr
        assert_harmless(shown)
        assert shown.strip() and "Usage:" not in shown, (command, shown)
    for command in SUCCEED:
        assert done[command].code == 0, (command, done[command].stderr)
    assert (
        "invalid card" in done["list models --models broken"].stdout
        and "natural" in done["list models --models broken"].stdout
    )
    json.loads(done["show digits/evil --json"].stdout)
    assert "m$^$" in COLOUR.sub("", done["list models --models broken"].stdout)
    shown = COLOUR.sub("", done["show digits/evil"].stdout)
    assert "m$^$" in shown and "\\u001b[2J" in shown and "damaged" not in shown
    leaderboard = (tree / "page.md").read_text() + (tree / "page-digits.md").read_text()
    assert "[/red]m" in leaderboard and " [2J" in leaderboard and "damaged" not in leaderboard.lower()
    for page in (*tree.glob("page*.md"), tree / "m.md", tree / "audit.md", *(tree / "results/tables").glob("*.md")):
        text = page.read_text()
        assert_harmless(text)
        assert "<b>" not in text and "![i](" not in text and not re.search(r"(?<!\\)\[i\]\(", text), page
    junit = (tree / "j.xml").read_text()
    assert_harmless(junit)
    names = [case.get("classname", "") for case in ElementTree.fromstring(junit).iter("testcase")]
    assert names and all("digits/evil" in name for name in names)
    for table in (tree / "results").rglob("*.csv"):
        for row in csv.reader(io.StringIO(table.read_text())):
            assert not any(cell.startswith(("=", "+", "@")) for cell in row), table
    assert "<b>" not in done["table shafahi2019-5 --format html"].stdout.replace("<br>", "")


def test_what_follows_a_run_obeys_no_text(tree: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    for key, value in TERMINAL.items():
        monkeypatch.setenv(key, value)
    folder = tree / "results/digits/evil"
    result = read_result(folder / "whitebox/result.json")
    sanity = read_sanity(tree / "poisoned/sanity.json")
    with protect_terminal():
        print_results([result], tree / "results")
        print_sanity(sanity, "")
        print_sanity(read_verdict(folder / "sanity/sanity.json"), "")
        print_spreads([build_spread(tree / "results", [result.model_copy(update={"overrides": {}})] * 2)])
        sweep = build_sweep(tree / "results", [result.model_copy(update={"overrides": {}})], clean=True)
        print_sweep(sweep)
        print(make_linear_rows([read_linear(folder / "linear")], tree / "results", None))
    assert_harmless("".join(capsys.readouterr()))
    table, _ = write_sweep(sweep, tree)
    heading = next(csv.reader(io.StringIO(table.read_text())))
    assert not any(cell.startswith("=") for cell in heading) and any("m$^$" in cell for cell in heading)
    assert draw_sheet(sanity, folder / "sanity/landscape.parquet")


def test_a_run_of_a_hostile_suite(tmp_path: Path) -> None:
    name = "[/red]m$^$ =|<b>"
    (tmp_path / "m$^$.toml").write_text(
        f"version = 1\ntitle = '[/red]'\n[threat]\ndigits = {{ norm = 'Linf', eps = '0.1' }}\n"
        f"[[attack]]\nname = '{name}'\nkind = 'fgsm'\n"
    )
    command = ("eval", "-m", "digits/at", "-s", "m$^$.toml", "--samples", 8, "--eps", "0,0.1,0.2")
    done = run(*command, cwd=tmp_path, COLUMNS="80")
    assert_harmless(done.stdout + done.stderr)
    done = run(*command, cwd=tmp_path, **TERMINAL)  # its progress bar moves the cursor, on stderr
    assert_harmless(done.stdout)
    assert "[/red]" in COLOUR.sub("", done.stdout)
    for bad in ("9" * 4000, "-" + "9" * 4000):
        (tmp_path / "s.toml").write_text(f"version = 1\n[[attack]]\nname = 'a'\nkind = 'pgd'\nsteps = {bad}\n")
        done = run("eval", "-m", "digits/at", "-s", "s.toml", "--samples", 8, "--eps", "0.1", cwd=tmp_path, code=2)
        assert "bits given" in done.stderr


@pytest.mark.parametrize("kind", ["result.json", "sanity.json", "linear.json", "baseline", "card", "outcomes"])
@pytest.mark.parametrize("content", [b"", b"\x00\xff\xfe\x80" * 50, b"[" * 5000, b'{"n": ' + b"9" * 4000 + b"}"])
def test_damaged_files_end_in_a_sentence(kind: str, content: bytes, tree: Path, tmp_path: Path) -> None:
    shutil.copytree(tree / "results/digits/evil", tmp_path / "results/digits/evil")
    shutil.copytree(tree / "models", tmp_path / "models")
    shutil.copy(tree / "baseline.json", tmp_path)
    folder = tmp_path / "results/digits/evil"
    place = {
        "result.json": folder / "whitebox/result.json", "sanity.json": folder / "sanity/sanity.json",
        "linear.json": folder / "linear/linear.json", "baseline": tmp_path / "baseline.json",
        "card": tmp_path / "models/digits/evil.toml", "outcomes": folder / "whitebox/outcomes.parquet",
    }[kind]  # fmt: skip
    place.write_bytes(content)
    commands = [
        "show digits/evil", "leaderboard", "table shafahi2019-5", "figure accuracy-steps --dataset digits",
        "figure accuracy-eps --dataset digits", "runs",
        "verify results/digits/evil/whitebox", "check --baseline baseline.json --result results/digits/evil/whitebox",
    ]  # fmt: skip
    readers = {
        "result.json": (0, 1, 3, 6, 7), "sanity.json": (0, 1), "linear.json": (3, 4), "baseline": (7,),
        "card": (0,), "outcomes": (0, 1, 3, 6, 7),
    }[kind]  # fmt: skip
    for number, command in enumerate(commands):
        done = run(*options(command), cwd=tmp_path, code=None, **TERMINAL)
        shown = done.stdout + done.stderr
        if command == "leaderboard":
            shown += (tmp_path / "leaderboard.md").read_text()
        assert_harmless(shown)
        assert done.code in (0, 1, 2), command
        if number in readers:
            shown = COLOUR.sub("", shown)
            assert place.name in shown, (command, shown)
            said = {0: "damaged", 1: "refuted: ", 2: place.name}[done.code]
            assert said in shown and (done.code != 1 or command.startswith("verify")), (command, done.code, shown)
        if command == "runs" and kind == "result.json":  # its narrow column splits the name
            assert "damaged" in shown


def identities(identity: dict[str, Any]) -> dict[str, Any]:
    """Seven identities that a baseline must not have."""
    return {
        "empty": {},
        "no threat": {k: v for k, v in identity.items() if k != "threat"},
        "radius": identity | {"threat": {"norm": "Linf", "eps": "8/0"}},
        "suite": identity | {"suite": "whitebox"},
        "model": identity | {"model": None},
        "attacks": identity | {"attacks": [{"kind": "pgd"}]},
        "weights": {k: v for k, v in identity.items() if k != "weights"},
    }


@pytest.mark.parametrize("what", [*identities({})])
def test_a_baseline_with_a_bad_identity_is_refused(what: str, repo: Path, tmp_path: Path) -> None:
    entry = json.loads((repo / "baselines/digits.json").read_text())["runs"][0]
    entry["identity"] = identities(entry["identity"])[what]
    (tmp_path / "b.json").write_text(json.dumps({"schema_version": 1, "runs": [entry]}))
    done = run("check", "--baseline", "b.json", "--result", repo / "results/digits/natural/quick", cwd=tmp_path, code=2)
    assert "b.json: runs.0.identity" in done.stderr and "robbench baseline" in done.stderr


@pytest.mark.parametrize("n", [0, -1, 10**30])
def test_a_result_of_no_images_is_refused(n: int, tree: Path, tmp_path: Path) -> None:
    for file, read in (("whitebox/result.json", read_result), ("sanity/sanity.json", read_sanity)):
        stored = json.loads((tree / "results/digits/evil" / file).read_text())
        (tmp_path / "f.json").write_text(json.dumps(stored | {"n": n}))
        with pytest.raises(RobbenchError, match=r"f\.json: "):
            read(tmp_path / "f.json")
    stored = json.loads((tree / "results/digits/evil/linear/linear.json").read_text())
    with pytest.raises(ValueError, match="n"):
        LinearFile.model_validate(stored | {"n": min(n, 0)})


def test_a_path_that_the_system_refuses_ends_in_a_sentence(tmp_path: Path) -> None:
    long = "a/" * 3000 + "b"
    for command in (
        ["show", "digits/at", "--results", long], ["runs", "--results", long], ["leaderboard", "--results", long],
        ["export", long], ["verify", long], ["reproduce", long], ["list", "models", "--models", long],
        ["check", "--baseline", long], ["eval", "-m", "digits/at", "-s", f"{long}.toml"],
        ["eval", "-m", f"file:{long}"],
        ["eval", "-m", "digits/at", "--samples", "2", "--results", long], ["table", "5", "--results", long],
        ["leaderboard", "--output", long], ["eval", "-m", "digits/at", "--data-dir", long],
    ):  # fmt: skip
        done = run(*command, cwd=tmp_path, code=None)
        assert done.code in (0, 2) and len(done.stderr) < 30_000, command


def test_a_terminal_of_few_characters_shows_escapes() -> None:
    command = [sys.executable, "-m", "robbench", "list", "attacks"]
    done = subprocess.run(command, capture_output=True, env={**os.environ, "PYTHONIOENCODING": "ascii"}, check=False)
    assert done.returncode == 0 and done.stdout.isascii()
    assert b"Traceback" not in done.stderr


def test_streams_and_consoles_show_escapes() -> None:
    out = io.StringIO()
    stream = SafeStream(out)
    print("a" + CONTROL, file=stream)
    stream.writelines(["\rbar \x1b[A", "\r50 %\n", "x", "\ry"])
    assert "\x1b" not in out.getvalue() and "\\u001b[2J" in out.getvalue() and "\\udb40\\udc41" in out.getvalue()
    assert "\rbar \\u001b[A\r50 %\nx\\u000dy" in out.getvalue()
    assert json.loads(escape_control(json.dumps("\x9b\u202e\U000e0041", ensure_ascii=False))) == "\x9b\u202e\U000e0041"
    before = out.getvalue()
    stream.write("\x1b[0m")
    assert out.getvalue() == before, "a reset of colours, which Ray writes at its end, is not shown as text"
    shown = io.StringIO()
    console = make_console(file=SafeStream(shown), force_terminal=True, color_system="standard")
    console.print(HOSTILE, style="red")
    console.note(HOSTILE)
    assert "\x1b[31m" in shown.getvalue() and "[/red]" in shown.getvalue()
    assert_harmless(shown.getvalue())
    page = io.StringIO()
    view = Table()
    for _ in range(2):
        view.add_column("a")
    view.add_row("\x1b\x1b", "1")
    make_console(file=page).print(view)
    assert "\\u001b\\u001b" in page.getvalue(), "escapes count in the width of columns"


def test_text_is_escaped_for_every_format() -> None:
    for number in ("-1", "-0.5", "12", "-1.5e-05", "+3.1"):
        assert escape_spreadsheet(number) == number
    for formula in ("=1+1", "+cmd", "-2+3", "@x", "\t=1", "\r\n=1", "\u200b=1", "＝1", "-1\n=2"):
        assert escape_spreadsheet(formula).startswith("'")
    assert escape_markdown("[a]: http://e") == r"[a\]: http://e" and escape_markdown("![i](e)") == r"![i\](e)"
    assert "*" not in escape_tex("*").replace("{*}", "")
