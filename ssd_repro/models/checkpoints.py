"""Models on disk: the bundled voice and a trained draft, safetensors and the JSON that vouches for them; CosyVoice."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ..errors import InputError
from ..files import sha256
from .codec import Codec, CodecConfig
from .draft import make_draft, own_parameters, split_of
from .speech_lm import SpeechLM, small_qwen2

BUNDLED = Path(__file__).parents[1] / "weights"
FORMAT = 2
PARTS = ("codec", "target", "draft")


def weights_sha256(lm: nn.Module, dtype: torch.dtype = torch.bfloat16) -> str:
    """SHA-256 over a model's weights as ``dtype``: fp32 and bf16 copies of one model have the same as bf16."""
    digest = hashlib.sha256()
    for name, value in sorted(lm.state_dict().items()):
        digest.update(f"{name} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().to("cpu", dtype).contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def save_voice(folder: Path, codec: Codec, target: SpeechLM, draft: SpeechLM, facts: dict) -> None:
    """Write codec, target and the draft's own weights as fp16, and voice.json with ``facts``.

    Of the draft only what it does not share with the target is stored.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        "codec": codec.state_dict(),
        "target": target.state_dict(),
        "draft": {name: parameter.detach() for name, parameter in own_parameters(draft).items()},
    }
    for part, state in tensors.items():
        save_file({k: v.half().contiguous() for k, v in state.items()}, folder / f"{part}.safetensors")
        (folder / f"{part}.safetensors").chmod(0o644)  # safetensors makes it readable by its owner alone
    config = target.model.config
    about = {
        "format": FORMAT,
        "codec": codec.settings(),
        "target": {
            "hidden": config.hidden_size,
            "ffn": config.intermediate_size,
            "layers": config.num_hidden_layers,
            "heads": config.num_attention_heads,
            "kv_heads": config.num_key_value_heads,
            "vocab": config.vocab_size,
            "max_position_embeddings": config.max_position_embeddings,
        },
        "speech_vocab": target.speech_embedding.num_embeddings,
        "draft": split_of(draft),
        **facts,
        "sha256": {f"{part}.safetensors": sha256(folder / f"{part}.safetensors") for part in PARTS},
    }
    (folder / "voice.json").write_text(json.dumps(about, indent=1, ensure_ascii=False) + "\n", "utf-8")


def load_voice(folder: Path) -> tuple[Codec, SpeechLM, SpeechLM, dict]:
    """(codec, target, draft, facts of voice.json), fp32 on the CPU.

    InputError if a file is missing, of another format, or not the one that voice.json vouches for.
    """
    about = _read_about(folder)
    states = {part: _read_weights(folder / f"{part}.safetensors", about) for part in PARTS}
    codec = Codec(CodecConfig(**about["codec"]))
    target = SpeechLM(small_qwen2(**about["target"]), about["speech_vocab"])
    _fill(codec, states["codec"], folder / "codec.safetensors")
    _fill(target, states["target"], folder / "target.safetensors")
    draft = make_draft(target, **about["draft"])
    shared = {k: v for k, v in draft.state_dict().items() if k not in own_parameters(draft)}
    _fill(draft, shared | states["draft"], folder / "draft.safetensors")
    return codec.eval(), target.eval(), draft.eval(), about


def _read_about(folder: Path) -> dict:
    path = folder / "voice.json"
    if not path.is_file():
        raise InputError(f"{path} is missing: a voice folder holds voice.json and {', '.join(PARTS)}.safetensors")
    try:
        about = json.loads(path.read_text("utf-8"))
        found = about["format"]
        about["sha256"], about["codec"], about["target"], about["speech_vocab"], about["draft"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path} cannot be read as a voice description ({error}): restore it from the package"
        ) from None
    if found != FORMAT:
        raise InputError(f"{path} has format {found!r}: this version reads format {FORMAT}")
    return about


def _read_weights(path: Path, about: dict) -> dict[str, torch.Tensor]:
    if not path.is_file():
        raise InputError(f"{path} is missing: restore it from the package")
    vouched, found = about["sha256"].get(path.name), sha256(path)
    if found != vouched:
        raise InputError(
            f"{path} is damaged or from another voice: its SHA-256 begins with {found[:12]}, voice.json says "
            f"{str(vouched)[:12]}; restore it from the package"
        )
    return load_file(path)


def _fill(module: nn.Module, state: dict[str, torch.Tensor], path: Path) -> None:
    try:
        module.load_state_dict({k: v.float() for k, v in state.items()})
    except RuntimeError as error:
        raise InputError(
            f"{path} does not fit its description in voice.json: {str(error).splitlines()[-1].strip()}"
        ) from None


DRAFT_FILES = ("draft.json", "draft.safetensors")


def save_draft(folder: Path, draft: SpeechLM, target: SpeechLM, facts: dict) -> None:
    """Write draft.safetensors, what the draft does not share with the target, fp32, and draft.json.

    draft.json comes last, beside and renamed: where it is, the draft is whole.
    """
    folder.mkdir(parents=True, exist_ok=True)
    own = {name: p.detach().float().cpu().contiguous() for name, p in own_parameters(draft).items()}
    weights, part = folder / DRAFT_FILES[1], folder / f".{DRAFT_FILES[1]}.part"
    save_file(own, part)
    part.chmod(0o644)
    part.replace(weights)
    about = {
        "format": FORMAT,
        "layers": split_of(draft),
        "target": {str(dtype): weights_sha256(target, dtype) for dtype in (torch.bfloat16, torch.float16)},
        **facts,
        "sha256": sha256(weights),
    }
    part = folder / f".{DRAFT_FILES[0]}.part"
    part.write_text(json.dumps(about, indent=1) + "\n", "utf-8")
    part.replace(folder / DRAFT_FILES[0])


def read_draft_facts(folder: Path) -> dict:
    """What draft.json says; InputError if it is missing or cannot be read."""
    path = Path(folder) / DRAFT_FILES[0]
    if not path.is_file():
        raise InputError(
            f"{path} is missing: a draft folder holds {' and '.join(DRAFT_FILES)}, made by ssd-repro train-draft"
        )
    try:
        about = json.loads(path.read_text("utf-8"))
        found = about["format"]
        about["layers"]["bottom"], about["layers"]["top"], about["target"], about["sha256"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} cannot be read as the description of a draft ({error})") from None
    if found != FORMAT:
        raise InputError(f"{path} has format {found!r}: this version reads format {FORMAT}")
    return about


def load_draft(folder: Path, target: SpeechLM) -> SpeechLM:
    """The draft that ``ssd-repro train-draft`` wrote, on the target's parameters, device and dtype.

    target: the one that it was trained for, in fp32, bf16 or fp16. InputError if a file is missing
    or damaged, or if the draft is of another target.
    """
    folder = Path(folder)
    about, path = read_draft_facts(folder), folder / DRAFT_FILES[1]
    if not path.is_file():
        raise InputError(f"{path} is missing: copy the whole draft folder")
    if (found := sha256(path)) != about["sha256"]:
        raise InputError(
            f"{path} is damaged or from another draft: its SHA-256 begins with {found[:12]}, draft.json says "
            f"{str(about['sha256'])[:12]}"
        )
    dtype = torch.float16 if target.head.weight.dtype == torch.float16 else torch.bfloat16
    known = about["target"].get(str(dtype), "")
    if (found := weights_sha256(target, dtype)) != known:
        raise InputError(
            f"the draft in {folder} was trained for another target: the SHA-256 of its weights begins with "
            f"{known[:12]}, that of this one with {found[:12]}"
        )
    draft = make_draft(target, **about["layers"])
    own = own_parameters(draft)
    state = load_file(path)
    if state.keys() != own.keys():
        raise InputError(f"{path} holds other tensors than a draft of {about['layers']} layers")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(state[name])
    return draft.eval()
