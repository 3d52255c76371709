"""Of what a target said itself, the part that a recogniser heard right: more data for its training (notebook 12)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from ..errors import InputError
from ..files import append_row, drop_half_line, read_rows
from ..models.codec import Codec
from ..speech.text import VOICES
from .corpus import MANIFEST, read_metadata
from .data import Example
from .parallel import rows_of

SPELLING = 0.02  # wrong characters, of all, that may be how the recogniser spells a name


def heard_right(
    samples: Path, kept: Path, codec: Codec, hear: Callable[[np.ndarray, str], dict], progress: Callable = iter
) -> list[Example]:
    """The utterances of ``samples`` that ended by themselves and in which no word was heard wrong, or only spelt so.

    samples: what ``train-draft --recipe on-policy`` leaves in OUT/samples, of the bundled corpus. hear: samples at
    24 kHz and their text -> a row with word_errors, char_errors and chars; by another recogniser than the one that
    measures WER, or the target learns to please that one. kept: the file of these rows; the same call goes on from
    it. InputError if there is no speech, or if an utterance is none of the corpus.
    """
    known = {row["id"]: row for row in read_metadata(MANIFEST)}
    rows = {row["id"]: row for row in rows_of(samples)}
    if not rows:
        raise InputError(f"{samples} holds no speech: name the samples of ssd-repro train-draft --recipe on-policy")
    if strange := [name for name in rows if name.partition("/")[0] not in known]:
        raise InputError(f"{samples} holds {strange[0]}, which is none of the bundled corpus")
    drop_half_line(kept)
    heard = {row["id"]: row for row in read_rows(kept)}
    for name, row in progress(list(rows.items())):
        if name not in heard and row["stopped"] and row["speech"]:
            said = known[name.partition("/")[0]]
            sound = codec.decode(torch.tensor(row["speech"]), VOICES.index(said["voice"]))
            heard[name] = {"id": name, **hear(sound, said["text"])}
            append_row(kept, heard[name])
    return [Example.from_row(rows[name]) for name, row in heard.items() if name in rows and _right(row)]


def _right(row: dict) -> bool:
    return not row["word_errors"] or row["char_errors"] <= SPELLING * row["chars"]
