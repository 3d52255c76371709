"""How fast speculative decoding should be: Leviathan et al. 2023 (arXiv 2211.17192), then with measured costs.

alpha: the probability that a judged draft is accepted; L: drafted tokens per round; c: the cost of
one draft step over one target step.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from .acceptance import judged, rounds_of
from .statistics import bootstrap, corpus_speedup


def expected_tokens(alpha: float, length: int) -> float:
    """Tokens per round if a draft is accepted with probability alpha: (1 - alpha^(L+1)) / (1 - alpha), Eq. 1."""
    return float(np.sum(float(alpha) ** np.arange(length + 1)))


def leviathan_speedup(alpha: float, length: int, cost: float) -> float:
    """Theorem 3.8: expected tokens / (L c + 1); verification is taken to cost one target step."""
    return expected_tokens(alpha, length) / (length * cost + 1)


def expected_tokens_by_position(acceptance) -> float:
    """1 + a_1 + a_1 a_2 + ... from the acceptance rate of each position of the draft, given that it is judged."""
    return 1 + float(np.cumprod(np.asarray(acceptance, float)).sum())


def acceptance_by_position(rows: pd.DataFrame, length: int) -> np.ndarray:
    """(length,): accepted / judged at each position of the draft, over rounds that drafted ``length`` tokens."""
    full = [accepted for drafted, accepted in rounds_of(rows) if drafted == length]
    reached = np.array([sum(k >= i for k in full) for i in range(length + 1)], float)
    return reached[1:] / np.maximum(reached[:-1], 1)


def costs(rows: pd.DataFrame) -> dict[str, float]:
    """Seconds of one step, over all rows of one SSD setting.

    target: a step of the autoregressive target decoded beside them, its loop included;
    draft: a drafted token; verify: the target's call, with sampling and judging.
    """
    phase = {name: sum(s[name] for s in rows.seconds) for name in ("prefill", "draft", "verify", "rest")}
    calls = rows.target_calls.sum() - rows.pieces.map(len).sum()  # the prefills are calls, too
    return {
        "target": (rows.base_lm_seconds - rows.base_prefill_seconds).sum() / rows.base_tokens.sum(),
        "draft": phase["draft"] / rows.drafted.sum(),
        "verify": phase["verify"] / calls,
        **{name: phase[name] for name in ("prefill", "rest")},
    }


@np.errstate(divide="ignore", invalid="ignore")  # where nothing was spoken
def predict(rows: pd.DataFrame, length: int) -> dict[str, float]:
    """Measured and predicted speed-up per token of one SSD setting, and where the residue comes from.

    formula    Leviathan's: one acceptance rate, verification at the cost of a target step
    positions  the same with the acceptance measured at each position of the draft
    costs      also with the measured cost of the verification
    prefill %, loop %  of SSD's LM time: what no prediction counts
    left %     the rest of the residue: first tokens, rounds cut short by the end, the baseline's prefill
    """
    alpha, c = judged(rows).accepted.mean(), costs(rows)
    by_position = expected_tokens_by_position(acceptance_by_position(rows, length))
    drafting, lm = length * c["draft"], rows.lm_seconds.sum()
    seconds = rows.base_lm_seconds, rows.base_tokens, rows.lm_seconds, rows.tokens
    measured, (low, high) = corpus_speedup(*seconds), bootstrap(corpus_speedup, *seconds)
    formula = leviathan_speedup(alpha, length, c["draft"] / c["target"])
    with_costs = by_position * c["target"] / (drafting + c["verify"])
    prefill, rest = 100 * c["prefill"] / lm, 100 * c["rest"] / lm
    return {
        "alpha": alpha,
        "draft / target step": c["draft"] / c["target"],
        "verification / target step": c["verify"] / c["target"],
        "tokens per round": by_position,
        "measured": measured,
        "measured_low": low,
        "measured_high": high,
        "formula": formula,
        "positions": by_position * c["target"] / (drafting + c["target"]),
        "costs": with_costs,
        "measured / formula": measured / formula,
        "measured / costs": measured / with_costs,
        "prefill %": prefill,
        "loop %": rest,
        "left %": 100 * (1 - measured / with_costs) - prefill - rest,
    }


def setting(rows: pd.DataFrame, length: int) -> dict[str, float]:
    """Of one SSD setting what tables of several show: tokens a round, c and V in target steps, speed-up, prediction."""
    found = predict(rows, length)
    return {
        "tokens a round": found["tokens per round"],
        "c": found["draft / target step"],
        "V": found["verification / target step"],
        **{f"speed-up{end}": found[f"measured{end}"] for end in ("", "_low", "_high")},
        "predicted": found["costs"],
    }
