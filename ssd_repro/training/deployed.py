"""A target as it is deployed: what training a draft for it must know, and speech that it says itself."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..decoding.batch import decode as batch_decode
from ..decoding.result import DecodeConfig, DecodeResult
from ..decoding.sampling import Sampler, probabilities
from ..decoding.speculative import autoregressive
from ..errors import InputError
from ..files import write_text
from ..models import checkpoints, cosyvoice
from ..models.causal import FREE, GenerationLaw, load_causal
from ..models.generate import decode_config as config_of_generate
from ..models.speech_lm import SpeechLM
from ..speech.bundled import Bundled, decode_config
from .data import Example, collate, read_data
from .loop import Settings, check_identity, data_sha256
from .parallel import agree, rows_of, share_rows


@dataclass(frozen=True)
class Target:
    """A target, and what training and sampling need to know of it.

    codes    speech tokens are 0 .. codes-1; ``stop`` is the label after the last one
    config   number of the text's tokens -> how the target is decoded when it is deployed
    prompts  of a bundled kind of voice, voice.json's zero-shot prompts; None: it reads plain rows alone
    needed   text tokens that every text or its prompt must hold
    """

    lm: SpeechLM
    codes: int
    stop: int
    config: Callable[[int], DecodeConfig]
    prompts: dict[str, dict] | None = None
    needed: tuple[int, ...] = ()

    def read(self, data: Path) -> list[list[Example]]:
        texts = self.lm.model.get_input_embeddings().num_embeddings
        return read_data(data, texts, self.codes, self.prompts, self.needed)

    @property
    def window(self) -> int:
        """Tokens of history that ``deployed`` looks at."""
        return self.config(1).sampler.ras_window

    @property
    def temperature(self) -> float:
        """That of the sampler; 1 where it is greedy."""
        return self.config(1).sampler.temperature or 1.0

    def deployed(self, raw: Tensor, history: Tensor) -> Tensor:
        """What is sampled from, given logits (N, V) and history (N, window); without the ban on early stops."""
        return probabilities(raw, history, self.config(1).sampler)

    def decoding(self, example: Example) -> DecodeConfig:
        """How the target says this text when it is deployed."""
        return self.config(len(example.text))

    def described(self) -> dict:
        """``decoding`` for JSON: its lengths for 100 text tokens."""
        drafting = ("rule", "verification", "confidence")  # no part of how the target speaks by itself
        return {name: value for name, value in asdict(self.config(100)).items() if name not in drafting}

    @torch.no_grad()
    def collate(self, examples: list[Example]):
        """Embeddings are frozen: they are looked up here, outside of what is trained."""
        return collate(self.lm, examples, self.stop, self.window)


@dataclass(frozen=True)
class CausalTarget(Target):
    """A causal model of transformers: text and speech are ids of one vocabulary, generation_config.json decodes."""

    window = 1

    @property
    def temperature(self) -> float:
        return self.lm.model.generation_config.temperature or 1.0

    def deployed(self, raw: Tensor, history: Tensor) -> Tensor:
        """By the processors that do not look at tokens: temperature, top-k, top-p, min-p; not the penalties."""
        prompt = torch.full((1, 1), self.stop, device=raw.device)
        law = config_of_generate(self.lm.model, prompt, max_new_tokens=1).sampler
        return GenerationLaw([one for one in law.processors if type(one) in FREE], law.prompt, law.greedy)(raw, None)

    def decoding(self, example: Example) -> DecodeConfig:
        """By all of generation_config.json; where that has no length, until the model's positions end."""
        prompt = torch.from_numpy(np.concatenate((example.prompt_text, example.text, example.prompt_speech))).long()
        settings, room = self.lm.model.generation_config, self.lm.model.config.max_position_embeddings - len(prompt)
        asked = {} if settings.max_new_tokens or settings.max_length else {"max_new_tokens": max(1, room)}
        return config_of_generate(self.lm.model, prompt[None].to(self.lm.head.weight.device), **asked)

    def described(self) -> dict:
        return self.lm.model.generation_config.to_diff_dict()


def causal_target(folder: Path) -> CausalTarget:
    """InputError if the model has no end of speech, or a generation config that cannot be followed."""
    lm = load_causal(folder)
    stops = lm.model.generation_config.eos_token_id
    if stops is None:
        raise InputError(f"{folder}/generation_config.json has no eos_token_id: the token that ends the speech")
    stop = stops if isinstance(stops, int) else stops[0]
    config_of_generate(lm.model, torch.full((1, 1), stop), max_new_tokens=1)
    return CausalTarget(lm, lm.model.get_input_embeddings().num_embeddings, stop, config=None)


def voice_target(
    lm: SpeechLM, codes: int, sampler: Sampler, ratio: tuple[float, float], prompts: dict[str, dict] | None = None
) -> Target:
    """The bundled voice's kind of target; prompts: voice.json's."""

    def config(text_tokens: int) -> DecodeConfig:
        stops = tuple(range(codes, lm.speech_embedding.num_embeddings))
        return decode_config(max(1, text_tokens - 1), ratio, stops, sampler=sampler)  # 1: the task mark

    return Target(lm, codes, codes, config, prompts or {})


def load_target(path: Path) -> Target:
    """A voice folder, one of transformers, or what ``load_cosyvoice`` reads. InputError if it is none, or damaged."""
    if (Path(path) / "voice.json").is_file():
        codec, lm, _, about = checkpoints.load_voice(Path(path))
        sampler = Bundled(codec, about, Path(path)).sampler
        return voice_target(lm, codec.config.codebook_size, sampler, about["token_text_ratio"], about.get("prompts"))
    if (Path(path) / "config.json").is_file():
        return causal_target(Path(path))
    lm = cosyvoice.load_cosyvoice(path)
    needed = (cosyvoice.END_OF_PROMPT,) if lm.layout.version == 3 else ()
    return Target(lm, cosyvoice.SPEECH_TOKENS, lm.layout.eos, lm.layout.config, needed=needed)


def sample(
    target: Target, examples: list[Example], settings: Settings, folder: Path, accelerator, log=print, batch: int = 1
) -> list:
    """``examples`` with what the target says to their texts in place of their speech; kept in ``folder``.

    A row depends on (seed, its id) alone, made by itself or in a batch (which two give other rows); the folder is a
    data folder, which a killed run goes on with (``share_rows``). InputError if it holds samples of another target,
    other data or other settings, or if a batch of this target cannot be.
    """
    if batch > 1 and isinstance(target, CausalTarget):
        raise InputError(f"a batch of {batch} cannot be sampled from a causal model of transformers: make it 1")
    texts = [replace(one, speech=one.speech[:0], stopped=True, aligned=None) for one in examples]
    about = {"seed": settings.seed, "precision": settings.precision, "data": data_sha256(texts)}
    about["target"] = checkpoints.weights_sha256(target.lm)
    about["decoding"] = target.described()
    about["batch"] = True if batch > 1 else None  # None: as in folders made before there were batches
    path = folder / "about.json"

    def check() -> None:
        if not path.is_file():
            raise InputError(f"{path} is not seen by every process: --out must be on a disk that all nodes share")
        check_identity(folder, json.loads(path.read_text("utf-8")), json.loads(json.dumps(about)))

    if accelerator.is_main_process and not path.exists():
        write_text(path, json.dumps(about, indent=1) + "\n")
    accelerator.wait_for_everyone()
    agree(accelerator, check)
    # In deployment's precision, in a copy; embeddings of the prompt come from it too.
    lm = copy.deepcopy(target.lm).to(accelerator.device).eval().cast(settings.precision)
    asked = replace(target, lm=lm)

    def make(few: list[Example]) -> list[dict]:
        made = sample_batch(asked, few, settings.seed) if batch > 1 else [sample_one(asked, few[0], settings.seed)]
        return [example.row() for example in made]

    alike = sorted(examples, key=lambda example: len(example.text)) if batch > 1 else examples
    share_rows(folder, alike, make, accelerator, log, batch)
    made = agree(accelerator, lambda: {row["id"]: Example.from_row(row) for row in rows_of(folder)})
    return [made[example.id] for example in examples if len(made[example.id].speech)]


@torch.inference_mode()
def sample_one(target: Target, example: Example, seed: int) -> Example:
    """``example`` with the target's own speech; the generator is seeded by (seed, id)."""
    prefix, generator = _asked(target, example, seed)
    return _said(example, autoregressive(target.lm, prefix, target.decoding(example), generator))


@torch.inference_mode()
def sample_batch(target: Target, examples: list[Example], seed: int) -> list[Example]:
    """``sample_one`` of all at once; a row's tokens do not depend on its neighbours."""
    prefixes, generators = zip(*(_asked(target, example, seed) for example in examples), strict=True)
    configs = [target.decoding(example) for example in examples]
    made = batch_decode(target.lm, None, list(prefixes), configs, list(generators))
    return [_said(example, result) for example, result in zip(examples, made, strict=True)]


def _asked(target: Target, example: Example, seed: int) -> tuple[Tensor, torch.Generator]:
    device = target.lm.head.weight.device
    text, _, *prompt = (torch.from_numpy(part).long().to(device) for part in example.parts)
    own = int.from_bytes(hashlib.sha256(f"{seed}/{example.id}".encode()).digest()[:7], "big")
    return target.lm.prefix(text, *prompt), torch.Generator(device).manual_seed(own)


def _said(example: Example, result: DecodeResult) -> Example:
    return Example.from_row(example.row() | {"speech": list(result.tokens), "stopped": result.stopped})
