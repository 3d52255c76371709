"""CosyVoice 2 and 3 where the bundled voice stands: zero-shot speech for the same experiments.

The language model and its draft are ours. What lies around it is a front: upstream's own
(text, prompt, flow, vocoder), or ``tokens``, which needs no upstream package and makes no
sound: the language model's numbers alone.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import groupby, islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..decoding.result import DecodeConfig
from ..decoding.sampling import Sampler
from ..errors import InputError
from ..models.cosyvoice import LAYOUTS, TEXT_MODEL
from . import libritts
from .audio import read_audio
from .sentences import Utterance

TOKENIZER_RATE = 16_000
# What upstream's examples put before the prompt text of version 3.
SYSTEM_TEXT = {2: "", 3: "You are a helpful assistant.<|endofprompt|>"}
MOST_SILENT = 5  # upstream drops what is more of silent tokens in a row (version 3)


@dataclass(frozen=True)
class Prompt:
    """A zero-shot prompt: text token ids (n,), speech tokens (m,); what the vocoder needs of it."""

    text: list[int]
    speech: list[int]
    vocoder: dict[str, Tensor] = field(default_factory=dict, repr=False)


class ZeroShot:
    """What both fronts share: its ``names`` are the utterances of ``known`` (LibriTTS), each usable as a prompt.

    A prompt's own preparation is in no time: it is enrolled once, as upstream's add_zero_shot_spk does.
    """

    gap_seconds = 0.0  # upstream joins its pieces without a pause
    lookahead = None

    def __init__(self, version: int, known: dict[str, libritts.Spoken] | None = None) -> None:
        self.version, self.known, self.sampler = version, known or {}, Sampler()
        self.names, self.enrol = tuple(self.known), lru_cache(maxsize=8)(self._enrol)

    def prompt(self, piece: list[int], voice: str) -> tuple[list[int], list[int], list[int]]:
        prompt = self.enrol(voice)
        return piece, prompt.text, prompt.speech

    def config(self, text_tokens: int, **fields) -> DecodeConfig:
        return LAYOUTS[self.version].config(text_tokens, **fields)

    def utterances(self, count: int, seed: int = 0) -> list[Utterance]:
        """``count`` sentences of the data, each with a prompt of its own speaker (``libritts.pairs``)."""
        chosen = libritts.pairs(self.known, count, seed)
        return [Utterance(said.id, said.text, prompt.id, seed + i) for i, (said, prompt) in enumerate(chosen)]

    def reference(self, voice: str) -> np.ndarray:
        """The prompt's audio, as in the paper."""
        return read_audio(self.known[voice].audio, self.sample_rate)


class Upstream(ZeroShot):
    """Text front end, speech tokenizer, flow and vocoder of FunAudioLLM/CosyVoice, from its own package."""

    name, audible = "upstream", True

    def __init__(self, folder: Path, version: int, known: dict[str, libritts.Spoken]) -> None:
        try:
            from cosyvoice.cli.cosyvoice import AutoModel
        except ImportError as error:
            raise InputError(
                f"upstream's package cosyvoice cannot be imported ({error}): put a clone of FunAudioLLM/CosyVoice and "
                "its third_party/Matcha-TTS on PYTHONPATH and install its needs, or choose front_end tokens (no sound)"
            ) from None
        super().__init__(version, known)
        cosyvoice = AutoModel(model_dir=str(folder))
        self.front, self.model, self.sample_rate = cosyvoice.frontend, cosyvoice.model, cosyvoice.sample_rate
        self.model.llm = None  # ours takes its place

    def pieces(self, text: str, voice: str) -> list[list[int]]:
        pieces = self.front.text_normalize(text, split=True)
        return [self.front._extract_text_token(piece)[0][0].tolist() for piece in pieces]

    def _enrol(self, voice: str) -> Prompt:
        spoken = self.known[voice]
        text = SYSTEM_TEXT[self.version] + self.front.text_normalize(spoken.text, split=False)
        found = self.front.frontend_zero_shot("", text, str(spoken.audio), self.sample_rate, "")
        ids = (found[name][0].tolist() for name in ("prompt_text", "llm_prompt_speech_token"))
        theirs = {"prompt_token": "flow_prompt_speech_token", "prompt_feat": "prompt_speech_feat"}
        vocoder = {name: found[key] for name, key in (theirs | {"embedding": "flow_embedding"}).items()}
        return Prompt(*ids, vocoder)

    @torch.inference_mode()
    def vocode(self, tokens: tuple[int, ...], voice: str) -> np.ndarray:
        """As upstream's ``tts`` without streaming."""
        kept, name = torch.tensor([without_long_silence(tokens, self.model.silent_tokens)]), "ssd-repro"
        self.model.hift_cache_dict[name] = None
        about = self.enrol(voice).vocoder
        sound = self.model.token2wav(token=kept, token_offset=0, uuid=name, finalize=True, **about)
        del self.model.hift_cache_dict[name]
        return sound[0].float().cpu().numpy()


def without_long_silence(tokens: tuple[int, ...], silent: list[int]) -> list[int]:
    """Of a run of silent tokens the first MOST_SILENT, as upstream hands them to the flow."""
    runs = groupby(tokens, lambda token: token in silent)
    return [token for is_silent, run in runs for token in islice(run, MOST_SILENT if is_silent else None)]


class Tokens(ZeroShot):
    """Text and speech tokens from the checkpoint's own tokenizers; no sound, no text normalisation."""

    name, audible, sample_rate = "tokens", False, 24_000

    def __init__(self, folder: Path, version: int, known: dict[str, libritts.Spoken] | None = None) -> None:
        import onnxruntime
        from transformers import AutoTokenizer, WhisperFeatureExtractor

        model = folder / f"speech_tokenizer_v{version}.onnx"
        if not model.exists():
            raise InputError(f"{folder} lacks {model.name}: give the whole folder of the released model")
        try:
            self.words = AutoTokenizer.from_pretrained(folder / TEXT_MODEL, local_files_only=True)
        except (OSError, ValueError) as error:
            raise InputError(f"{folder / TEXT_MODEL} has no readable tokenizer: {error}") from None
        super().__init__(version, known)
        # Added in upstream's order, of which only the first three can come up: its ids follow from it.
        self.words.add_tokens(["<|im_start|>", "<|im_end|>", "<|endofprompt|>"], special_tokens=True)
        self.mel = WhisperFeatureExtractor(feature_size=128)
        cuda = ("CUDAExecutionProvider", {"device_id": int(os.environ.get("LOCAL_RANK", "0"))})
        kinds = [cuda] if cuda[0] in onnxruntime.get_available_providers() else []
        self.tokenizer = onnxruntime.InferenceSession(model, providers=[*kinds, "CPUExecutionProvider"])

    def pieces(self, text: str, voice: str = "") -> list[list[int]]:
        return [self.words(text)["input_ids"]]

    def _enrol(self, voice: str) -> Prompt:
        spoken = self.known[voice]
        ids = self.words(SYSTEM_TEXT[self.version] + spoken.text)["input_ids"]
        return Prompt(ids, self.speech_tokens(spoken.audio))

    def speech_tokens(self, audio: Path) -> list[int]:
        """25 for each second, of at most 30 s. InputError for longer audio."""
        sound = read_audio(audio, TOKENIZER_RATE)
        if len(sound) > 30 * TOKENIZER_RATE:
            raise InputError(f"{audio} is too long: the speech tokenizer reads at most 30 s")
        mel = self.mel(sound, sampling_rate=TOKENIZER_RATE, padding="do_not_pad", return_tensors="np")
        mel = mel.input_features.astype(np.float32)
        feats, length = (given.name for given in self.tokenizer.get_inputs())
        return self.tokenizer.run(None, {feats: mel, length: np.array([mel.shape[2]], np.int32)})[0].ravel().tolist()

    def vocode(self, tokens: tuple[int, ...], voice: str) -> np.ndarray:
        """Silence of the right length: LM-RTF counts its seconds, no metric scores it."""
        return np.zeros(len(tokens) * self.sample_rate // 25, np.float32)
