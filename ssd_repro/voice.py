"""Text -> prompt -> speech tokens -> waveform, three ways, with the bundled voice."""

from __future__ import annotations

import base64
import hashlib
import html
import io
import math
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from . import checkpoints
from .codec import SAMPLE_RATE, TOKEN_RATE, Codec
from .decoding import DecodeConfig, DecodeResult, autoregressive, speculative
from .errors import InputError
from .sampling import Sampler, check_number
from .speech_lm import PRECISIONS, SpeechLM, choose_device
from .static import StaticLM
from .text import check_text, language, phone_ids, prompt, sentences

METHODS = ("autoregressive", "draft", "speculative")
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
        names = ["method", "text", "voice", "token_ids", "audio_seconds", "lm_seconds", "lm_rtf", "rtf", "seconds", "target_calls", "draft_calls", "acceptance_rate", "tokens_per_target_call", "tolerance", "draft_length", "stopped", "seed", "device", "sample_rate"]
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


def decode_config(phones: int, ratio: tuple[float, float], stop_ids: tuple[int, ...], **fields) -> DecodeConfig:
    """Upstream's rule of lengths with our ``ratio``: least and most speech tokens a text token."""
    low, high = ratio
    lengths = {"max_tokens": math.ceil(phones * high) + TOKEN_RATE, "min_tokens": math.floor(phones * low)}
    return DecodeConfig(**({"stop_ids": stop_ids} | lengths | fields))


class Voice:
    """The bundled voice: text front end, target, draft, codec. Made by :func:`load`."""

    sample_rate = SAMPLE_RATE
    gap_seconds = PAUSE_SECONDS
    front_end = "bundled"  # a CosyVoice's is upstream's, or tokens alone
    audible = True  # False: no waveform is made, and none is measured
    precision, compile = "fp32", False  # how the models run: a row's settings, as timings depend on it

    def __init__(
        self,
        codec: Codec,
        target: SpeechLM,
        draft: SpeechLM,
        about: dict,
        folder: Path,
        device: str,
        precision: str = "fp32",
        compile: bool = False,
        max_length: int = 1024,
    ):
        self.device = torch.device(device)
        self.codec, self.target, self.draft = (
            codec.to(self.device),
            target.to(self.device).cast(precision),
            draft.to(self.device).cast(precision),
        )
        self.precision, self.compile = precision, compile
        # What decodes: the models as they are, or in static caches, compiled.
        self.models = tuple(
            StaticLM(lm, max_length, compile=True) if compile else lm for lm in (self.target, self.draft)
        )
        for module in (self.codec, self.target, self.draft):
            module.requires_grad_(False)
        self.about, self.folder = about, folder
        self.names: tuple[str, ...] = tuple(about["voices"])
        self.sampler = Sampler(**about["sampler"])
        self.weights_id = hashlib.sha256("".join(sorted(about["sha256"].values())).encode()).hexdigest()[:12]

    def check(
        self, text, method="speculative", voice="af_heart", tolerance=0.4, draft_length=3, seed=0, temperature=None
    ) -> str:
        """Check every setting before any work -> the text, white space folded. Raises InputError."""
        if method not in METHODS:
            raise InputError(f"method {method!r} is unknown: choose one of {', '.join(METHODS)}")
        if voice not in self.names:
            more = f" and {len(self.names) - 9} more" if len(self.names) > 9 else ""
            raise InputError(f"voice {voice!r} is unknown: choose one of {', '.join(self.names[:9])}{more}")
        check_number("seed", seed, 0, 2**63 - 1, whole=True)
        self.config(1, tolerance, draft_length, **self.sampling(temperature))
        return check_text(text)

    def sampling(self, temperature: float | None) -> dict:
        """What ``config`` gets for another sampling temperature than the voice's own (None)."""
        return {} if temperature is None else {"sampler": replace(self.sampler, temperature=temperature)}

    def config(self, phones: int, tolerance: float, draft_length: int, **other) -> DecodeConfig:
        """Decoding settings for a sentence of ``phones`` text tokens."""
        book, ratio = self.codec.config.codebook_size, self.about["token_text_ratio"]
        stops = tuple(range(book, self.about["speech_vocab"]))
        settings = {"sampler": self.sampler, "tolerance": tolerance, "draft_length": draft_length}
        return decode_config(phones, ratio, stops, **(settings | other))

    def prefix(self, phones: list[int], voice: str) -> Tensor:
        """Prompt embeddings (1, T, hidden), zero-shot: the voice's prompt text, this text, the prompt's speech.

        A voice folder without prompts has a token for each voice instead (text.prompt).
        """
        shown = self.about.get("prompts", {}).get(voice, {"phones": [], "codes": []})
        ids = torch.tensor([prompt(phones, voice, shown["phones"])], device=self.device)
        codes = torch.tensor([shown["codes"]], dtype=torch.long, device=self.device)
        return torch.cat([self.target.model.embed_tokens(ids), self.target.speech_embedding(codes)], 1)

    def text_ids(self, text: str, voice: str) -> list[list[int]]:
        """Text token ids of each piece of ``text``."""
        return [phone_ids(piece, language(voice)) for piece in sentences(text)]

    def vocode(self, tokens: tuple[int, ...], voice: str) -> np.ndarray:
        """Speech tokens -> float32 (samples,) at ``sample_rate``."""
        return self.codec.decode(torch.tensor(tokens, device=self.device), self.names.index(voice))

    def utterances(self, count: int, seed: int = 0) -> list:
        """The first ``count`` held-out sentences, the voices in turn (``experiment.utterances``)."""
        from . import experiment

        return experiment.utterances(count, self.names, seed)

    def speak(
        self,
        text: str,
        method: str = "speculative",
        voice: str = "af_heart",
        tolerance: float = 0.4,
        draft_length: int = 3,
        seed: int = 0,
        on_tokens: Callable[[list[int]], None] | None = None,
        temperature: float | None = None,
    ) -> Take:
        """Speak ``text``; long text sentence by sentence. The same seed and settings give the same tokens.

        ``on_tokens`` is called with new speech tokens as they are accepted; ``temperature`` is
        that of draft and target, the voice's own by default. Raises InputError.
        """
        text = self.check(text, method, voice, tolerance, draft_length, seed, temperature)
        generator = torch.Generator(self.device).manual_seed(seed)
        began = time.perf_counter()
        pieces = self.text_ids(text, voice)
        seconds = {"text": time.perf_counter() - began}
        results, audio = [], []
        spent = 0.0
        for phones in pieces:
            result = self.decode(
                phones, method, voice, tolerance, draft_length, generator, on_tokens, **self.sampling(temperature)
            )
            results.append(result)
            began = time.perf_counter()
            audio += [self.vocode(result.tokens, voice)]
            audio += [np.zeros(int(self.gap_seconds * self.sample_rate), np.float32)]
            spent += time.perf_counter() - began
        for phase in results[0].seconds:
            seconds[phase] = sum(r.seconds[phase] for r in results)
        return Take(
            method,
            text,
            voice,
            tuple(t for r in results for t in r.tokens),
            np.concatenate(audio[:-1]),
            seconds | {"codec": spent},
            tuple(results),
            seed,
            str(self.device),
            tolerance,
            draft_length,
            self.sample_rate,
            self.gap_seconds,
        )

    def decode(
        self, phones, method, voice, tolerance, draft_length, generator, on_tokens=None, **other
    ) -> DecodeResult:
        """Speech tokens of one sentence of phone ids; ``other`` replaces decoding settings."""
        config = self.config(len(phones), tolerance, draft_length, **other)
        prefix = self.prefix(phones, voice)
        target, draft = self.models
        if method == "speculative":
            return speculative(target, draft, prefix, config, generator, on_tokens)
        return autoregressive(draft if method == "draft" else target, prefix, config, generator, on_tokens)

    def reference(self, voice: str) -> np.ndarray:
        """Teacher speech of ``voice``, float32 (samples,) at 24 kHz: what similarity is measured against."""
        import soundfile

        audio, rate = soundfile.read(
            self.folder / "references" / self.about["references"][voice], dtype="float32"
        )
        assert rate == SAMPLE_RATE, rate
        return audio


def load(
    path: str | Path | None = None,
    device: str = "auto",
    precision: str = "fp32",
    compile: bool = False,
    max_length: int = 1024,
    draft: str = "",
    data: str = "",
    front_end: str = "upstream",
) -> Voice:
    """Load a voice folder (the bundled one by default), or a CosyVoice 2 or 3. Raises InputError.

    device: auto, cpu or cuda. precision of target and draft: fp32 or bf16; the codec stays fp32.
    compile: decode in static caches of ``max_length`` positions (prompt and speech tokens of a
    sentence) with compiled forwards, CUDA graphs on CUDA; the first sentences then wait for the
    compiler. See ``static.StaticLM``. draft, data, front_end: of a CosyVoice alone, see
    ``zero_shot.load``.
    """
    if precision not in PRECISIONS:  # before any work
        raise InputError(f"precision {precision!r} is unknown: choose {' or '.join(PRECISIONS)}")
    device = choose_device(device)
    if device == "cuda":  # of several processes on a machine each takes its own GPU
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    folder = Path(path) if path else checkpoints.BUNDLED
    from . import zero_shot

    if zero_shot.is_cosyvoice(folder):
        return zero_shot.load(folder, device, precision, compile, draft, data, front_end)
    if draft or data:
        raise InputError(f"{folder} is a voice with its own draft and sentences: leave draft and data empty")
    return Voice(*checkpoints.load_voice(folder), folder, device, precision, compile, max_length)
