"""Rows with known answers, for tables, curves and theory: no model, no decoding."""

import numpy as np
import pandas as pd

COMMON = {
    "tolerance": None,
    "draft_length": None,
    "temperature": None,
    "scored": True,
    "front_end": "bundled",
    "sampler": {"temperature": 1.0},
    "audio_seconds": 4.0,
    "tokens": 100,
    "empty": False,
    "pieces": [100],
    "rounds": [[]],
    "token_kinds": "s" * 100,
    "gap_seconds": 0.2,
    "target_calls": 101,
    "drafted": 0,
    "accepted": 0,
    "acceptance_rate": None,
    "tokens_per_target_call": 1.0,
    "processes": 1,
    **{"device": "cpu", "chip": "AMD EPYC", "precision": "fp32", "whisper": "base", "speaker": "GE2E"},
    **{"words": 10, "chars": 50, "p808": 3.5, "sig": 3.4, "bak": 3.9, "ovrl": 3.0, "similarity": 0.8},
    **{"base_tokens": 100, "base_audio_seconds": 4.0, "base_lm_seconds": 2.0, "base_prefill_seconds": 0.0},
    "base_synthesis_seconds": 2.5,
}


def row(method, i, lm, audio=4.0, **other):
    """One row of utterance i: LM seconds ``lm``, beside a baseline of 2 s for 100 tokens and 4 s of audio."""
    return {
        **COMMON,
        "key": f"{method}{i}{sorted(other.items())}",
        "method": method,
        **{"text_id": str(i), "voice": "ab"[i % 2], "seed": i, "word_errors": i, "char_errors": i},
        **{"audio_seconds": audio, "lm_seconds": lm, "synthesis_seconds": lm + 0.5},
        "seconds": {"text": 0.1, "prefill": 0.1, "draft": 0.0, "verify": lm - 0.1, "rest": 0.0, "codec": 0.4},
        **other,
    }


def ssd(i, rounds, tolerance=0.4, length=3, draft=0.01, verify=0.03, target=0.02, **other):
    """An SSD row of the rounds [drafted, accepted], at these seconds a step; nothing else takes time."""
    drafted, accepted = (sum(r[j] for r in rounds) for j in (0, 1))
    tokens = accepted + len(rounds)
    phases = {"draft": draft * drafted, "verify": verify * len(rounds)}
    fields = {
        **{"tolerance": tolerance, "draft_length": length, "rounds": [rounds], "drafted": drafted},
        **{"accepted": accepted, "acceptance_rate": accepted / drafted, "target_calls": 1 + len(rounds)},
        **{"tokens": tokens, "pieces": [tokens], "token_kinds": "s" * tokens, "base_tokens": tokens},
        "tokens_per_target_call": tokens / (1 + len(rounds)),
        "base_lm_seconds": target * tokens,
        "seconds": {"text": 0.0, "prefill": 0.0, **phases, "rest": 0.0, "codec": 0.4},
    }
    return row("speculative", i, sum(phases.values()), **fields, **other)


def geometric(alpha, length, utterances=40, rounds=50, seed=0, **other):
    """SSD rows in which every judged draft is accepted with probability alpha."""
    dice = np.random.default_rng(seed)
    kept = np.cumprod(dice.random((utterances, rounds, length)) < alpha, -1).sum(-1)
    lines = [[[length, int(k)] for k in line] for line in kept]
    return pd.DataFrame([ssd(i, line, length=length, **other) for i, line in enumerate(lines)])


def three_systems(utterances=4):
    """AR 2 s, draft 1 s, SSD 1.5 s of LM for each utterance of 4 s."""
    judged = {"accepted": 60, "drafted": 80, "tokens_per_target_call": 2.5, "acceptance_rate": 0.75}
    systems = {
        "autoregressive": (2.0, {}),
        "draft": (1.0, {}),
        "speculative": (1.5, {"tolerance": 0.4, "draft_length": 3, **judged}),
    }
    return pd.DataFrame([row(method, i, lm, **own) for method, (lm, own) in systems.items() for i in range(utterances)])
