"""The structure of package and tests: imports point down only, results are read without torch, no test is imported."""

import ast
import functools
import re
import subprocess
import sys

import pytest

from robbench.core.version import PACKAGE

# Lower layers first. A room may import from lower layers, and from its own as long as no circle comes of it.
LAYERS = [
    {"core"},
    {"data", "models", "attacks", "suite", "classifier"},
    {"engine", "results"},
    {"evaluation", "training"},
    {"recheck", "gate", "masking", "linear", "certify", "analysis"},
    {"report"},
    {"papers"},
    {"api", "testing", "commands", "__init__", "__main__"},
]
LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}
# Rooms and modules that work where torch is not installed.
NO_TORCH = {
    "analysis.gradients", "analysis.gradients_record", "analysis.logits", "analysis.manifold_record",
    "analysis.manifolds", "analysis.pair", "analysis.record", "analysis.series_record", "analysis.study_record",
    "analysis.study_spec", "analysis.surrogate",
    "certify.interval", "certify.radius", "certify.record",
    "commands", "gate", "papers", "report", "results", "suite",
    "core.errors", "core.files", "core.numbers", "core.philox", "core.stats", "core.types",
    "core.user_code", "core.version",
    "data.formats", "data.sets",
    "evaluation.options", "evaluation.request",
    "linear.record", "linear.theory",
    "masking.checks", "masking.compare", "masking.measurements", "masking.record", "masking.thresholds",
    "masking.stored", "masking.verdict",
    "models.card", "models.sources", "models.spec",
}  # fmt: skip


def room_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(path):
    """List the rooms that a file imports from anywhere in it, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: imports are absolute"
            full = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            full = [alias.name for alias in node.names]
        else:
            continue
        for name in full:
            first, *rest = name.split(".")
            if first == "robbench":
                yield rest[0] if rest and rest[0] in LEVEL else "__init__"


@functools.cache
def arrows():
    """Return which rooms import from which: {(from, to): files}."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        for target in imported_rooms(path):
            if target != (room := room_of(path)):
                found.setdefault((room, target), set()).add(path.relative_to(PACKAGE).as_posix())
    return found


def test_every_file_is_in_a_room():
    rooms = {room_of(path) for path in PACKAGE.rglob("*.py")}
    assert rooms == set(LEVEL)
    assert len(LAYERS) <= 10


def test_imports_point_down():
    wrong = {f"{a} imports {b}": files for (a, b), files in arrows().items() if LEVEL[b] > LEVEL[a]}
    assert not wrong


def test_rooms_import_each_other_in_no_circle():
    found = arrows()
    below = {room: {b for a, b in found if a == room} for room in LEVEL}
    while free := [room for room, targets in below.items() if not targets & set(below)]:
        for room in free:
            del below[room]
    assert not below, "each of these rooms imports from another one of them"


def test_files_and_functions_are_short():
    long = []
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        lines = len(text.splitlines())
        if lines > 350:
            long.append(f"{path.name}: {lines} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno - node.lineno + 1 > 80:
                long.append(f"{path.name}: {node.name} has {node.end_lineno - node.lineno + 1} lines")
    assert not long


# Calls that wait for a pipe, follow a link, or read without a limit; and the files that use them, with the reason.
BARE = re.compile(
    r"\.read_text\(|\.read_bytes\(|\.write_text\(|\.write_bytes\(|\.open\(\"|\bopen\(|tomllib\.loads|pd\.read_"
)
ALLOWED = {
    "analysis/study_spec.py": "the package's own files",
    "core/files.py": "these are the helpers",
    "core/machine.py": "/proc",
    "core/version.py": "the package's own files",
    "data/encoded.py": "decodes bytes that the helpers read",
    "data/formats.py": "opens what open_regular gave",
    "data/own.py": "members of an archive that open_regular gave",
    "data/sets.py": "open_regular, and downloads that the user asked for",
    "evaluation/run.py": "the method of a run",
    "evaluation/scheduler.py": "the method of a run",
    "masking/thresholds.py": "the package's own files",
    "models/families.py": "the package's own files",
    "models/outside.py": "an installed package",
    "report/figures/canvas.py": "a picture in memory",
    "papers/figures/write.py": "a picture in memory",
    "results/store.py": "a method of that name",
    "suite.py": "the package's own files",
    "__main__.py": "os.devnull",
}


def test_files_are_read_and_written_by_the_helpers_of_core():
    found = {p.relative_to(PACKAGE).as_posix() for p in PACKAGE.rglob("*.py") if BARE.search(p.read_text("utf-8"))}
    assert found == set(ALLOWED)


@pytest.mark.whole
def test_readers_of_results_work_without_torch():
    modules = []
    for path in sorted(PACKAGE.rglob("*.py")):
        module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")
        if any(f"{module}.".startswith(f"{name}.") for name in NO_TORCH):
            modules.append(f"robbench.{module}")
    assert {"robbench.commands.evaluate", "robbench.report.leaderboard", "robbench.gate.decision"} <= set(modules)
    code = (
        f"import sys; sys.modules['torch'] = None\nimport importlib\nfor m in {modules!r}: importlib.import_module(m)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": str(PACKAGE.parent), "PATH": ""})


def test_no_test_is_imported_and_no_conftest(repo):
    """What several tests share lies in tests/support. Scripts in strings count too, so this looks at the text."""
    wrong = []
    for folder in ("tests", "perf"):
        for path in sorted((repo / folder).rglob("*.py")):
            for line in path.read_text(encoding="utf-8").splitlines():
                if re.search(r"(?:from|import) (?:[\w.]+\.)?(?:test_\w+|conftest)\b", line):
                    wrong.append(f"{path.relative_to(repo)}: {line.strip()}")
    assert not wrong
