"""Words the errors of the parser of the command line as every other error."""

from __future__ import annotations

import re
from typing import Any

from robbench.core.errors import suggest_names

__all__ = ["word_usage"]

_NUMBERS = {"int": "a whole number, such as 200", "float": "a number, such as 0.01"}


def word_usage(error: Any) -> str:
    """Return the message for an error of the parser. A command without arguments gets its help."""
    text = error.format_message()
    if text.startswith("Usage:"):
        return str(text)
    text = _word_misplaced(error) or _word_value(error) or text
    end = "" if text.endswith("?") else "."
    path = error.ctx.command_path if error.ctx else "robbench"
    return f"robbench: {text.rstrip('.')}{end} See `{path} --help`."


def _word_misplaced(error: Any) -> str:
    """Say that a command takes the model without an option; empty where the error is about something else."""
    named = getattr(error, "option_name", None) in ("--model", "-m")
    takes = error.ctx is not None and any(
        p.name == "model" and not p.opts[0].startswith("-") for p in error.ctx.command.params
    )
    if not (named and takes):
        return ""
    return f"{error.option_name} given; this command takes the model without it: {error.ctx.command_path} digits/at"


def _word_value(error: Any) -> str:
    """Say which value of an option was given, and which are allowed; empty where the error is about something else."""
    text = re.sub(r"'\?\.?$", "'?", str(error.format_message()))
    cause, param = error.__cause__, getattr(error, "param", None)
    if param is None or not hasattr(cause, "errors"):
        return text
    found = cause.errors()[0]
    given, name = str(found["input"])[:80], max(param.opts, key=len)
    if (kind := found["type"].partition("_")[0]) in _NUMBERS:
        return f"{name}: {given!r} given; allowed: {_NUMBERS[kind]}"
    if " is not one of " in found["msg"]:
        choices = re.findall(r"'([^']*)'", found["msg"].rpartition(" is not one of ")[2])
        return f"{name}: {given!r} given; allowed: {', '.join(choices)}.{suggest_names(given, choices)}"
    return f"{name}: {given!r} given; {found['msg'][:1].lower()}{found['msg'][1:]}"
