"""Text -> prompt -> speech tokens -> waveform, three ways, with any front."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ..decoding import batch, rules
from ..decoding.drafters import UNTRAINED, LanguageModel
from ..decoding.result import PHASES, Clock, DecodeConfig, DecodeResult
from ..decoding.sampling import Sampler
from ..decoding.speculative import MakeDrafter, collect, stream
from ..errors import InputError, check_number
from ..models.speech_lm import SpeechLM
from .sentences import Utterance
from .take import Take
from .text import check_text

FIRST_CHUNK = 8  # speech tokens
METHODS = ("autoregressive", "draft", "speculative")


class Front(Protocol):
    """What stands around the language model: text -> tokens before it, speech tokens -> sound behind it."""

    name: str  # bundled, upstream or tokens
    names: tuple[str, ...]  # of its voices
    sampler: Sampler
    audible: bool  # False: no waveform is made, and none is measured
    sample_rate: int
    gap_seconds: float  # silence between the pieces of a long text
    lookahead: int | None  # speech tokens that the sound of a token depends on, after it; None: all of the piece

    def pieces(self, text: str, voice: str) -> list[list[int]]:
        """Text token ids of each piece that is spoken at once."""

    def prompt(self, piece: list[int], voice: str) -> tuple[list[int], list[int], list[int]]:
        """(text, prompt text, prompt speech) for ``SpeechLM.prefix``."""

    def config(self, text_tokens: int, **fields) -> DecodeConfig:
        """Lengths and stop tokens for a piece of so many tokens; fields: the others of DecodeConfig, which win."""

    def vocode(self, tokens: tuple[int, ...], voice: str) -> np.ndarray:
        """Speech tokens, at least one -> float32 (samples,) at ``sample_rate``."""

    def reference(self, voice: str) -> np.ndarray:
        """Speech of ``voice``, float32 (samples,) at ``sample_rate``: what similarity is measured against."""

    def utterances(self, count: int, seed: int = 0) -> list[Utterance]:
        """``count`` utterances for an experiment, by ``seed`` alone."""


class Voice:
    """A front, a target and a draft that speak together. Made by :func:`load`.

    models: target and draft as they decode, themselves or in a runtime. drafters: others than the paper's by their
    names, functions of a prefix and the target's session; untrained: those that learned nothing, besides UNTRAINED.
    threads: of torch, on the CPU.
    """

    def __init__(
        self,
        front: Front,
        target: SpeechLM,
        draft: SpeechLM,
        weights_id: str,
        device: str,
        models: tuple[LanguageModel, LanguageModel] | None = None,
        drafters: dict[str, MakeDrafter] | None = None,
        precision: str = "fp32",
        runtime: str = "eager",
        threads: int = 1,
        untrained: dict[str, LanguageModel] | None = None,
    ) -> None:
        self.front, self.target, self.draft, self.models = front, target, draft, models or (target, draft)
        self.drafters = {"paper": self.models[1], **(drafters or {})}
        self.untrained = (untrained or {}) | UNTRAINED
        self.device, self.weights_id = torch.device(device), weights_id
        self.precision, self.runtime, self.threads, self._rules = precision, runtime, threads, {}
        self.front_end, self.names, self.sampler = front.name, front.names, front.sampler
        self.audible, self.sample_rate, self.gap_seconds = front.audible, front.sample_rate, front.gap_seconds
        self.vocode, self.reference, self.utterances = front.vocode, front.reference, front.utterances

    @property
    def others(self) -> list[str]:
        """Names of the trained drafters beside the paper's."""
        return [name for name in self.drafters if name != "paper"]

    def drafter_at(self, tolerance: float) -> str:
        """Who drafts if nobody is named: without loss the fastest on development sentences, else the paper's draft."""
        return "hidden" if tolerance == 0 and "hidden" in self.drafters else "paper"

    def check(
        self,
        text,
        method="speculative",
        voice="af_heart",
        tolerance=0.4,
        draft_length=3,
        seed=0,
        temperature=None,
        drafter="paper",
        rule=None,
        verification="token",
        confidence=0.0,
    ) -> str:
        """Check every setting before any work -> the text, white space folded. Raises InputError."""
        if method not in METHODS:
            raise InputError(f"method {method!r} is unknown: choose one of {', '.join(METHODS)}")
        if voice not in self.names:
            more = f" and {len(self.names) - 9} more" if len(self.names) > 9 else ""
            raise InputError(f"voice {voice!r} is unknown: choose one of {', '.join(self.names[:9])}{more}")
        if drafter not in (known := self.drafters | self.untrained):
            raise InputError(f"drafter {drafter!r} is not one of this voice's: choose {' or '.join(known)}")
        check_number("seed", seed, 0, 2**63 - 1, whole=True)
        how = self._decoding(temperature, rule, verification, confidence)
        self.config(1, tolerance, draft_length, **how)
        return check_text(text)

    def _decoding(self, temperature: float | None, rule: str | None, verification: str, confidence: float) -> dict:
        """What ``config`` gets besides tolerance and draft length; None: the voice's own temperature, the tolerance."""
        decoding = {"verification": verification, "confidence": confidence}
        if temperature is not None:
            decoding["sampler"] = replace(self.sampler, temperature=temperature)
        return decoding if rule is None else decoding | {"rule": self.rule(rule)}

    def rule(self, name: str) -> rules.ByToken:
        """An acceptance rule by its name, such as "matched:0.4"; each is made once. InputError for another name."""
        if name not in self._rules:
            self._rules[name] = rules.named(name, self.target.speech_embedding.weight)
        return self._rules[name]

    def config(self, text_tokens: int, tolerance: float, draft_length: int, **other) -> DecodeConfig:
        """Decoding settings for a piece of ``text_tokens`` tokens; ``other`` fields win."""
        settings = {"sampler": self.sampler, "tolerance": tolerance, "draft_length": draft_length}
        return self.front.config(text_tokens, **(settings | other))

    @torch.inference_mode()
    def prefix(self, piece: list[int], voice: str) -> Tensor:
        """A piece's text token ids -> embeddings (1, T, hidden) of all that stands before its speech."""
        parts = self.front.prompt(piece, voice)
        return self.target.prefix(*(torch.tensor(ids, dtype=torch.int64, device=self.device) for ids in parts))

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
        drafter: str = "paper",
        rule: str | None = None,
        verification: str = "token",
        confidence: float = 0.0,
    ) -> Take:
        """Speak ``text``; long text piece by piece. The same seed and settings give the same tokens.

        ``drafter`` proposes for the speculative method: the paper's draft, or another of ``drafters``. ``on_tokens``
        is called with new speech tokens as they are accepted; ``temperature`` is that of draft and target, the
        voice's own by default; ``rule``, of ``decoding.rules``, judges in place of the tolerance. ``verification`` and
        ``confidence`` as in ``DecodeConfig``: block with tolerance 0, and confidence on a CPU. Raises InputError.
        """
        how = (temperature, rule, verification, confidence)
        text = self.check(text, method, voice, tolerance, draft_length, seed, temperature, drafter, *how[1:])
        decoding = self._decoding(*how)
        generator = torch.Generator(self.device).manual_seed(seed)
        began = time.perf_counter()
        pieces = self.front.pieces(text, voice)
        text_seconds = time.perf_counter() - began
        settings = (method, voice, tolerance, draft_length, generator, on_tokens, drafter)
        results = [self.decode(piece, *settings, **decoding) for piece in pieces]
        phases = {phase: sum(r.seconds[phase] for r in results) for phase in PHASES}
        shared = {"method": method, "tolerance": tolerance, "draft_length": draft_length, "drafter": drafter}
        shared |= {"verification": verification, "confidence": confidence}
        return self._take(text, voice, seed, results, {"text": text_seconds, **phases}, shared)

    def _take(self, text: str, voice: str, seed: int, results: list[DecodeResult], seconds: dict, shared: dict) -> Take:
        """The sound of the pieces' tokens; seconds: those of all that came before it."""
        began, audio, gap = time.perf_counter(), [], np.zeros(int(self.gap_seconds * self.sample_rate), np.float32)
        for result in results:
            if result.tokens:
                audio += [gap, self.vocode(result.tokens, voice)]
        return Take(
            text=text,
            voice=voice,
            token_ids=tuple(t for r in results for t in r.tokens),
            audio=np.concatenate(audio[1:]) if audio else gap[:0],
            seconds={"text": 0.0, **seconds, "codec": time.perf_counter() - began},
            sentences=tuple(results),
            seed=seed,
            device=str(self.device),
            sample_rate=self.sample_rate,
            gap_seconds=self.gap_seconds,
            **shared,
        )

    def speak_together(
        self,
        texts: list[str],
        method: str = "speculative",
        voices: str | list[str] = "af_heart",
        tolerance: float = 0.4,
        draft_length: int = 3,
        seeds: int | list[int] = 0,
    ) -> list[Take]:
        """``speak`` of several texts in one batch: each forward serves all pieces of all texts that are not done.

        Target and the paper's draft run on the voice's runtime, or by torch where that has no batches (graphs).
        voices, seeds: one for all, or one for each text. A text has the distribution that it has by itself, and its
        tokens do not depend on the others', but they are other ones than ``speak``'s. Seconds of a take are those of
        the whole batch, its codec's its own.
        InputError as ``speak``'s, for method draft, and for lists that are not as long as texts.
        """
        named, seeded = (self._each(values, texts, what) for values, what in ((voices, "voices"), (seeds, "seeds")))
        if method not in ("autoregressive", "speculative"):
            raise InputError(f"method {method!r} is not one of a batch: choose autoregressive or speculative")
        texts = [
            self.check(text, method, name, tolerance, draft_length, seed)
            for text, name, seed in zip(texts, named, seeded, strict=True)
        ]
        pieces = [self.front.pieces(text, name) for text, name in zip(texts, named, strict=True)]
        owner = [i for i, several in enumerate(pieces) for _ in several]
        flat = [piece for several in pieces for piece in several]
        generators = [torch.Generator(self.device).manual_seed(seed) for seed in seeded]
        target, draft = (
            fast if hasattr(fast, "batch") else lm
            for fast, lm in zip(self.models, (self.target, self.draft), strict=True)
        )
        made = batch.decode(
            target,
            draft if method == "speculative" else None,
            [self.prefix(piece, named[i]) for i, piece in zip(owner, flat, strict=True)],
            [self.config(len(piece), tolerance, draft_length) for piece in flat],
            [generators[i] for i in owner],
        )
        shared = {"method": method, "tolerance": tolerance, "draft_length": draft_length}
        results = [[r for j, r in zip(owner, made, strict=True) if j == i] for i in range(len(texts))]
        return [
            self._take(text, name, seed, results[i], made[0].seconds, shared)
            for i, (text, name, seed) in enumerate(zip(texts, named, seeded, strict=True))
        ]

    def _each(self, values, texts: list[str], what: str) -> list:
        if not isinstance(texts, (list, tuple)) or not texts:
            raise InputError(f"texts is {texts!r}: give a list of at least one text")
        found = values if isinstance(values, (list, tuple)) else [values] * len(texts)
        if len(found) != len(texts):
            raise InputError(
                f"{what} has {len(found)} entries for {len(texts)} texts: give one for all, or one for each"
            )
        return list(found)

    def stream(
        self,
        text: str,
        method: str = "speculative",
        voice: str = "af_heart",
        tolerance: float = 0.4,
        draft_length: int = 3,
        seed: int = 0,
        temperature: float | None = None,
        drafter: str = "paper",
        rule: str | None = None,
        verification: str = "token",
        confidence: float = 0.0,
    ) -> Iterator[np.ndarray]:
        """``speak``'s audio in pieces, as soon as they are final: float32 (samples,); joined they are its audio.

        The first comes after FIRST_CHUNK speech tokens and the front's lookahead; each later one is about as long as
        all before it, so that making the piece's sound from its beginning again costs no more than twice. Raises
        InputError.
        """
        how = (temperature, rule, verification, confidence)
        text = self.check(text, method, voice, tolerance, draft_length, seed, temperature, drafter, *how[1:])
        settings = (method, voice, tolerance, draft_length, torch.Generator(self.device).manual_seed(seed), drafter)
        return self._stream(text, voice, settings, self._decoding(*how))

    def _stream(self, text: str, voice: str, settings: tuple, decoding: dict) -> Iterator[np.ndarray]:
        lookahead = self.front.lookahead
        pause = np.zeros(0, np.float32)  # before the first piece that has sound
        for piece in self.front.pieces(text, voice):
            tokens, sent, due = [], 0, math.inf if lookahead is None else FIRST_CHUNK + lookahead
            for new in self.rounds(piece, *settings, **decoding):
                tokens += new
                if len(tokens) >= due:
                    audio = self.vocode(tuple(tokens), voice)
                    final = len(audio) * (len(tokens) - lookahead) // len(tokens)
                    yield audio[sent:final] if sent else np.concatenate((pause, audio[:final]))
                    sent, due = final, 2 * len(tokens)
            if tokens:
                audio = self.vocode(tuple(tokens), voice)
                yield audio[sent:] if sent else np.concatenate((pause, audio))
                pause = np.zeros(int(self.gap_seconds * self.sample_rate), np.float32)

    def decode(
        self, piece, method, voice, tolerance, draft_length, generator, on_tokens=None, drafter="paper", **other
    ) -> DecodeResult:
        """Speech tokens of one piece's text token ids; ``other`` replaces decoding settings."""
        rounds = self.rounds(piece, method, voice, tolerance, draft_length, generator, drafter, **other)
        return collect(rounds, on_tokens)

    def rounds(
        self, piece, method, voice, tolerance, draft_length, generator, drafter="paper", **other
    ) -> Generator[list[int], None, DecodeResult]:
        """``decode`` round by round: yields the new speech tokens of each, returns the result.

        Embedding the prompt counts as prefill; what a front prepares once for each of its voices does not.
        """
        config = self.config(len(piece), tolerance, draft_length, **other)
        self.front.prompt(piece, voice)  # prepared from here on
        clock = Clock(self.device)
        prefix = self.prefix(piece, voice)
        clock.lap("prefill")
        target, draft = self.models
        proposing = (self.drafters | self.untrained)[drafter] if method == "speculative" else None
        result = yield from stream(draft if method == "draft" else target, proposing, prefix, config, generator)
        prefill = result.seconds["prefill"] + clock.seconds()["prefill"]
        return replace(result, seconds=result.seconds | {"prefill": prefill})
