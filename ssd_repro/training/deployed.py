"""A target as it is deployed: what training a draft for it must know, and speech that it says itself."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from ..decoding.result import DecodeConfig
from ..decoding.sampling import Sampler
from ..decoding.speculative import autoregressive
from ..errors import InputError
from ..files import write_text
from ..models import checkpoints, cosyvoice
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
        return read_data(data, self.lm.model.embed_tokens.num_embeddings, self.codes, self.prompts, self.needed)

    @torch.no_grad()
    def collate(self, examples: list[Example]):
        """Embeddings are frozen: they are looked up here, outside of what is trained."""
        return collate(self.lm, examples, self.stop, self.config(1).sampler.ras_window)


def voice_target(
    lm: SpeechLM, codes: int, sampler: Sampler, ratio: tuple[float, float], prompts: dict[str, dict] | None = None
) -> Target:
    """The bundled voice's kind of target; prompts: voice.json's."""

    def config(text_tokens: int) -> DecodeConfig:
        stops = tuple(range(codes, lm.speech_embedding.num_embeddings))
        return decode_config(max(1, text_tokens - 1), ratio, stops, sampler=sampler)  # 1: the task mark

    return Target(lm, codes, codes, config, prompts or {})


def load_target(path: Path) -> Target:
    """A voice folder, or what ``load_cosyvoice`` reads. InputError if it is neither, or damaged."""
    if (Path(path) / "voice.json").is_file():
        codec, lm, _, about = checkpoints.load_voice(Path(path))
        sampler = Bundled(codec, about, Path(path)).sampler
        return voice_target(lm, codec.config.codebook_size, sampler, about["token_text_ratio"], about.get("prompts"))
    lm = cosyvoice.load_cosyvoice(path)
    needed = (cosyvoice.END_OF_PROMPT,) if lm.layout.version == 3 else ()
    return Target(lm, cosyvoice.SPEECH_TOKENS, lm.layout.eos, lm.layout.config, needed=needed)


def sample(target: Target, examples: list[Example], settings: Settings, folder: Path, accelerator, log=print) -> list:
    """``examples`` with what the target says to their texts in place of their speech; kept in ``folder``.

    A row depends on (seed, its id) alone; the folder is a data folder, which a killed run goes on
    with (``share_rows``). InputError if it holds samples of another target, other data or other settings.
    """
    texts = [replace(one, speech=one.speech[:0], stopped=True, aligned=None) for one in examples]
    about = {"seed": settings.seed, "precision": settings.precision, "data": data_sha256(texts)}
    about["target"] = checkpoints.weights_sha256(target.lm)
    about["decoding"] = asdict(target.config(100))  # its lengths for 100 text tokens
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
    share_rows(folder, examples, lambda example: sample_one(asked, example, settings.seed).row(), accelerator, log)
    made = agree(accelerator, lambda: {row["id"]: Example.from_row(row) for row in rows_of(folder)})
    return [made[example.id] for example in examples if len(made[example.id].speech)]


@torch.inference_mode()
def sample_one(target: Target, example: Example, seed: int) -> Example:
    """``example`` with the target's own speech; the generator is seeded by (seed, id)."""
    device = target.lm.head.weight.device
    text, _, *prompt = (torch.from_numpy(part).long().to(device) for part in example.parts)
    own = int.from_bytes(hashlib.sha256(f"{seed}/{example.id}".encode()).digest()[:7], "big")
    generator = torch.Generator(device).manual_seed(own)
    result = autoregressive(target.lm, target.lm.prefix(text, *prompt), target.config(len(example.text)), generator)
    return Example.from_row(example.row() | {"speech": list(result.tokens), "stopped": result.stopped})
