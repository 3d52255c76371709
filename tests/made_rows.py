"""Rows with known answers, for tables, curves and theory: no model, no decoding."""

import numpy as np
import pandas as pd

SAMPLER = {"temperature": 1.0}


def row(method, i, lm, audio=4.0, **other):
    """One row of utterance i: LM seconds ``lm``, beside a baseline of 2 s for 100 tokens and 4 s of audio."""
    return {
        "key": f"{method}{i}{sorted(other.items())}", "method": method, "tolerance": None, "draft_length": None,
        "temperature": None, "heard": True, "text_id": str(i), "voice": "ab"[i % 2], "seed": i, "word_errors": i,
        "words": 10, "char_errors": i, "chars": 50, "p808": 3.5, "sig": 3.4, "bak": 3.9, "ovrl": 3.0,
        "similarity": 0.8, "lm_seconds": lm, "audio_seconds": audio, "synthesis_seconds": lm + 0.5, "tokens": 100,
        "pieces": [100], "rounds": [[]], "carries": "s" * 100, "gap_seconds": 0.2, "sampler": SAMPLER,
        "seconds": {"text": 0.1, "prefill": 0.1, "draft": 0.0, "verify": lm - 0.1, "rest": 0.0, "codec": 0.4},
        "target_calls": 101, "drafted": 0, "accepted": 0, "acceptance_rate": None, "tokens_per_target_call": 1.0,
        "base_tokens": 100, "base_audio_seconds": 4.0, "base_lm_seconds": 2.0, "base_prefill_seconds": 0.0,
        "base_synthesis_seconds": 2.5, "processes": 1, "front_end": "bundled", **other,
    }  # fmt: skip


def ssd(i, rounds, tolerance=0.4, length=3, draft=0.01, verify=0.03, target=0.02, **other):
    """An SSD row of the rounds [drafted, accepted], at these seconds a step; nothing else takes time."""
    drafted, accepted = (sum(r[j] for r in rounds) for j in (0, 1))
    tokens = accepted + len(rounds)
    spent = {
        "text": 0.0,
        "prefill": 0.0,
        "draft": draft * drafted,
        "verify": verify * len(rounds),
        "rest": 0.0,
        "codec": 0.4,
    }
    lm = draft * drafted + verify * len(rounds)
    return row(
        "speculative", i, lm, tolerance=tolerance, draft_length=length, rounds=[rounds], pieces=[tokens], tokens=tokens,
        carries="s" * tokens, seconds=spent, drafted=drafted, accepted=accepted, target_calls=1 + len(rounds),
        base_tokens=tokens, base_lm_seconds=target * tokens, acceptance_rate=accepted / drafted,
        tokens_per_target_call=tokens / (1 + len(rounds)), **other,
    )  # fmt: skip


def geometric(alpha, length, utterances=40, rounds=50, seed=0, **other):
    """SSD rows in which every judged draft is accepted with chance alpha."""
    dice = np.random.default_rng(seed)
    kept = np.cumprod(dice.random((utterances, rounds, length)) < alpha, -1).sum(-1)
    return pd.DataFrame([
        ssd(i, [[length, int(k)] for k in line], length=length, **other) for i, line in enumerate(kept)
    ])  # fmt: skip


def three_systems(utterances=4):
    """AR 2 s, draft 1 s, SSD 1.5 s of LM for each utterance of 4 s."""
    lines = []
    for method, lm in (("autoregressive", 2.0), ("draft", 1.0), ("speculative", 1.5)):
        own = {}
        if method == "speculative":
            own = {"tolerance": 0.4, "draft_length": 3, "accepted": 60, "drafted": 80, "tokens_per_target_call": 2.5,
                   "acceptance_rate": 0.75}  # fmt: skip
        lines += [row(method, i, lm, **own) for i in range(utterances)]
    return pd.DataFrame(lines)
