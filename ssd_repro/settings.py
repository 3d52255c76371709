"""The numbers a user may set: their defaults, their bounds, one check. Imports nothing heavy."""

from __future__ import annotations

import math

from .errors import InputError

METHODS = ("autoregressive", "draft", "speculative")
TOLERANCE = 0.4  # beta of the paper's Table 1
DRAFT_LENGTH = 3  # L_d of the paper's Table 1: the fastest of its Figure 3
MAX_DRAFT_LENGTH = 64
MAX_SEED = 2**63 - 1  # what torch.Generator.manual_seed takes


def choice(what: str, value, known) -> None:
    """InputError unless ``value`` is one of ``known``."""
    if value not in known:
        raise InputError(f"unknown {what} {value!r}: choose one of {', '.join(map(str, known))}")


def check(method: str, tolerance: float, draft_length: int, seed: int) -> None:
    """InputError, in one sentence, at the first setting that is out of bounds."""
    choice("method", method, METHODS)
    number = isinstance(tolerance, (int, float)) and not isinstance(tolerance, bool)
    if not number or not math.isfinite(tolerance) or not 0 <= tolerance <= 1:
        raise InputError(f"tolerance must be a number from 0 to 1, got {tolerance!r}")
    _whole("draft length", draft_length, 1, MAX_DRAFT_LENGTH)
    _whole("seed", seed, 0, MAX_SEED)


def _whole(what: str, value, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise InputError(f"{what} must be a whole number from {low} to {high}, got {value!r}")
