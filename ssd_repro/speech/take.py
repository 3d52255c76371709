"""One spoken text: its audio, its tokens, its times."""

from __future__ import annotations

import base64
import html
import io
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..decoding.result import DecodeResult
from ..files import write_bytes

FACTS = (
    "method text voice token_ids audio_seconds lm_seconds lm_rtf rtf seconds target_calls draft_calls acceptance_rate "
    "tokens_per_target_call tolerance draft_length drafter verification confidence stopped seed device "
    "sample_rate"
)


@dataclass(frozen=True)
class Take:
    """One spoken text. Seconds are wall time; lm_* covers the language model alone.

    A text may come out empty: a stop token comes first. Then ``token_ids`` is (), ``audio`` has no
    samples and what is divided by its length (``lm_rtf``, ``rtf``) is None. Of a longer text an
    empty piece has a DecodeResult without tokens in ``sentences``, and neither sound nor pause.
    """

    method: str
    text: str
    voice: str
    token_ids: tuple[int, ...]
    audio: np.ndarray = field(repr=False)  # float32 (samples,) at sample_rate
    seconds: dict[str, float]  # text, prefill, draft, verify, rest, codec
    sentences: tuple[DecodeResult, ...] = field(repr=False)  # one for each piece of the text
    seed: int
    device: str
    tolerance: float
    draft_length: int
    sample_rate: int
    gap_seconds: float  # silence between the pieces that have tokens
    drafter: str = "paper"  # who proposed, if the method is speculative, and how: see DecodeConfig
    verification: str = "token"
    confidence: float = 0.0

    @property
    def audio_seconds(self) -> float:
        return len(self.audio) / self.sample_rate

    @property
    def lm_seconds(self) -> float:
        return sum(result.lm_seconds for result in self.sentences)

    @property
    def synthesis_seconds(self) -> float:
        return sum(self.seconds.values())

    @property
    def lm_rtf(self) -> float | None:
        """Language-model seconds / audio seconds, the paper's LM-RTF; None without audio."""
        return self.lm_seconds / self.audio_seconds if len(self.audio) else None

    @property
    def rtf(self) -> float | None:
        """Seconds of the whole synthesis / audio seconds; None without audio."""
        return self.synthesis_seconds / self.audio_seconds if len(self.audio) else None

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
        return {"tokens": len(self.token_ids), **{name: getattr(self, name) for name in FACTS.split()}}

    def wav(self) -> bytes:
        """The audio as a 16-bit WAV file."""
        import soundfile

        with io.BytesIO() as buffer:
            soundfile.write(buffer, self.audio, self.sample_rate, format="WAV", subtype="PCM_16")
            return buffer.getvalue()

    def save(self, path: str | Path) -> Path:
        """Write a WAV file, whole or not at all. InputError if it cannot be written."""
        write_bytes(Path(path), self.wav())
        return Path(path)

    def _repr_html_(self) -> str:
        player = base64.b64encode(self.wav()).decode()
        times = f", LM-RTF {self.lm_rtf:.3f}, RTF {self.rtf:.3f}" if len(self.audio) else ""
        rate = "" if self.acceptance_rate is None else f", acceptance rate {self.acceptance_rate:.2f}"
        return (
            f'<figure><audio controls src="data:audio/wav;base64,{player}"></audio><figcaption>'
            f"<b>{self.method}</b>, {html.escape(self.voice)}: {html.escape(self.text)}<br>"
            f"{len(self.token_ids)} tokens, {self.audio_seconds:.2f} s of audio{times}{rate}</figcaption></figure>"
        )
