"""One row per decoded utterance: its numbers, its key, its file."""

from __future__ import annotations

import hashlib
import json
import statistics
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd

from ..files import append_rows, drop_half_line, locked, read_rows
from ..models.codec import TOKEN_RATE
from ..processes import process
from ..speech.sentences import Utterance
from .systems import System

SILENCE_DB = -35.0  # a token's 40 ms, against the 95th percentile of its utterance's tokens


def measured(takes: list) -> dict:
    """One row's numbers from repeated takes: medians of seconds, all else from the first.

    pieces: tokens of each sentence of the text. rounds: of each sentence the [drafted,
    accepted] of its rounds, none where nothing was drafted (every round then gives one token).
    """
    take = takes[0]
    speculated = any(r.drafted for sentence in take.sentences for r in sentence.rounds)
    rounds = [[[r.drafted, r.accepted] for r in s.rounds if speculated] for s in take.sentences]
    return {
        "tokens": len(take.token_ids),
        "token_ids": list(take.token_ids),
        "pieces": [len(sentence.tokens) for sentence in take.sentences],
        "rounds": rounds,
        "carries": carries(take),
        "gap_seconds": take.gap_seconds,
        "repeatable": all(other.token_ids == take.token_ids for other in takes),
        "stopped": take.stopped,
        "audio_seconds": take.audio_seconds,
        "lm_seconds": _median(t.lm_seconds for t in takes),
        "lm_seconds_each": [round(t.lm_seconds, 6) for t in takes],
        "synthesis_seconds": _median(t.rtf * t.audio_seconds for t in takes),
        "seconds": {k: _median(t.seconds[k] for t in takes) for k in take.seconds},
        "target_calls": take.target_calls,
        "draft_calls": take.draft_calls,
        "drafted": sum(r.drafted for s in take.sentences for r in s.rounds),
        "accepted": sum(r.accepted for s in take.sentences for r in s.rounds),
        "acceptance_rate": take.acceptance_rate,
        "tokens_per_target_call": take.tokens_per_target_call,
    }


def baseline(takes: list) -> dict:
    """Of a row's baseline, the autoregressive target decoded in turn with it."""
    return {
        "base_tokens": len(takes[0].token_ids),
        "base_audio_seconds": takes[0].audio_seconds,
        "base_lm_seconds": _median(t.lm_seconds for t in takes),
        "base_prefill_seconds": _median(t.seconds["prefill"] for t in takes),
        "base_synthesis_seconds": _median(t.rtf * t.audio_seconds for t in takes),
    }


def _median(seconds) -> float:
    """To the microsecond."""
    return round(statistics.median(seconds), 6)


def carries(take) -> str:
    """What each token carries by its 40 ms of sound, a letter each: s speech, '.' silence.

    Silence lies SILENCE_DB below the 95th percentile of the tokens. Empty where the sound
    cannot be laid beside the tokens: it is longer or shorter than they say, or there is none.
    """
    counts = [len(sentence.tokens) for sentence in take.sentences]
    width, gap = take.sample_rate // TOKEN_RATE, int(take.gap_seconds * take.sample_rate)
    if not np.any(take.audio) or len(take.audio) != sum(counts) * width + gap * (len(counts) - 1):
        return ""
    begins = np.cumsum([0, *(n * width + gap for n in counts)])
    spoken = np.concatenate([take.audio[b : b + n * width] for b, n in zip(begins, counts, strict=False)])
    level = 10 * np.log10(np.square(spoken.reshape(-1, width)).mean(1) + 1e-12)
    return "".join("." if low else "s" for low in level < np.percentile(level, 95) + SILENCE_DB)


def row_settings(system: System, said: Utterance, context: dict) -> dict:
    return {**asdict(system), **asdict(said), **context}


def key(settings: dict) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def find(known: dict[str, dict], settings: dict) -> dict | None:
    """The row of these settings; where none needs to be heard, a heard one will do."""
    return known.get(key(settings)) or known.get(key({**settings, "heard": True}))


@contextmanager
def locked_rows(folder, name: str, rank: int = 0):
    """The rows file that this process alone may write; that of rank 0 of many is locked as ``name`` itself."""
    own = Path(folder) / "rows" / f"{name}.jsonl"
    if process()[1] > 1:
        own = own.with_suffix(f".rank{rank}.jsonl")
    lock = own.with_name(f"{name}.lock" if rank == 0 else f"{name}.rank{rank}.lock")
    with locked(lock):
        yield own


def rank_files(path: Path) -> list[Path]:
    """What several processes wrote for the rows file ``path`` (or for that of which it is a part)."""
    return sorted(path.parent.glob(f"{path.name.partition('.')[0]}.rank*.jsonl"))


def rows_of_folder(folder) -> dict[str, dict]:
    """key -> row, of all rows files of a results folder and of every process's part of them."""
    paths = sorted((Path(folder) / "rows").glob("*.jsonl"))
    return {row["key"]: row for path in paths for row in read_rows(path)}


def merge_rows(path: Path) -> None:
    """Put the processes' parts into ``path``, each key once, and remove them.

    A part is removed when its rows are on the disk; killed before, the next merge finds
    their keys there and adds none twice. InputError while a process still writes.
    """
    drop_half_line(path)
    for part in rank_files(path):
        with locked(part.with_suffix(".lock")):
            known = {row["key"] for row in read_rows(path)}
            append_rows(path, {r["key"]: r for r in read_rows(part) if r["key"] not in known}.values())
            part.unlink()


def to_frame(rows) -> pd.DataFrame:
    return pd.DataFrame.from_records(list(rows))
