"""Intervals and verdicts: what measurements of the same utterances can and cannot say.

Everything is paired: the same text, voice and seed under two systems. Differences are
ours - theirs, on the scale of ``MEASURES``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from ..errors import InputError

DRAWS = 2000  # bootstrap resamples
LEAST = 8  # utterances; of fewer a percentile interval says too little
SHOWN_DIFFERENT, SHOWN_EQUIVALENT = "shown different", "shown equivalent"
NOT_SHOWN, TOO_FEW, NOT_SCORED = "no difference shown", f"fewer than {LEAST} utterances", "not scored"


@dataclass(frozen=True)
class Measure:
    """A quality: a mean of ``top``, or, with ``bottom``, 100 x sum top / sum bottom over all utterances.

    margin: differences smaller than this count as none; None: no equivalence is claimed.
    ratio: compared as sum top of ours / of theirs, not as ours - theirs.
    """

    name: str
    top: str
    bottom: str | None = None
    margin: float | None = None
    digits: int = 2
    ratio: bool = False


MEASURES = (
    Measure("WER, points", "word_errors", "words", 1.0, 1),
    Measure("CER, points", "char_errors", "chars", None, 1),
    Measure("P808 (NMOS)", "p808", None, 0.1),
    Measure("DistillMOS", "distillmos"),
    Measure("OVRL", "ovrl"),
    Measure("SIG", "sig"),
    Measure("BAK", "bak"),
    Measure("SS", "similarity", None, 0.02, 3),
    Measure("length ratio", "audio_seconds", digits=3, ratio=True),
)
MARGINS = "WER ± 1 point, P808 ± 0.1, SS ± 0.02"


def bootstrap(statistic, *columns, draws: int = DRAWS, seed: int = 0, level: float = 0.95) -> tuple[float, float]:
    """Percentile interval of ``statistic(*columns)``, whole utterances resampled, paired over columns.

    columns (n,); ``statistic`` takes them as (draws, n) and reduces the last axis. scipy.stats.bootstrap gives the
    same to 1e-15, but no interval of one utterance, nor where a resample has no value.
    """
    columns = [np.asarray(column, float) for column in columns]
    pick = np.random.default_rng(seed).integers(len(columns[0]), size=(draws, len(columns[0])))
    values = statistic(*(column[pick] for column in columns))
    tail = 50 * (1 - level)
    if np.isnan(values).all():
        return np.nan, np.nan
    low, high = np.nanpercentile(values, [tail, 100 - tail])
    return float(low), float(high)


def ratio_of_sums(a, b):
    """Corpus ratio sum a / sum b over the last axis (WER, LM-RTF, acceptance); NaN of empty utterances alone."""
    below = np.asarray(b).sum(-1)
    return np.asarray(a).sum(-1) / np.where(below, below, np.nan)


def corpus_speedup(base_seconds, base_size, seconds, size):
    """Seconds per unit (second of audio, token) of the baseline over the system's, each over all utterances."""
    return ratio_of_sums(base_seconds, base_size) / ratio_of_sums(seconds, size)


def verdict(inner: tuple[float, float], outer: tuple[float, float], margin: float | None, n: int) -> str:
    """What is shown of a difference, from its 90 % interval ``inner`` and its 95 % interval ``outer``.

    Equivalent: two one-sided tests at 5 %, that is, the 90 % interval within ± margin.
    Different: the 95 % interval without 0, and not equivalent.
    """
    if n < LEAST:
        return TOO_FEW
    if margin is not None and -margin < inner[0] and inner[1] < margin:
        return SHOWN_EQUIVALENT
    return SHOWN_DIFFERENT if outer[0] > 0 or outer[1] < 0 else NOT_SHOWN


def pearson(a, b):
    """Correlation over the last axis; NaN where one of both does not vary."""
    a, b = (x - x.mean(-1, keepdims=True) for x in (np.asarray(a, float), np.asarray(b, float)))
    spread = np.sqrt((a * a).sum(-1) * (b * b).sum(-1))
    return (a * b).sum(-1) / np.where(spread, spread, np.nan)


def paired(ours: pd.DataFrame, theirs: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Both in one order of text, voice and seed; InputError if they are not of the same utterances."""
    same = ["text_id", "voice", "seed"]
    ours, theirs = (rows.set_index(same).sort_index() for rows in (ours, theirs))
    if not ours.index.equals(theirs.index) or not ours.index.is_unique:
        raise InputError("the rows to compare are not of the same utterances: run the notebook again")
    return ours, theirs


def difference(ours: pd.DataFrame, theirs: pd.DataFrame, measure: Measure) -> dict:
    """One measure of rows of the same utterances -> difference (or ratio), low, high (95 %), margin, verdict, n.

    Utterances that lack the measure in either (no sound to judge) are left out of n.
    """
    names = [measure.top] + ([measure.bottom] if measure.bottom else [])
    columns = [pd.to_numeric(rows[name]).to_numpy(float) for rows in paired(ours, theirs) for name in names]
    columns = np.stack(columns)[:, ~np.isnan(columns).any(0)]
    n, value, outer, shown = columns.shape[1], np.nan, (np.nan, np.nan), NOT_SCORED

    def statistic(*c):
        if measure.ratio:
            return ratio_of_sums(*c)
        if measure.bottom:
            return 100 * (ratio_of_sums(c[0], c[1]) - ratio_of_sums(c[2], c[3]))
        return np.mean(c[0] - c[1], -1)

    if n:
        value = float(statistic(*columns))
        inner, outer = (bootstrap(statistic, *columns, level=level) for level in (0.90, 0.95))
        same = float(measure.ratio)  # the value if nothing differs
        shown = verdict(*(np.subtract(ends, same) for ends in (inner, outer)), measure.margin, n)
    return {"difference": value, "low": outer[0], "high": outer[1], "margin": measure.margin, "verdict": shown, "n": n}
