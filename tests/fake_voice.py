"""A voice without models: the real ``Voice`` in all but its weights, so that tests are fast."""

import random
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np

from ssd_repro.decoding.result import DecodeResult, Round
from ssd_repro.models.codec import CodecConfig
from ssd_repro.models.draft import make_draft
from ssd_repro.models.families import small_qwen2
from ssd_repro.models.speech_lm import SpeechLM
from ssd_repro.speech.bundled import Bundled
from ssd_repro.speech.text import VOICES
from ssd_repro.speech.voice import Voice

RATE = 24_000


TONE = (0.3 * np.sin(0.05 * np.arange(60 * RATE, dtype=np.float32))).astype(np.float32)


def tone(seconds: float) -> np.ndarray:
    return TONE[: int(seconds * RATE)]


class FakeFront(Bundled):
    """The bundled front with a codec and references that cost nothing."""

    def __init__(self):
        codec = SimpleNamespace(config=CodecConfig(), decode=lambda tokens, _: tone(len(tokens) / 25))
        about = {"voices": VOICES, "sampler": {}, "token_text_ratio": (1, 3), "speech_vocab": 6564}
        super().__init__(codec, about, None)

    def reference(self, voice):
        return tone(2.0 + self.names.index(voice))


class FakeVoice(Voice):
    """Tiny models stand in it for what is measured on models themselves; its own decoding asks none."""

    def __init__(self, weights_id: str = "fake", pause: float = 0.0):
        target = SpeechLM(small_qwen2(16, 32, 3, 4, 2, vocab=106), 6564).eval()
        super().__init__(FakeFront(), target, make_draft(target).requires_grad_(False), weights_id, "cpu")
        self.calls: list[tuple[str, int]] = []
        self.pause = pause

    def decode(
        self, phones, method, voice, tolerance, draft_length, generator, on_tokens=None, drafter="paper", **other
    ):
        """About two tokens a phone; a round accepts at random, from the generator's seed alone."""
        self.calls.append((method, generator.initial_seed()))
        time.sleep(self.pause)
        dice = random.Random(f"{method} {phones} {voice} {tolerance} {generator.initial_seed()}")
        rounds = [Round(0, 0, 1, "sampled")]
        while sum(r.emitted for r in rounds) < 2 * len(phones):
            if method != "speculative":
                rounds.append(Round(0, 0, 1, "sampled"))
                continue
            kept = dice.randint(0, draft_length)
            kind = "bonus" if kept == draft_length else "resampled"
            rounds.append(Round(draft_length, kept, kept + 1, kind, None if kind == "bonus" else 7))
        tokens = tuple(dice.randrange(6561) for _ in range(sum(r.emitted for r in rounds)))
        verify = {"autoregressive": 4e-3, "draft": 2e-3, "speculative": 5e-3}[method] * len(rounds)
        draft = 1e-3 * sum(r.drafted for r in rounds)
        seconds = {"prefill": 0.004, "draft": draft, "verify": verify, "rest": 0.001}
        calls = sum(r.drafted for r in rounds)
        return DecodeResult(tokens, True, tuple(rounds), len(rounds), calls, seconds)

    def speak(self, *arguments, **settings):
        """As the real one, but the seconds of the text and of the codec are always the same."""
        take = super().speak(*arguments, **settings)
        return replace(take, seconds={**take.seconds, "text": 0.01, "codec": 0.1})


def fake_load(path=None, device="auto", **other):
    return FakeVoice(pause=0.002)


def fake_measure(audio, rate, text, reference, whisper="", speaker=""):
    """Scores that depend on the audio alone."""
    words = len(text.split())
    errors = {"word_errors": len(audio) % 3, "words": words, "char_errors": len(audio) % 5, "chars": len(text)}
    dnsmos = {"p808": 3.5, "sig": 3.4, "bak": 3.9, "ovrl": 3.1}
    return {"transcript": text, **errors, **dnsmos, "similarity": 0.8 + len(audio) % 7 / 100}
