"""Exact numbers as people write them: `8/255`, `0.3`, `2`."""

from fractions import Fraction

__all__ = ["parse_fraction"]


def parse_fraction(text: str | int | float | Fraction, what: str = "number") -> Fraction:
    """Parse a non-negative number exactly: "8/255", "0.3", 0.3 (read as the decimal it prints as), 2.

    Raises:
        ValueError: not a number, not finite, or negative; the sentence names `what` and the allowed forms.
    """
    try:
        # repr() of a float is the shortest decimal that reads back as it: 0.3 means 3/10, not its binary neighbour.
        value = Fraction(repr(text)) if isinstance(text, float) else Fraction(text)
    except (ValueError, TypeError, ZeroDivisionError, OverflowError):
        raise ValueError(
            f'{what}: {text!r} given; allowed: a fraction such as "8/255" or a decimal such as 0.3'
        ) from None
    if value < 0:
        raise ValueError(f"{what}: {text!r} given; it must not be negative")
    return value
