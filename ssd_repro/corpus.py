"""The teacher's corpus: Kokoro-82M reads LJSpeech transcripts in six voices.

The plan (which voice reads which line) is a pure function of the transcript
list, so anyone can re-make the same speech; every row carries the SHA-256 of
its samples. Teacher packages: the ``train`` extra.
"""

from __future__ import annotations

import csv
import hashlib
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .text import VOICES

SAMPLE_RATE = 24_000
FIELDS = ("id", "voice", "text", "samples", "sha256_int16_24k")


@dataclass(frozen=True)
class Line:
    """One sentence of the corpus: ``id`` is ``<voice>_<LJ id>``."""

    id: str
    voice: str
    text: str


def plan(transcripts: Path, shortest: int = 25, longest: int = 150, seed: int = 0) -> list[Line]:
    """Deal transcripts (``id|text`` lines) to the six voices, in a fixed order.

    Lines of ``shortest`` .. ``longest`` characters are sorted by id, shuffled
    with ``random.Random(seed)`` and dealt in pairs to the voices in turn.
    """
    pairs = [row.split("|", 1) for row in Path(transcripts).read_text("utf-8").splitlines() if row]
    kept = sorted((i, t) for i, t in pairs if shortest <= len(t) <= longest)
    random.Random(seed).shuffle(kept)
    dealt = ((VOICES[(k + 1) // 2 % len(VOICES)], i, t) for k, (i, t) in enumerate(kept))
    return [Line(f"{voice}_{i}", voice, text) for voice, i, text in dealt]


def to_int16(audio: np.ndarray) -> np.ndarray:
    """float samples in [-1, 1] -> int16, the form that is hashed and stored."""
    return np.round(np.clip(audio, -1, 1) * 32767).astype(np.int16)


def digest(pcm: np.ndarray) -> str:
    """SHA-256 of int16 samples at 24 kHz, little endian."""
    return hashlib.sha256(pcm.astype("<i2").tobytes()).hexdigest()


def load_teacher(model: Path, voices: Path):
    """Kokoro on one ONNX thread: its samples are then the same from run to run."""
    import kokoro_onnx
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    return kokoro_onnx.Kokoro.from_session(session, str(voices))


def teach(teacher, line: Line) -> np.ndarray:
    """Teacher speech for one line: int16 (samples,) at 24 kHz."""
    lang = "en-us" if line.voice.startswith("a") else "en-gb"
    audio, rate = teacher.create(line.text, voice=line.voice, speed=1.0, lang=lang)
    assert rate == SAMPLE_RATE, rate
    return to_int16(audio)


def build(teacher, lines: list[Line], out: Path, progress=lambda it: it) -> Path:
    """Speak ``lines`` into ``out/*.flac`` and ``out/metadata.csv``; resumes after a kill."""
    import soundfile

    out.mkdir(parents=True, exist_ok=True)
    index = out / "metadata.csv"
    done = {row["id"] for row in read_metadata(index)} if index.exists() else set()
    with index.open("a", newline="", encoding="utf-8") as handle:
        writer = csv.writer(handle, delimiter="|", quoting=csv.QUOTE_NONE, escapechar="\\")
        if not done and handle.tell() == 0:
            writer.writerow(FIELDS)
        for line in progress([line for line in lines if line.id not in done]):
            pcm = teach(teacher, line)
            part = out / f".{line.id}.part"
            soundfile.write(part, pcm, SAMPLE_RATE, format="FLAC")
            part.replace(out / f"{line.id}.flac")
            writer.writerow((line.id, line.voice, line.text, len(pcm), digest(pcm)))
            handle.flush()
    return index


def read_metadata(index: Path) -> list[dict[str, str]]:
    """Rows of a corpus ``metadata.csv`` (``|``-separated, no quoting)."""
    with Path(index).open(newline="", encoding="utf-8") as handle:
        return list(csv.DictReader(handle, delimiter="|", quoting=csv.QUOTE_NONE, escapechar="\\"))
