"""Is a system as good as the target alone, within a margin of WER, and how many utterances would it take to show it?

Two one-sided tests (TOST; Schuirmann 1987) on utterances spoken by both. The estimator is the difference of the two
corpus word error rates, ratios of sums: utterances are weighted by their words.
"""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import pandas as pd

from . import statistics, tables
from .conclusions import value

MARGIN = 1.0  # points of WER
LEVEL, POWER = 0.05, 0.8  # of each one-sided test; where there is no difference
YES, NO, NOT_SHOWN = "yes", "no", "not shown"
NUMBERS = ("WER difference", "WER difference_low", "WER difference_high", "sd", "n needed")
_NOTE = (
    f"WER difference: points over the autoregressive target, of corpus WER (all errors over all words), paired; [low, "
    f"high]: 90 % bootstrap interval over utterances. Equivalent, by two one-sided tests at {100 * LEVEL:g} %: yes, "
    f"the interval lies within ± {MARGIN:g} point; no, it lies beyond; not shown, neither. n needed: utterances with "
    f"which the tests say yes with probability {POWER:g} if there is no difference, at the standard deviation (sd, "
    "points) of these utterances. Lossless: beta 0, exactly the target's distribution."
)


def contributions(ours: pd.DataFrame, theirs: pd.DataFrame) -> np.ndarray:
    """(n,) points of WER whose mean is the difference of the two corpus rates, and whose spread gives its error.

    Each ratio of sums R = sum e / sum w is linearised (delta method): R + (e - R w) / mean w. Utterances that were
    not scored in both are left out. InputError if the rows are not of the same utterances.
    """
    ours, theirs = statistics.paired(ours, theirs)
    both = ours.words.notna() & theirs.words.notna()
    found = np.zeros(int(both.sum()))
    for rows, sign in ((ours[both], 100), (theirs[both], -100)):
        errors, words = (pd.to_numeric(rows[name]).to_numpy(float) for name in ("word_errors", "words"))
        if len(rows):
            rate = statistics.ratio_of_sums(errors, words)
            found += sign * (rate + (errors - rate * words) / words.mean())
    return found


def utterances_needed(sd: float, margin: float = MARGIN, level: float = LEVEL, power: float = POWER) -> int:
    """The fewest with which TOST shows equivalence with ``power`` if the true difference is 0.

    sd: of ``contributions``. The mean is taken as normal: power = 2 Phi(margin sqrt(n) / sd - z_level) - 1, solved.
    """
    normal = NormalDist()
    within = normal.inv_cdf(1 - level) + normal.inv_cdf((1 + power) / 2)
    return max(statistics.LEAST, math.ceil((within * sd / margin) ** 2))


def tost(ours: pd.DataFrame, theirs: pd.DataFrame, margin: float = MARGIN, draws: int = statistics.DRAWS) -> dict:
    """Rows of the same utterances -> WER difference, its 90 % interval, equivalent, sd, n, n needed."""
    points, nothing = contributions(ours, theirs), dict.fromkeys(NUMBERS, np.nan)
    if not len(points):
        return {**nothing, "equivalent": statistics.NOT_SCORED, "n": 0}
    ours, theirs = statistics.paired(ours, theirs)
    both = ours.words.notna() & theirs.words.notna()
    columns = [rows[both][name] for rows in (ours, theirs) for name in ("word_errors", "words")]
    low, high = statistics.bootstrap(_difference, *columns, level=1 - 2 * LEVEL, draws=draws)
    shown = YES if -margin < low and high < margin else NO if low > margin or high < -margin else NOT_SHOWN
    found = {"WER difference": float(points.mean()), "WER difference_low": low, "WER difference_high": high}
    if len(points) < statistics.LEAST:
        return {**nothing, **found, "equivalent": statistics.TOO_FEW, "n": len(points)}
    sd = float(points.std(ddof=1))
    return {**found, "equivalent": shown, "sd": sd, "n": len(points), "n needed": utterances_needed(sd, margin)}


def _difference(errors, words, their_errors, their_words):
    return 100 * (statistics.ratio_of_sums(errors, words) - statistics.ratio_of_sums(their_errors, their_words))


def of_rows(rows: pd.DataFrame) -> pd.DataFrame:
    """``tost`` of each SSD system against the autoregressive target, the lossless first, with its speed-up."""
    base, lines = tables.of_method(rows, "autoregressive"), []
    for name, ours in tables.by_system(rows).items():
        if (ours.method == "speculative").all():
            speed = tables.speedup("speed-up", ours, "lm_seconds", "audio_seconds")
            exact = "yes" if (ours.tolerance == 0).all() else "no"
            lines.append({"system": name, "lossless": exact, **speed, **tost(ours, base)})
    return pd.DataFrame(lines).set_index("system").sort_values("lossless", ascending=False, kind="stable")


def readable(table: pd.DataFrame) -> pd.DataFrame:
    text = tables.readable(table.drop(columns=["lossless", "equivalent"]))
    return text.assign(lossless=table.lossless, equivalent=table.equivalent)


def concluded(table: pd.DataFrame) -> str:
    """A sentence on the fastest lossless system of ``of_rows``, or that there is none."""
    exact = table[table.lossless == "yes"]
    if exact.empty:
        return "No lossless system is among these."
    best = exact.loc[exact["speed-up"].idxmax()]
    said = f"The fastest without loss is {best.name}: {value(best, 'speed-up')} times"
    if pd.isna(best["n needed"]):
        return f"{said}; its WER against the target: {best.equivalent}."
    return (
        f"{said}; WER {value(best, 'WER difference')} points over the target (90 % interval). Equivalent within "
        f"{MARGIN:g} point: {best.equivalent}, with {best.n:g} utterances; to show it takes {best['n needed']:g}."
    )


def note(rows: pd.DataFrame) -> str:
    return f"{_NOTE} {concluded(of_rows(rows))}"
