"""Rows that were decoded without metrics, as on a GPU machine without Whisper, scored here from their tokens."""

from __future__ import annotations

import json
from pathlib import Path

from ..errors import InputError
from ..files import append_row, write_text
from . import metrics
from .notebooks import progress
from .provenance import all_provenance
from .rows import key, locked_rows, rows_of_folder
from .samples import sound, voice_of


def score(folder: Path, notebook: str = "01_table1", whisper: str = "", speaker: str = ""):
    """Score the rows of ``notebook`` in ``folder`` -> the new rows, in rows/scored.jsonl; all else as it was measured.

    provenance.json then names the scored rows, so that the tables are made of them. A row is scored once; a killed
    run goes on. InputError if the notebook has no rows there, if the voice that made them is not here, or if a metric
    model is missing.
    """
    ran = all_provenance(folder)
    if notebook not in ran:
        raise InputError(f"{folder}/provenance.json says nothing of {notebook}: no rows of it are there to score")
    about = ran[notebook]
    voice, models = voice_of(about), metrics.models(whisper, speaker)
    metrics.load(whisper, speaker)
    with locked_rows(folder, "scored") as path:
        known = rows_of_folder(folder)
        due = [name for name in about["keys"] if name in known and not known[name]["scored"]]
        scored = {name: f"{name}-{key(models)}" for name in due}
        for name in progress([name for name in due if scored[name] not in known]):
            row = known[name]
            # Whisper finds words in the pauses of an utterance that came out empty.
            audio = sound(voice, row) if row["token_ids"] else voice.reference(row["voice"])[:0]
            reference = voice.reference(row["voice"])
            scores = metrics.measure(audio, voice.sample_rate, row["text"], reference, whisper, speaker)
            known[scored[name]] = row | {"key": scored[name], "scored": True} | models | scores
            append_row(path, known[scored[name]])
        about["keys"] = [scored.get(name, name) for name in about["keys"]]
        write_text(Path(folder) / "provenance.json", json.dumps(ran, indent=1, sort_keys=True) + "\n")
        return [known[name] for name in scored.values()]
