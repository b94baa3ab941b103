"""Which code judged the stored records of a run. Records of other or unknown code are set aside. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from robbench.core.files import parse_json, read_json, set_aside
from robbench.results.records import OUTCOMES, read_run_id
from robbench.results.recovery import Note
from robbench.results.schema import Answers, is_intact

__all__ = [
    "DESCRIPTION",
    "MOST_DESCRIPTION_BYTES",
    "load_description",
    "name_code",
    "read_began",
    "set_aside_unknown_code",
]

DESCRIPTION = "run.json"
MOST_DESCRIPTION_BYTES = 2**24


def name_code(code: str) -> str:
    """Return the subject of a sentence about records of other code; `code` is empty where it is unknown."""
    return f"Another version of the judging code ({code})" if code else "A version of robbench that names no code"


def load_description(partial: Path) -> dict[str, Any]:
    """Load the run.json of an unfinished run; empty if it is missing or damaged (`robbench runs` reports it)."""
    try:
        about = parse_json(read_json(partial / DESCRIPTION, MOST_DESCRIPTION_BYTES))
    except (OSError, ValueError, RecursionError):
        return {}
    return about if isinstance(about, dict) else {}


def read_began(partial: Path) -> tuple[list[str], str]:
    """Read answers and code in the run.json of an unfinished run; empty if they are missing or damaged.

    The code counts only in a file that is as it was written.
    """
    about = load_description(partial)
    code = str(about.get("code", "")) if is_intact(about) else ""
    try:
        return TypeAdapter(Answers).validate_python(about.get("answers", [])), code
    except ValueError:
        return [], ""


def set_aside_unknown_code(partial: Path, run_id: str, code: str, has_summary: bool, note: Note) -> None:
    """Set aside the records of an unfinished run if the present code did not judge them.

    Args:
        partial: the folder of the shards, `<result>/.partial/<run_id>`.
        run_id: the run.
        code: digest of the present judging code.
        has_summary: whether the folder has a result.json of this run, which says what judged outcomes.parquet. Without
            it, these records belong to the unfinished run.
        note: called with a text for every file or folder that is moved.
    """
    folder, (_, began) = partial.parents[1], read_began(partial)
    if began == code:
        return
    found = [partial] if any(partial.glob("*.parquet")) else []
    if not has_summary and read_run_id(folder / OUTCOMES) == run_id:
        found.append(folder / OUTCOMES)
    for path in found:
        note(
            f"{path}: {name_code(began)} judged these records of an unfinished run, and records of different judging "
            f"code are not mixed. Set aside as {set_aside(path, folder).name}; its images are computed again."
        )
