"""The bundled voice around its language model: phones before it, the codec behind it."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch

from ..decoding.result import DecodeConfig
from ..decoding.sampling import Sampler
from ..models.codec import SAMPLE_RATE, TOKEN_RATE, Codec
from .audio import read_audio
from .sentences import Utterance, utterances
from .text import language, phone_ids, prompt_and_text, sentences


class Bundled:
    """The front of a voice folder; about: its voice.json, where ``prompts`` has the zero-shot prompt of each voice."""

    name = "bundled"
    audible = True
    sample_rate = SAMPLE_RATE
    gap_seconds = 0.2
    lookahead = 10  # the codec's convolutions reach 9 tokens ahead, WORLD's window another

    def __init__(self, codec: Codec, about: dict, folder: Path, device: str = "cpu") -> None:
        self.codec, self.about, self.folder, self.device = codec, about, folder, device
        self.names: tuple[str, ...] = tuple(about["voices"])
        self.sampler = Sampler(**about["sampler"])

    def pieces(self, text: str, voice: str) -> list[list[int]]:
        return [phone_ids(piece, language(voice)) for piece in sentences(text)]

    def prompt(self, piece: list[int], voice: str) -> tuple[list[int], list[int], list[int]]:
        shown = self.about.get("prompts", {}).get(voice, {"phones": [], "codes": []})
        prompt_text, text = prompt_and_text(piece, voice, shown["phones"])
        return text, prompt_text, shown["codes"]

    def config(self, text_tokens: int, **fields) -> DecodeConfig:
        stops = range(self.codec.config.codebook_size, self.about["speech_vocab"])
        return decode_config(text_tokens, self.about["token_text_ratio"], tuple(stops), **fields)

    def vocode(self, tokens: tuple[int, ...], voice: str) -> np.ndarray:
        return self.codec.decode(torch.tensor(tokens, device=self.device), self.names.index(voice))

    def reference(self, voice: str) -> np.ndarray:
        """The teacher's speech."""
        return read_audio(self.folder / "references" / self.about["references"][voice], SAMPLE_RATE)

    def utterances(self, count: int, seed: int = 0) -> list[Utterance]:
        return utterances(count, self.names, seed)


def decode_config(phones: int, ratio: tuple[float, float], stop_ids: tuple[int, ...], **fields) -> DecodeConfig:
    """Upstream's rule of lengths with our ``ratio``: least and most speech tokens for each text token."""
    low, high = (phones * each for each in ratio)
    lengths = {"max_tokens": math.ceil(high) + TOKEN_RATE, "min_tokens": math.floor(low)}
    return DecodeConfig(**({"stop_ids": stop_ids} | lengths | fields))
