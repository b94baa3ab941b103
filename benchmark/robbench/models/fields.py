"""The field types of a card's tables. They are checked strictly and have their own error messages."""

import math
from fractions import Fraction
from pathlib import PurePosixPath
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PlainSerializer, PlainValidator

from robbench.core.files import check_name
from robbench.core.numbers import parse_fraction

__all__ = [
    "CardTable",
    "Exact",
    "Numbers",
    "Scalar",
    "Text",
    "check_package_name",
    "check_relative_path",
    "check_sha256",
]


def _exact(given: object) -> Fraction:
    if isinstance(given, bool) or not isinstance(given, str | int | float | Fraction):
        raise ValueError(f'{given!r} given; allowed: a fraction such as "8/255" or a decimal such as 0.3')
    try:
        return parse_fraction(given)
    except ValueError as error:
        # The caller begins the message with the key, so the parser's "number" is not needed.
        raise ValueError(str(error).removeprefix("number: ")) from None


def _scalar(given: object) -> int | float | str | bool:
    if not isinstance(given, int | float | str) or (isinstance(given, float) and not math.isfinite(given)):
        raise ValueError(f"{given!r} given; allowed: an integer, a finite number, text, true or false")
    return given


def check_relative_path(text: str) -> str:
    """Return a relative path that stays inside its folder; raise ValueError for any other text."""
    parts = PurePosixPath(text).parts
    if not parts or parts[0] == "/" or ".." in parts or set(text) & set("\\:\0"):
        raise ValueError(f"{text!r} given; allowed: a relative path with / that stays inside its folder")
    return text


def check_sha256(text: str) -> str:
    """Return the 64 hexadecimal digits of a SHA-256; raise ValueError for any other text."""
    if len(text) != 64 or not set(text) <= set("0123456789abcdef"):
        raise ValueError(f"{text!r} given; expected: 64 lower-case hexadecimal digits")
    return text


def check_package_name(text: str) -> str:
    """Return the name of a top-level package; raise ValueError for any other text."""
    # To find a dotted name, Python imports its parent, and reading a card must not run code.
    if not text.isidentifier():
        raise ValueError(f"{text!r} given; allowed: the name of a top-level Python package")
    return text


Scalar = Annotated[int | float | str | bool, PlainValidator(_scalar)]
Exact = Annotated[Fraction, PlainValidator(_exact), PlainSerializer(str, when_used="json")]
Numbers = Annotated[tuple[float, ...], Field(strict=False)]  # a TOML list, kept immutable
Text = Annotated[str, Field(min_length=1), AfterValidator(check_name)]


class CardTable(BaseModel):
    """A table of a card. It refuses unknown keys, wrong types and numbers that are not finite."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, defer_build=True)
