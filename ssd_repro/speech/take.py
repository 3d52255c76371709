"""One spoken text: its audio, its tokens, its times."""

from __future__ import annotations

import base64
import html
import io
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..decoding.result import DecodeResult
from ..models.codec import SAMPLE_RATE

PAUSE_SECONDS = 0.2  # between the pieces of a long text


@dataclass(frozen=True)
class Take:
    """One spoken text. Seconds are wall time; lm_* covers the language model alone."""

    method: str
    text: str
    voice: str
    token_ids: tuple[int, ...]
    audio: np.ndarray = field(repr=False)  # float32 (samples,) at sample_rate
    seconds: dict[str, float]  # text, prefill, draft, verify, rest, codec
    sentences: tuple[DecodeResult, ...] = field(repr=False)
    seed: int
    device: str
    tolerance: float
    draft_length: int
    sample_rate: int = SAMPLE_RATE
    gap_seconds: float = PAUSE_SECONDS  # between the pieces

    @property
    def audio_seconds(self) -> float:
        return len(self.audio) / self.sample_rate

    @property
    def lm_seconds(self) -> float:
        return sum(result.lm_seconds for result in self.sentences)

    @property
    def lm_rtf(self) -> float:
        """Language-model seconds / audio seconds, the paper's LM-RTF."""
        return self.lm_seconds / self.audio_seconds

    @property
    def rtf(self) -> float:
        """Seconds of the whole synthesis / audio seconds."""
        return sum(self.seconds.values()) / self.audio_seconds

    @property
    def target_calls(self) -> int:
        return 0 if self.method == "draft" else sum(r.target_calls for r in self.sentences)

    @property
    def draft_calls(self) -> int:
        key = "target_calls" if self.method == "draft" else "draft_calls"
        return sum(getattr(r, key) for r in self.sentences)

    @property
    def acceptance_rate(self) -> float | None:
        """Accepted drafted tokens / drafted tokens; None where nothing was drafted to be judged."""
        drafted = sum(r.drafted for r in self.sentences)
        return sum(r.accepted for r in self.sentences) / drafted if drafted else None

    @property
    def tokens_per_target_call(self) -> float | None:
        emitted = sum(x.emitted for r in self.sentences for x in r.rounds)
        return emitted / self.target_calls if self.target_calls else None

    @property
    def stopped(self) -> bool:
        """Every sentence ended by end-of-speech, none by its length limit."""
        return all(r.stopped for r in self.sentences)

    def summary(self) -> dict:
        """The facts of this take, ready for JSON."""
        names = [
            "method",
            "text",
            "voice",
            "token_ids",
            "audio_seconds",
            "lm_seconds",
            "lm_rtf",
            "rtf",
            "seconds",
            "target_calls",
            "draft_calls",
            "acceptance_rate",
            "tokens_per_target_call",
            "tolerance",
            "draft_length",
            "stopped",
            "seed",
            "device",
            "sample_rate",
        ]
        return {"tokens": len(self.token_ids), **{name: getattr(self, name) for name in names}}

    def wav(self) -> bytes:
        """The audio as a 16-bit WAV file."""
        import soundfile

        with io.BytesIO() as buffer:
            soundfile.write(buffer, self.audio, self.sample_rate, format="WAV", subtype="PCM_16")
            return buffer.getvalue()

    def save(self, path: str | Path) -> Path:
        """Write a WAV file, beside and renamed, so that no half-written one is left."""
        path = Path(path)
        handle, part = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as out:
                out.write(self.wav())
            os.chmod(part, 0o666 & ~_umask())
            os.replace(part, path)
        except BaseException:
            os.unlink(part)
            raise
        return path

    def _repr_html_(self) -> str:
        player = base64.b64encode(self.wav()).decode()
        rate = "" if self.acceptance_rate is None else f", acceptance rate {self.acceptance_rate:.2f}"
        return (
            f'<figure><audio controls src="data:audio/wav;base64,{player}"></audio><figcaption>'
            f"<b>{self.method}</b>, {html.escape(self.voice)}: {html.escape(self.text)}<br>"
            f"{len(self.token_ids)} tokens, {self.audio_seconds:.2f} s of audio, LM-RTF {self.lm_rtf:.3f}, "
            f"RTF {self.rtf:.3f}{rate}</figcaption></figure>"
        )


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
