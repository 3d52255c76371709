"""One row per decoded utterance and system: its numbers, its key, its file."""

from __future__ import annotations

import hashlib
import json
import statistics
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd

from ..files import append_row, drop_half_line, locked, read_rows
from ..models.codec import TOKEN_RATE
from ..speech.sentences import Utterance
from .systems import System

SILENCE_DB = -35.0  # a token's 40 ms, against the 95th percentile of its utterance's tokens
DECIBELS = 2.0  # of a step of ``loudness``
FACTS = "gap_seconds stopped audio_seconds target_calls draft_calls acceptance_rate tokens_per_target_call"  # of a take
BUSY_CORES = 0.25  # other work than this makes timings doubtful


def decoding_fields(takes: list) -> dict:
    """A row's fields from repeated takes of one utterance: medians of seconds, all else from the first take.

    pieces: number of tokens of each sentence of the text. rounds: of each sentence the [drafted, accepted] of its
    rounds; an empty list where nothing was drafted, for then every round gives one token.
    """
    take = takes[0]
    drafted = sum(sentence.drafted for sentence in take.sentences)
    return {
        "tokens": len(take.token_ids),
        "empty": not take.token_ids,
        "token_ids": list(take.token_ids),
        "pieces": [len(sentence.tokens) for sentence in take.sentences],
        "rounds": [[[r.drafted, r.accepted] for r in s.rounds if drafted] for s in take.sentences],
        "token_kinds": token_kinds(take),
        "loudness": loudness(take),
        "repeatable": all(other.token_ids == take.token_ids for other in takes),
        "lm_seconds": _median(t.lm_seconds for t in takes),
        "lm_seconds_each": [round(t.lm_seconds, 6) for t in takes],
        "synthesis_seconds": _median(t.synthesis_seconds for t in takes),
        "seconds": {k: _median(t.seconds[k] for t in takes) for k in take.seconds},
        "drafted": drafted,
        "accepted": sum(sentence.accepted for sentence in take.sentences),
        **{name: getattr(take, name) for name in FACTS.split()},
    }


def baseline_fields(takes: list) -> dict:
    return {
        "base_tokens": len(takes[0].token_ids),
        "base_audio_seconds": takes[0].audio_seconds,
        "base_lm_seconds": _median(t.lm_seconds for t in takes),
        "base_prefill_seconds": _median(t.seconds["prefill"] for t in takes),
        "base_synthesis_seconds": _median(t.synthesis_seconds for t in takes),
    }


def _median(seconds) -> float:
    return round(statistics.median(seconds), 6)  # to the microsecond


def token_levels(take) -> np.ndarray:
    """(tokens,): dB of each token's 40 ms over the 95th percentile of its utterance's tokens.

    Empty where the tokens cannot be found in the sound: there is none, or its length is not theirs.
    """
    counts = [len(sentence.tokens) for sentence in take.sentences if sentence.tokens]  # an empty one has no pause
    width, gap = take.sample_rate // TOKEN_RATE, int(take.gap_seconds * take.sample_rate)
    if not np.any(take.audio) or len(take.audio) != sum(counts) * width + gap * (len(counts) - 1):
        return np.empty(0)
    starts = np.cumsum([0, *(n * width + gap for n in counts[:-1])])
    sound = np.concatenate([take.audio[start : start + n * width] for start, n in zip(starts, counts, strict=True)])
    level = 10 * np.log10(np.square(sound.reshape(-1, width)).mean(1) + 1e-12)
    return level - np.percentile(level, 95)


def token_kinds(take) -> str:
    """Of each token a letter for its 40 ms of sound: s speech, '.' silence; '' where ``token_levels`` is empty."""
    return "".join("." if level < SILENCE_DB else "s" for level in token_levels(take))


def loudness(take) -> str:
    """Of each token a letter for its level: z as loud as the loud ones, each letter before it DECIBELS lower."""
    steps = np.clip(np.round(token_levels(take) / DECIBELS), -25, 0).astype(int)
    return "".join(chr(ord("z") + step) for step in steps)


def busy(rows: pd.DataFrame) -> float | None:
    """Share of rows that were timed while other work took more than BUSY_CORES; None where no row says."""
    load = pd.to_numeric(rows["other_load"]).dropna() if "other_load" in rows else []
    return float((load > BUSY_CORES).mean()) if len(load) else None


def count_empty(rows: pd.DataFrame) -> int:
    """How many utterances came out empty; rows made before there was that field say nothing, and count as spoken."""
    return int(rows["empty"].eq(True).sum()) if "empty" in rows else 0  # rows.empty is pandas' own


def row_settings(system: System, utterance: Utterance, context: dict, models: dict) -> dict:
    """What a row is of, under its key, which of a scored row begins with that of the same decoding unscored."""
    decoding = {**system.settings(), **asdict(utterance), **context}
    unscored = key(decoding | {"scored": False})
    if not system.scored:
        return {"key": unscored, **decoding}
    return {"key": f"{unscored}-{key(models)}", **decoding, **models}


def key(settings: dict) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


@contextmanager
def locked_rows(folder, name: str, rank: int = 0, world: int = 1):
    """The rows file that this process alone may write, without half a last line; of one process, all parts merged."""
    path = Path(folder) / "rows" / (f"{name}.jsonl" if world == 1 else f"{name}.rank{rank}.jsonl")
    with locked(path.with_name(f"{name}.rank{rank}.lock" if rank else f"{name}.lock")):
        drop_half_line(path)
        if world == 1:
            merge_rows(path)
        yield path


def rows_of_folder(folder) -> dict[str, dict]:
    """key -> row, of all rows files of a results folder, each process's part of them included.

    A scored row is also found under the key that it would have unscored, if no other row has that.
    """
    paths = sorted((Path(folder) / "rows").glob("*.jsonl"))
    rows = {row["key"]: row for path in paths for row in read_rows(path)}
    return {name.partition("-")[0]: row for name, row in rows.items()} | rows


def rows_together(path: Path, known: dict[str, dict], settings: dict, measure) -> list[dict]:
    """The rows of ``settings`` (name -> a row's settings), from ``known``, or all of them anew if one is missing.

    measure() -> name -> a row's numbers; the new rows go into the file and into ``known``.
    """
    keys = {name: key(each) for name, each in settings.items()}
    if any(each not in known for each in keys.values()):
        numbers = measure()
        rows = [{"key": keys[name], **each, **numbers[name]} for name, each in settings.items()]
        append_row(path, *rows)
        known.update((row["key"], row) for row in rows)
    return [known[each] for each in keys.values()]


def merge_rows(path: Path) -> None:
    """Put the processes' parts into ``path``, each key once, and remove them.

    Killed before a part is removed, the next merge adds none twice. InputError while a process still writes.
    """
    drop_half_line(path)
    for part in sorted(path.parent.glob(f"{path.stem}.rank*.jsonl")):
        with locked(part.with_suffix(".lock")):
            known = {row["key"] for row in read_rows(path)}
            append_row(path, *{r["key"]: r for r in read_rows(part) if r["key"] not in known}.values())
            part.unlink()


def to_frame(rows) -> pd.DataFrame:
    return pd.DataFrame.from_records(list(rows))
