"""The one exception of bad input: its message is what the user reads."""

from __future__ import annotations

import math
from numbers import Integral, Real


class InputError(ValueError):
    """Bad input: one clear sentence naming the value and what would be right (exit code 2)."""


def first_line(error: Exception) -> str:
    """The first line of another library's error, or the name of its kind."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def check_number(name: str, value, low: float, high: float, whole: bool = False) -> None:
    """InputError unless ``value`` is a (whole) number, no bool and no NaN, from low to high."""
    kind = "a whole number" if whole else "a number"
    fits = isinstance(value, Integral if whole else Real) and not isinstance(value, bool)
    if not (fits and low <= value <= high):
        bounds = f"from {low} to {high}" if high < math.inf else f"of at least {low}"
        raise InputError(f"{name} is {value!r}; it must be {kind} {bounds}.")
