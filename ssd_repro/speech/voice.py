"""Text -> prompt -> speech tokens -> waveform, three ways, with the bundled voice."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..decoding.result import DecodeConfig, DecodeResult
from ..decoding.sampling import Sampler
from ..decoding.speculative import autoregressive, speculative
from ..errors import InputError, check_number
from ..models.codec import SAMPLE_RATE, TOKEN_RATE, Codec
from ..models.runtimes.graphs import StaticLM
from ..models.speech_lm import SpeechLM
from .audio import read_audio
from .sentences import Utterance, utterances
from .take import PAUSE_SECONDS, Take
from .text import check_text, language, phone_ids, prompt, sentences

METHODS = ("autoregressive", "draft", "speculative")


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
        before, text = prompt(phones, voice, shown["phones"])
        ids = (torch.tensor(part, dtype=torch.long, device=self.device) for part in (text, before, shown["codes"]))
        return self.target.prefix(*ids)

    def text_ids(self, text: str, voice: str) -> list[list[int]]:
        """Text token ids of each piece of ``text``."""
        return [phone_ids(piece, language(voice)) for piece in sentences(text)]

    def vocode(self, tokens: tuple[int, ...], voice: str) -> np.ndarray:
        """Speech tokens -> float32 (samples,) at ``sample_rate``."""
        return self.codec.decode(torch.tensor(tokens, device=self.device), self.names.index(voice))

    def utterances(self, count: int, seed: int = 0) -> list[Utterance]:
        """The first ``count`` held-out sentences, the voices in turn (``sentences.utterances``)."""

        return utterances(count, self.names, seed)

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
        return read_audio(self.folder / "references" / self.about["references"][voice], SAMPLE_RATE)
