"""Exact numbers in the forms that people write (`8/255`, `0.3`, `2`), and threats made of them."""

import math
import re
from fractions import Fraction
from typing import get_args

from robbench.core.types import Norm, Threat

_MOST_DIGITS = 100

__all__ = ["parse_eps", "parse_fraction", "parse_norm", "parse_radii", "parse_threat", "whole_box"]


def parse_fraction(text: str | int | float | Fraction, what: str = "number") -> Fraction:
    """Parse a non-negative number exactly: "8/255", "0.3", 2, or the float 0.3, which is read as 3/10.

    Raises:
        ValueError: not a number, not finite, or negative. The message names `what` and the allowed forms.
    """
    written = re.fullmatch(r"[^eE]*([eE][+-]?\d+)?", text) if isinstance(text, str) else None
    # An exact 1e999999999 would have a billion digits. A few characters of a file must not cost that much.
    if isinstance(text, str) and (len(text) > _MOST_DIGITS or written is None or _exponent(written[1]) > _MOST_DIGITS):
        raise ValueError(f"{what}: {text[:40]!r} given; allowed: at most {_MOST_DIGITS} digits")
    if isinstance(text, int) and text.bit_length() > 4 * _MOST_DIGITS:
        raise ValueError(f"{what}: a number of {text.bit_length()} bits given; allowed: at most {_MOST_DIGITS} digits")
    try:
        # repr() of a float is the shortest decimal that gives the same float: 0.3 means 3/10, not its binary neighbour.
        value = Fraction(repr(text)) if isinstance(text, float) else Fraction(text)
    except (ValueError, TypeError, ZeroDivisionError, OverflowError):
        raise ValueError(
            f'{what}: {text!r} given; allowed: a fraction such as "8/255" or a decimal such as 0.3'
        ) from None
    if value < 0:
        raise ValueError(f"{what}: {text!r} given; it must not be negative")
    return value


def _exponent(text: str | None) -> int:
    return abs(int(text[1:8])) if text else 0


def parse_eps(text: str | int | float | Fraction) -> Fraction:
    """Parse a radius exactly, in [0, 1] pixel units: "8/255" or 0.3.

    Raises:
        ValueError: not a number or negative.
    """
    return parse_fraction(text, "eps")


def parse_radii(text: str) -> list[str]:
    """Split radii at commas ("0,2/255,8/255"), sort them and drop duplicates.

    Raises:
        ValueError: a part is not a radius.
    """
    radii = {parse_eps(part.strip()): part.strip() for part in text.split(",")}
    return [radii[value] for value in sorted(radii)]


def parse_norm(norm: str) -> Norm:
    """Return the norm of a name.

    Raises:
        ValueError: there is no such norm.
    """
    known: dict[str, Norm] = {name: name for name in get_args(Norm)}
    if norm not in known:
        raise ValueError(f"norm: {norm!r} given; allowed: {', '.join(known)}")
    return known[norm]


def parse_threat(norm: str, eps: str | int | float | Fraction) -> Threat:
    """Build a threat from text.

    Raises:
        ValueError: unknown norm, invalid radius, or an Linf radius above 1 (most likely given in 0..255).
    """
    known, radius = parse_norm(norm), parse_eps(eps)
    if norm == "Linf" and radius > 1:
        raise ValueError(f'eps: {eps!r} given; an Linf radius lies in [0, 1] (write 8 of 255 levels as "8/255")')
    return Threat(norm=known, eps=radius)


def whole_box(norm: Norm, pixels: int) -> float:
    """Return the radius at which a ball around any image of so many pixels holds the whole box [0, 1]."""
    return {"Linf": 1.0, "L2": math.sqrt(pixels), "L1": float(pixels), "L0": float(pixels)}[norm]
