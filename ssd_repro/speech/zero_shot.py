"""CosyVoice 2 and 3 where the bundled voice stands: zero-shot speech for the same experiments.

The language model and its draft are ours. What lies around it is a front end: upstream's own
(text, prompt, flow, vocoder), or ``tokens``, which needs no upstream package and makes no
sound: the language model's numbers alone.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..decoding.sampling import Sampler
from ..errors import InputError
from ..files import sha256
from ..models import checkpoints, cosyvoice
from ..models.cosyvoice import TEXT_MODEL, CosyVoiceLM, load_cosyvoice
from ..models.runtimes.graphs import StaticLM
from ..models.speech_lm import SpeechLM
from . import libritts
from .audio import read_audio
from .sentences import Utterance
from .voice import Voice

MAX_LENGTH = 2048  # positions of a static cache: 80 text tokens (upstream's pieces) x 20, prompt of 10 s, texts
TOKENIZER_RATE = 16_000
FRONT_ENDS = ("upstream", "tokens")
# What upstream's examples put before the prompt text of version 3.
SYSTEM_TEXT = {2: "", 3: "You are a helpful assistant.<|endofprompt|>"}
MOST_SILENT = 5  # upstream drops what is more of silent tokens in a row (version 3)


@dataclass(frozen=True)
class Prompt:
    """A zero-shot prompt: text token ids (n,), speech tokens (m,); what the vocoder needs of it."""

    text: list[int]
    speech: list[int]
    vocoder: dict[str, Tensor] = field(default_factory=dict, repr=False)


class Upstream:
    """Text front end, speech tokenizer, flow and vocoder of FunAudioLLM/CosyVoice, from its own package."""

    audible = True

    def __init__(self, folder: Path, version: int) -> None:
        try:
            from cosyvoice.cli.cosyvoice import AutoModel
        except ImportError as error:
            raise InputError(
                f"upstream's package cosyvoice cannot be imported ({error}): put a clone of FunAudioLLM/CosyVoice and "
                "its third_party/Matcha-TTS on PYTHONPATH and install what it needs, or choose front_end tokens "
                "(no sound, the language model's numbers alone)"
            ) from None
        self.cosyvoice = AutoModel(model_dir=str(folder))
        self.front, self.model = self.cosyvoice.frontend, self.cosyvoice.model
        self.model.llm = None  # ours takes its place
        self.version, self.sample_rate = version, self.cosyvoice.sample_rate

    def pieces(self, text: str) -> list[list[int]]:
        """Text token ids of each piece that upstream speaks at once."""
        return [self._ids(piece) for piece in self.front.text_normalize(text, split=True)]

    def _ids(self, text: str) -> list[int]:
        return self.front._extract_text_token(text)[0][0].tolist()

    def prompt(self, text: str, audio: Path) -> Prompt:
        text = SYSTEM_TEXT[self.version] + self.front.text_normalize(text, split=False)
        found = self.front.frontend_zero_shot("", text, str(audio), self.sample_rate, "")
        names = ("flow_prompt_speech_token", "prompt_speech_feat", "flow_embedding")
        ids = (found[name][0].tolist() for name in ("prompt_text", "llm_prompt_speech_token"))
        return Prompt(*ids, {name: found[name] for name in names})

    @torch.inference_mode()
    def vocode(self, tokens: list[int], prompt: Prompt) -> np.ndarray:
        """Speech tokens -> float32 (samples,), as upstream's ``tts`` without streaming."""
        kept = without_long_silence(tokens, self.model.silent_tokens)
        if not kept:
            return np.zeros(0, np.float32)
        about = prompt.vocoder
        self.model.hift_cache_dict["ssd-repro"] = None
        sound = self.model.token2wav(
            token=torch.tensor([kept]),
            prompt_token=about["flow_prompt_speech_token"],
            prompt_feat=about["prompt_speech_feat"],
            embedding=about["flow_embedding"],
            token_offset=0,
            uuid="ssd-repro",
            finalize=True,
        )
        del self.model.hift_cache_dict["ssd-repro"]
        return sound[0].float().cpu().numpy()


def without_long_silence(tokens: list[int], silent: list[int]) -> list[int]:
    """Of a run of silent tokens the first MOST_SILENT, as upstream hands them to the flow."""
    kept, run = [], 0
    for token in tokens:
        run = run + 1 if token in silent else 0
        if run <= MOST_SILENT:
            kept.append(token)
    return kept


class Tokens:
    """Text and speech tokens from the checkpoint's own tokenizers; no sound, no text normalisation."""

    audible = False
    sample_rate = 24_000

    def __init__(self, folder: Path, version: int) -> None:
        import onnxruntime
        from transformers import AutoTokenizer, WhisperFeatureExtractor

        files = sorted(folder.glob(f"speech_tokenizer_v{version}.onnx"))
        if not files or not (folder / TEXT_MODEL).is_dir():
            missing = TEXT_MODEL if files else f"speech_tokenizer_v{version}.onnx"
            raise InputError(f"{folder} lacks {missing}: give the whole folder of the released model")
        try:
            self.words = AutoTokenizer.from_pretrained(folder / TEXT_MODEL, local_files_only=True)
        except (OSError, ValueError) as error:
            raise InputError(f"{folder / TEXT_MODEL} has no readable tokenizer: {error}") from None
        # Added in upstream's order, of which only the first three can come up: its ids follow from it.
        marks = ["<|im_start|>", "<|im_end|>", "<|endofprompt|>"]
        self.words.add_tokens(marks, special_tokens=True)
        self.mel = WhisperFeatureExtractor(feature_size=128)
        mine = {"device_id": int(os.environ.get("LOCAL_RANK", "0"))}
        kinds = (
            [("CUDAExecutionProvider", mine)]
            if "CUDAExecutionProvider" in onnxruntime.get_available_providers()
            else []
        )
        self.tokenizer = onnxruntime.InferenceSession(files[0], providers=[*kinds, "CPUExecutionProvider"])
        self.version = version

    def pieces(self, text: str) -> list[list[int]]:
        return [self.words(text)["input_ids"]]

    def prompt(self, text: str, audio: Path) -> Prompt:
        return Prompt(self.words(SYSTEM_TEXT[self.version] + text)["input_ids"], self.speech_tokens(audio))

    def speech_tokens(self, audio: Path) -> list[int]:
        """25 a second, of at most 30 s. InputError for longer audio."""
        sound = read_audio(audio, TOKENIZER_RATE)
        if len(sound) > 30 * TOKENIZER_RATE:
            lasts = len(sound) / TOKENIZER_RATE
            raise InputError(f"{audio} lasts {lasts:.1f} s: the speech tokenizer reads at most 30 s")
        mel = self.mel(sound, sampling_rate=TOKENIZER_RATE, padding="do_not_pad", return_tensors="np")
        feats, length = self.tokenizer.get_inputs()
        mel = mel.input_features.astype(np.float32)
        given = {feats.name: mel, length.name: np.array([mel.shape[2]], np.int32)}
        return self.tokenizer.run(None, given)[0].ravel().tolist()

    def vocode(self, tokens: list[int], prompt: Prompt) -> np.ndarray:
        """Silence of the right length: LM-RTF counts its seconds, no metric listens to it."""
        return np.zeros(len(tokens) * self.sample_rate // 25, np.float32)


class ZeroShot(Voice):
    """A CosyVoice checkpoint with a draft; its ``names`` are the utterances of ``data``, each usable as a prompt.

    Spoken and timed as the bundled voice. A prompt's own preparation is in no time: it is
    enrolled once, as upstream's add_zero_shot_spk does.
    """

    gap_seconds = 0.0  # upstream joins its pieces without a pause

    def __init__(self, target: CosyVoiceLM, draft: SpeechLM, front, known, weights_id, device, precision, compile):
        self.device = torch.device(device)
        self.target, self.draft = (lm.to(self.device).cast(precision) for lm in (target, draft))
        self.precision, self.compile, self.front_end = precision, compile, type(front).__name__.lower()
        lms = (self.target, self.draft)
        self.models = tuple(StaticLM(lm, MAX_LENGTH, compile=True) if compile else lm for lm in lms)
        self.front, self.known, self.weights_id = front, known, weights_id
        self.names, self.sampler = tuple(known), Sampler()
        self.audible, self.sample_rate = front.audible, front.sample_rate
        self.enrol = lru_cache(maxsize=8)(self._enrol)

    def _enrol(self, voice: str) -> Prompt:
        return self.front.prompt(self.known[voice].text, self.known[voice].audio)

    def utterances(self, count: int, seed: int = 0) -> list[Utterance]:
        """``count`` sentences of the data, each with a prompt of its own speaker (``libritts.pairs``)."""
        chosen = libritts.pairs(self.known, count, seed)
        return [Utterance(said.id, said.text, prompt.id, seed + i) for i, (said, prompt) in enumerate(chosen)]

    def config(self, words: int, tolerance: float, draft_length: int, **other):
        settings = {"sampler": self.sampler, "tolerance": tolerance, "draft_length": draft_length}
        return cosyvoice.decode_config(self.target.layout, words, **(settings | other))

    def text_ids(self, text: str, voice: str) -> list[list[int]]:
        return self.front.pieces(text)

    def prefix(self, words: list[int], voice: str) -> Tensor:
        """[sos, prompt text, text, task, prompt speech] -> embeddings (1, T, hidden)."""
        prompt = self.enrol(voice)
        parts = (words, prompt.text, prompt.speech)
        return self.target.prefix(*(torch.tensor(p, dtype=torch.int64, device=self.device) for p in parts))

    def vocode(self, tokens: tuple[int, ...], voice: str) -> np.ndarray:
        return self.front.vocode(list(tokens), self.enrol(voice))

    def reference(self, voice: str) -> np.ndarray:
        """The prompt's audio at the vocoder's rate: what similarity is measured against, as in the paper."""
        return read_audio(self.known[voice].audio, self.sample_rate)


def is_cosyvoice(folder: Path) -> bool:
    return (folder / "llm.pt").is_file() or (folder / TEXT_MODEL).is_dir()


def load(folder: Path, device: str, precision: str, compile: bool, draft: str, data: str, front_end: str) -> ZeroShot:
    """A released CosyVoice folder, its draft, LibriTTS. InputError that names what is missing."""
    if front_end not in FRONT_ENDS:
        raise InputError(f"front_end {front_end!r} is unknown: choose {' or '.join(FRONT_ENDS)}")
    for name, value, what in (
        ("draft", draft, "the folder that `ssd-repro train-draft` wrote for it"),
        ("data", data, "the folder of LibriTTS test-clean, or a hub name such as mythicinfinity/libritts"),
    ):
        if not value:
            raise InputError(f"{folder} is a CosyVoice, which also needs {name}: {what}")
    if device.startswith("cuda"):
        torch.cuda.set_device(device)  # upstream's package takes the current one
    target = load_cosyvoice(folder)
    layout = target.layout
    small = checkpoints.load_draft(Path(draft), target)
    known = libritts.index(data)
    front = (Upstream if front_end == "upstream" else Tokens)(folder, layout.version)
    parts = [checkpoints.weights_sha256(lm) for lm in (target, small)]
    parts += [sha256(folder / name) for name in ("flow.pt", "hift.pt") if (folder / name).is_file()]
    weights_id = hashlib.sha256("".join(parts).encode()).hexdigest()[:12]
    return ZeroShot(target, small, front, known, weights_id, device, precision, compile)
