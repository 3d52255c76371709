"""How good is a voice: rows of one or several ways to speak, scored, and their table (notebooks 14 and 15)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from math import isnan

import numpy as np
import pandas as pd

from ..files import append_row
from ..speech.sentences import Utterance
from . import metrics
from .provenance import row_context
from .rows import key, locked_rows, rows_of_folder

# What speaks: utterance, name of the system -> audio (samples,) at the voice's rate, whether it ended by itself,
# its length over one that is expected.
Render = Callable[[Utterance, str], tuple[np.ndarray, bool, float]]


def score(
    voice, systems: dict[str, dict], render: Render, utterances, folder, name, whisper="", progress=iter
) -> pd.DataFrame:
    """A row for each utterance and system, those in ``folder`` not made again; new ones go into rows/``name``.jsonl.

    systems: name -> all that its audio depends on, whose ``weights`` speak among it. A row stays as long as
    that does: a new target leaves the teacher's and the codec's.
    """
    references = key(voice.front.about["references"])
    shared = {**row_context(voice.device), **metrics.models(whisper), "references": references}
    keys = []
    with locked_rows(folder, name) as path:
        known = rows_of_folder(folder)
        for utterance in progress(utterances):
            for system, own in systems.items():
                settings = {**asdict(utterance), "system": system, **own, **shared}
                keys.append(key(settings))
                if keys[-1] not in known:
                    scores = _scores(voice, *render(utterance, system), utterance, whisper)
                    known[keys[-1]] = {"key": keys[-1], **settings, **scores}
                    append_row(path, known[keys[-1]])
    return pd.DataFrame([known[k] for k in keys])


def _scores(voice, audio, stopped: bool, length_ratio: float, utterance: Utterance, whisper: str) -> dict:
    def similarity(name: str) -> float:
        found = metrics.speaker_similarity(audio, voice.reference(name), voice.sample_rate)
        return -1.0 if isnan(found) else found  # no speech

    return {
        "stopped": stopped,
        "length_ratio": length_ratio,
        "own_voice": max(voice.names, key=similarity) == utterance.voice,
        **metrics.measure(audio, voice.sample_rate, utterance.text, voice.reference(utterance.voice), whisper),
    }


def table(rows: pd.DataFrame, length: str = "length / teacher") -> pd.DataFrame:
    """WER %, P808, OVRL, SS and ends of speech, one row per system; ``length``: what length_ratio is called."""

    def line(group: pd.DataFrame) -> pd.Series:
        return pd.Series(
            {
                "WER %": 100 * group.word_errors.sum() / group.words.sum(),
                "P808": group.p808.mean(),
                "OVRL": group.ovrl.mean(),
                "SS": group.similarity.mean(),
                "own voice nearest": group.own_voice.mean(),
                length: group.length_ratio.median(),
                "within 25 %": (abs(group.length_ratio - 1) <= 0.25).mean(),
                "ended by itself": group.stopped.mean(),
                "n": len(group),
            }
        )

    return rows.groupby("system", sort=False).apply(line, include_groups=False).round(3)
