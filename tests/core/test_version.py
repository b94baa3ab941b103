"""The digests that tell a gate which code judged cover all code that a verdict depends on."""

import ast
import shutil

import pytest

from robbench.core.version import PACKAGE, digest_verdict_code


def imported_files(path):
    """List the files of the package that a file imports anywhere in it, packages by their `__init__`."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "robbench":
            base = PACKAGE.joinpath(*node.module.split(".")[1:])
            for candidate in (base, *(base / alias.name for alias in node.names)):
                yield from (f for f in (candidate.with_suffix(".py"), candidate / "__init__.py") if f.is_file())


def import_closure(path):
    found, waiting = set(), [path]
    while waiting:
        if (file := waiting.pop()) not in found:
            found.add(file)
            waiting += imported_files(file)
    return {file.relative_to(PACKAGE).as_posix() for file in found}


def test_the_digests_cover_all_that_the_worker_imports():
    closure = import_closure(PACKAGE / "evaluation" / "worker.py")
    assert {"engine/judge.py", "classifier/guard.py", "core/threat.py", "attacks/pgd.py"} <= closure
    assert closure - {"__init__.py"} <= set(digest_verdict_code())


@pytest.mark.parametrize(
    "judge", ["engine/judge.py", "engine/trials.py", "engine/query.py", "classifier/guard.py", "core/types.py"]
)
def test_a_changed_judge_changes_the_digests(tmp_path, judge):
    package = tmp_path / "robbench"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__", "papers"))
    before = digest_verdict_code(package)
    assert before == digest_verdict_code(), "where the package lies does not matter"
    (package / judge).write_text((package / judge).read_text() + "\n# changed\n")
    after = digest_verdict_code(package)
    assert [name for name in before if before[name] != after[name]] == [judge]
