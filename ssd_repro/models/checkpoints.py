"""Models on disk: voices and drafts as safetensors, with a JSON file that vouches for them by SHA-256."""

from __future__ import annotations

import copy
import hashlib
import json
import textwrap
from dataclasses import asdict
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import InputError, first_line
from ..files import sha256, write_bytes, write_text
from .block_draft import BlockDraft
from .causal import CausalLM
from .codec import Codec, CodecConfig
from .draft import make_draft, own_parameters, split_of
from .families import sizes_of, small_decoder
from .hidden_draft import HiddenDraft
from .speech_lm import SpeechLM, in_int8

BUNDLED = Path(__file__).parents[1] / "weights"
FORMAT = 2
PARTS = ("codec", "target", "draft")
SCALE = ".row_scale"
DRAFT_FILES = ("draft.json", "draft.safetensors")
CARD = """---
library_name: transformers
base_model: {target}
tags: [speculative-decoding, text-to-speech, draft]
---

# A draft of {bottom} + {top} layers for {target}

Layers and head of its own: the {bottom} bottom layers and the head. All else is a copy of the target's. It was trained
by `ssd-repro train-draft` (Speech Speculative Decoding, arXiv 2505.15380), recipe {recipe}, loss {loss}, on {rows}
rows; draft.json has the settings and the log. It is of use beside its target alone:

```python
from ssd_repro import speculative_generate

draft = AutoModelForCausalLM.from_pretrained("this folder")
model.generate(**inputs, custom_generate=speculative_generate, assistant_model=draft, tolerance=0.4, draft_length=3)
```
"""


HIDDEN_CARD = """---
base_model: {target}
tags: [speculative-decoding, text-to-speech, draft]
---

# A hidden-state drafter for {target}

One layer that reads {target}'s hidden states after layers {places}, and a head of rank {rank}; its embeddings are
{target}'s own. It was trained by `ssd-repro train-draft --drafter hidden` (Speech Speculative Decoding, arXiv
2505.15380; EAGLE-3), recipe {recipe}, on {rows} rows; draft.json has the settings and the log. It is of use with its
target alone:

```python
from ssd_repro import load_draft, speculative_generate

draft = load_draft("this folder", model)
model.generate(**inputs, custom_generate=speculative_generate, assistant_model=draft, tolerance=0.0, draft_length=2)
```
"""


def weights_sha256(lm: nn.Module, dtype: torch.dtype = torch.bfloat16) -> str:
    """SHA-256 over a model's weights as ``dtype``: fp32 and bf16 copies of one model have the same as bf16."""
    digest = hashlib.sha256()
    for name, value in sorted(lm.state_dict().items()):
        digest.update(f"{name} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().to("cpu", dtype).contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def save_voice(
    folder: Path,
    codec: Codec,
    target: SpeechLM,
    draft: SpeechLM,
    facts: dict,
    int8: bool = False,
    others: dict[str, HiddenDraft | SpeechLM] | None = None,
) -> None:
    """Write codec, target and what the drafts do not share with it as fp16, and voice.json with ``facts``.

    int8: all matrices but the codec's as whole numbers of one byte with a scale of each row (``pack``).
    others: of OTHERS.
    """
    others = others or {}
    states = {"codec": codec.state_dict(), "target": target.state_dict(), "draft": own_parameters(draft)}
    states |= {name: own_parameters(other) for name, other in others.items()}
    digests = {}
    for part, state in states.items():
        packed, path = pack(state) if int8 and part != "codec" else state, folder / f"{part}.safetensors"
        digests[path.name] = _write_tensors(path, packed, torch.float16)
    about = {
        "format": FORMAT,
        "codec": asdict(codec.config),
        "target": sizes_of(target.model.config),
        "speech_vocab": target.speech_embedding.num_embeddings,
        "draft": split_of(draft),
        **{name: layers_of_draft(other) for name, other in others.items()},
        **facts,
        "sha256": digests,
    }
    write_text(folder / "voice.json", json.dumps(about, indent=1, ensure_ascii=False) + "\n")


def load_voice(folder: Path) -> tuple[Codec, SpeechLM, SpeechLM, dict]:
    """(codec, target, draft, facts of voice.json), fp32 on the CPU.

    InputError if a file is missing, of another format, or not the one that voice.json vouches for.
    """
    path = folder / "voice.json"
    about = _read_description(path, ("sha256", "codec", "target", "speech_vocab", "draft"))
    files = [folder / f"{part}.safetensors" for part in PARTS]
    states = [_read_tensors(file, about["sha256"].get(file.name), path) for file in files]
    codec = Codec(CodecConfig(**about["codec"]))
    target = SpeechLM(small_decoder(**{"family": "qwen2", **about["target"]}), about["speech_vocab"])
    _fill(codec, states[0], files[0])
    _fill(target, states[1], files[1])
    return codec.eval(), target.eval(), _draft(target, about["draft"], states[2], files[2]), about


def load_others(folder: Path, target: SpeechLM, about: dict) -> dict[str, HiddenDraft | SpeechLM]:
    """The drafters beside the paper's that the voice folder has, by their names; target, about: ``load_voice``'s."""
    found = {}
    for name, make in OTHERS.items():
        if name in about:
            path = folder / f"{name}.safetensors"
            state = _read_tensors(path, about["sha256"].get(path.name), folder / "voice.json")
            found[name] = make(target, about[name], state, path)
    return found


def add_other(folder: Path, name: str, draft: HiddenDraft | SpeechLM) -> None:
    """Put a drafter of OTHERS into a voice folder, as int8, in place of one of that name. InputError for another name.

    voice.json is written last: a folder that this was killed over is refused, for its SHA-256 is another.
    """
    if name not in OTHERS:
        raise InputError(f"drafter {name!r} is not one that a voice folder holds: choose {' or '.join(OTHERS)}")
    about = _read_description(folder / "voice.json", ("sha256",))
    path = folder / f"{name}.safetensors"
    about["sha256"][path.name] = _write_tensors(path, pack(own_parameters(draft)), torch.float16)
    about[name] = layers_of_draft(draft)
    write_text(folder / "voice.json", json.dumps(about, indent=1, ensure_ascii=False) + "\n")


def layers_of_draft(draft: SpeechLM | HiddenDraft) -> dict:
    """What its JSON file says of a draft's size."""
    return draft.sizes if isinstance(draft, HiddenDraft) else split_of(draft)


def save_draft(
    folder: Path, draft: SpeechLM | CausalLM | HiddenDraft, target: SpeechLM | CausalLM, facts: dict
) -> None:
    """Write draft.safetensors, what the draft does not share with the target, fp32, and draft.json.

    Of a causal model of transformers in its dtype, with a model card; and of its paper's draft instead what
    ``from_pretrained`` reads: the whole small model, each tensor once, and config.json. draft.json comes last: where
    it is, the draft is whole.
    """
    if isinstance(draft, CausalLM):
        copy.deepcopy(draft.model).to(draft.stored).save_pretrained(folder)
        digest = sha256(folder / "model.safetensors")
    else:
        stored = target.stored if isinstance(target, CausalLM) else torch.float32
        digest = _write_tensors(folder / DRAFT_FILES[1], own_parameters(draft), stored)
    if isinstance(target, CausalLM):
        known = {**facts, **facts["identity"], **layers_of_draft(draft), "target": target.name}
        known["places"] = ", ".join(map(str, known.get("taps", ())))
        write_text(folder / "README.md", (HIDDEN_CARD if "rank" in known else CARD).format(**known))
    about = {
        "format": FORMAT,
        "layers": layers_of_draft(draft),
        "target": {str(dtype): weights_sha256(target, dtype) for dtype in (torch.bfloat16, torch.float16)},
        **facts,
        "sha256": digest,
    }
    write_text(folder / DRAFT_FILES[0], json.dumps(about, indent=1) + "\n")


def read_draft_facts(folder: Path) -> dict:
    """What draft.json says; InputError if it is missing or cannot be read."""
    return _read_description(Path(folder) / DRAFT_FILES[0], ("layers", "target", "sha256"))


def load_draft(
    folder: Path, target: PreTrainedModel | CausalLM | SpeechLM
) -> PreTrainedModel | CausalLM | SpeechLM | HiddenDraft:
    """The drafter that ``ssd-repro train-draft`` wrote, on the target's parameters, device and dtype.

    What both share is in memory once (``from_pretrained`` of a draft's folder has it a second time). Of a causal model
    of transformers it is an ``assistant_model`` for ``speculative_generate``, the hidden-state drafter, too.

    target: the one that it was trained for, in fp32, bf16 or fp16. InputError if a file is missing
    or damaged, or if the draft is of another target.
    """
    if isinstance(target, PreTrainedModel):
        draft = load_draft(folder, CausalLM(target))
        return draft if isinstance(draft, HiddenDraft) else draft.model
    about = read_draft_facts(folder)
    hidden = "rank" in about["layers"]
    whole = isinstance(target, CausalLM) and not hidden
    path = Path(folder) / ("model.safetensors" if whole else DRAFT_FILES[1])
    state = _read_tensors(path, about["sha256"], path.with_name(DRAFT_FILES[0]))
    dtype = torch.float16 if target.head.weight.dtype == torch.float16 else torch.bfloat16
    known = about["target"].get(str(dtype), "")
    if (found := weights_sha256(target, dtype)) != known:
        raise InputError(
            f"the draft in {folder} was trained for another target: the SHA-256 of its weights begins with "
            f"{known[:12]}, that of this one with {found[:12]}"
        )
    return (_hidden if hidden else _draft)(target, about["layers"], state, path)


def _write_tensors(path: Path, state: dict[str, Tensor], dtype: torch.dtype) -> str:
    """Write ``state`` as ``dtype`` -> the file's SHA-256."""
    kept = {name for name in state if f"{name}{SCALE}" in state or name.endswith(SCALE)}
    stored = {name: v.detach().cpu().to(v.dtype if name in kept else dtype) for name, v in state.items()}
    content = safetensors.torch.save({name: v.contiguous() for name, v in stored.items()})
    write_bytes(path, content)
    return hashlib.sha256(content).hexdigest()


def pack(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Each matrix (m, n) as int8 of -127 .. 127, and beside it NAME.row_scale, float32 (m, 1); all else as it is."""
    packed = {}
    for name, value in state.items():
        if value.dim() == 2:
            value, packed[name + SCALE] = in_int8(value.detach().cpu().float())
        packed[name] = value
    return packed


def unpack(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """What ``pack`` packed, as float32 again; other tensors as they are."""
    whole = {name: value for name, value in state.items() if not name.endswith(SCALE)}
    scales = {name: state[name + SCALE] for name in whole if name + SCALE in state}
    return whole | {name: whole[name].float() * scale for name, scale in scales.items()}


def _read_description(path: Path, fields: tuple[str, ...]) -> dict:
    """The JSON object at ``path``, of this FORMAT and with these fields."""
    try:
        about = json.loads(path.read_text("utf-8"))
        found = about["format"]
        for name in fields:
            about[name]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path} is missing or cannot be read ({first_line(error)}): give a whole folder of a voice, or of a draft "
            "as ssd-repro train-draft writes it"
        ) from None
    if found != FORMAT:
        raise InputError(f"{path} has format {found!r}: this version reads format {FORMAT}")
    return about


def _read_tensors(path: Path, vouched: str | None, description: Path) -> dict[str, Tensor]:
    """The tensors at ``path`` if their SHA-256 is the one that ``description`` vouches for."""
    found = sha256(path) if path.is_file() else "none"
    if found != vouched:
        raise InputError(
            f"{path} is missing, damaged or from another folder: its SHA-256 is {found[:12]}, {description.name} says "
            f"{str(vouched)[:12]}; copy the whole folder again"
        )
    return unpack(safetensors.torch.load_file(path))


def _fill(module: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    """Copy ``state``, read from ``path``, into the module; InputError if names or shapes differ."""
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        faults = textwrap.shorten(" ".join(str(error).splitlines()[1:]), 300)
        raise InputError(f"{path} holds other tensors than the model that its folder describes: {faults}") from None


def _draft(target: SpeechLM, layers: dict[str, int], own: dict[str, Tensor], path: Path) -> SpeechLM:
    return _with_own(make_draft(target, **layers), own, path)


def _hidden(target: SpeechLM | CausalLM, sizes: dict, own: dict[str, Tensor], path: Path) -> HiddenDraft:
    kind = BlockDraft if "slots" in sizes else HiddenDraft
    return _with_own(kind(target, **sizes), own, path)


def _with_own(draft: nn.Module, own: dict[str, Tensor], path: Path):
    """``draft`` with its ``own`` weights, read from ``path``; of a whole model the others are the target's."""
    names = own_parameters(draft)
    if isinstance(draft, CausalLM):
        own = {name: own[file_name] for name in names if (file_name := name.removeprefix("model.")) in own}
    _fill(draft, own | {name: value for name, value in draft.state_dict().items() if name not in names}, path)
    return draft.eval()


# Drafters of a voice folder beside the paper's; on-policy: the paper's layers, trained on what the target says itself.
OTHERS = {"hidden": _hidden, "block": _hidden, "on-policy": _draft}
