"""Rows that were decoded without metrics, as on a GPU machine without Whisper, scored here from their tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from ..errors import InputError
from ..files import append_row
from . import metrics
from .provenance import all_provenance
from .rows import key, locked_rows, rows_of_folder
from .samples import sound, voice_of


def score(folder: Path, notebook: str = "01_table1", whisper: str = "", speaker: str = "", progress: Callable = iter):
    """Score the rows of ``notebook`` in ``folder`` -> the new rows, in rows/scored.jsonl; all else as it was measured.

    A row is scored once; a killed run goes on. InputError if the notebook has no rows there, if the voice that
    made them is not here, or if a metric model is missing.
    """
    about = all_provenance(folder).get(notebook)
    if about is None:
        raise InputError(f"{folder}/provenance.json says nothing of {notebook}: no rows of it are there to score")
    voice, models = voice_of(about), metrics.models(whisper, speaker)
    metrics.load(whisper, speaker)
    with locked_rows(folder, "scored") as path:
        known = rows_of_folder(folder)
        return list(_scored(voice, about["keys"], known, models, path, (whisper, speaker), progress))


def _scored(voice, keys: list[str], known: dict[str, dict], models, path, names, progress) -> Iterable[dict]:
    for name in progress([name for name in keys if name in known and not known[name]["scored"]]):
        row = known[name]
        if (own := f"{name}-{key(models)}") not in known:
            # Whisper finds words in the pauses of an utterance that came out empty.
            audio = sound(voice, row) if row["token_ids"] else voice.reference(row["voice"])[:0]
            scores = metrics.measure(audio, voice.sample_rate, row["text"], voice.reference(row["voice"]), *names)
            known[own] = row | {"key": own, "scored": True} | models | scores
            append_row(path, known[own])
        yield known[own]
