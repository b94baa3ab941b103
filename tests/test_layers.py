"""Imports point down only, and what reads results never imports torch."""

import ast
import subprocess
import sys
from pathlib import Path

import robbench

ROOT = Path(robbench.__file__).parent

# Lower layers first; a module may import from its own layer and from the ones above it in this list.
LAYERS = [
    {"robbench", "types", "errors", "numbers", "files", "memory", "own"},
    {"rng", "losses", "stats", "hardware", "ledger"},
    {"adversarials", "records", "locking", "guard", "reporting", "widths"},
    {"salvage", "kernels"},
    {"threat", "formats", "data", "store", "models"},
    {"attacks"},
    {"crews", "suite", "leaps", "queries"},
    {"lanes"},
    {"engine"},
    {"target", "summary"},
    {"consistency"},
    {"inputs", "transfer", "peers"},
    {"stages", "keeping", "runs"},
    {"shards", "worker", "flow"},
    {"evaluation", "verify", "sanity", "training", "linear"},
    {"executors", "planning", "reproducing"},
    {"report", "baseline", "changes", "paired", "regression", "listing"},
    {"gate"},
    {"testing"},
    {"commands"},
    {"cli"},
    {"__main__"},
]
LEVEL = {name: i for i, layer in enumerate(LAYERS) for name in layer}
NO_TORCH = [
    "types",
    "errors",
    "numbers",
    "files",
    "own",
    "stats",
    "adversarials",
    "records",
    "salvage",
    "locking",
    "store",
    "runs",
    "summary",
    "sanity.record",
    "sanity.measurements",
    "sanity.thresholds",
    "sanity.checks",
    "sanity.compare",
    "sanity.verdict",
    "consistency",
    "baseline",
    "changes",
    "paired",
    "regression",
    "gate",
    "report",
    "linear.theory",
    "linear.record",
    "models.card",
    "models.sources",
    "data",
    "suite",
]


def imports(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("robbench"):
            module = node.module.split(".")
            if len(module) > 1:
                yield module[1]
            else:
                yield from (a.name for a in node.names if (ROOT / f"{a.name}.py").exists() or (ROOT / a.name).is_dir())


def test_imports_point_down():
    wrong = []
    for path in ROOT.rglob("*.py"):
        unit = path.relative_to(ROOT).parts[0].removesuffix(".py")
        if unit == "__init__":
            continue
        for imported in imports(path):
            if LEVEL[imported] > LEVEL[unit]:
                wrong.append(f"{path.relative_to(ROOT)} imports {imported}")
    assert not wrong


def test_readers_of_results_work_without_torch():
    paths = sorted((ROOT / "report").rglob("*.py"))
    commands = [f"commands.{path.stem}" for path in (ROOT / "commands").glob("*.py")]
    assert {"commands.evaluate", "commands.gate"} <= set(commands)
    report = [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in paths]
    assert {"report.leaderboard", "report.tables", "report.export", "report.figures.gallery"} <= set(report)
    modules = [f"robbench.{m}" for m in [*NO_TORCH, *commands, *report, "cli"]]
    code = (
        f"import sys; sys.modules['torch'] = None\nimport importlib\nfor m in {modules!r}: importlib.import_module(m)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": str(ROOT.parent), "PATH": ""})
