"""A larger target that begins as the same function: training goes on instead of beginning anew.

New width, heads and FFN units are read at random and written as zeros, new layers write zeros (function-preserving
growth: Chen, Goodfellow & Shlens 2016, "Net2Net"; Gong et al. 2019 for depth).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import InputError
from ..models.draft import draft_layers
from ..models.families import small_qwen2
from ..models.speech_lm import SpeechLM


@torch.no_grad()
def grow(lm: SpeechLM, hidden: int, ffn: int, layers: int, heads: int, kv_heads: int) -> SpeechLM:
    """-> a SpeechLM of these sizes with the logits of ``lm``; its random parts come from torch's global generator.

    InputError for a size below that of ``lm``, or another size of a head.
    """
    old = lm.model.config
    if old.model_type != "qwen2":
        raise InputError(f"the target is {type(lm.model).__name__}; a Qwen2 decoder alone can grow: leave begin empty")
    asked = {"hidden": hidden, "ffn": ffn, "layers": layers, "heads": heads, "kv_heads": kv_heads}
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    for (name, size), of in zip(asked.items(), names, strict=True):
        if size < getattr(old, of):
            raise InputError(f"{name} is {size}; a target of {getattr(old, of)} can grow, not shrink")
    groups, head_dim = heads // kv_heads, hidden // heads
    if groups < old.num_attention_heads // old.num_key_value_heads or head_dim != lm.model.layers[0].self_attn.head_dim:
        raise InputError(
            f"heads of {head_dim}, {groups} for each key and value: a target whose heads are of "
            f"{lm.model.layers[0].self_attn.head_dim} grows by more of the same"
        )
    places = old.max_position_embeddings
    model = small_qwen2(*asked.values(), old.vocab_size, max_position_embeddings=places)
    grown = SpeechLM(model, lm.speech_embedding.num_embeddings, bias=lm.head.bias is not None)
    known, order = lm.state_dict(), new_order(old.num_hidden_layers, layers)
    for name, new in grown.state_dict().items():
        source, fresh = name, False
        if name.startswith("model.layers."):
            _, _, place, rest = name.split(".", 3)
            index, fresh = order[int(place)]
            source = f"model.layers.{index}.{rest}"
        weight = known[source]
        if "norm" in name:
            new.fill_((hidden / old.hidden_size) ** -0.5 * float(weight.mean()))
            weight = weight * (old.hidden_size / hidden) ** 0.5  # the mean of squares is over more channels
        elif name.endswith("_proj.weight") or "head" in name:
            new.normal_(std=float(weight.std()))
        if name.endswith(("o_proj.weight", "down_proj.weight")) or "embed" in name:
            new.zero_()  # what writes into the residual stream
        if not fresh or not name.endswith(("o_proj.weight", "down_proj.weight")):
            _place(new, weight, name, old.num_key_value_heads, kv_heads, head_dim)
    return grown.to(lm.head.weight).eval()


def new_order(old: int, layers: int) -> list[tuple[int, bool]]:
    """For each of ``layers`` layers: (the old layer that it is or is a copy of, whether it writes zeros at first).

    The draft's bottom layers are the old ones; its top layers are new but for the last, so that the draft is
    free to learn from copies of the layers it leaves out; the other new layers are spread through the middle.
    """
    bottom, top = draft_layers(layers)
    bottom, late = min(bottom, old - 1), min(top - 1, layers - old)
    middle = [(index, False) for index in range(bottom, old - 1)]
    count, spare = len(middle), layers - old - late
    for i in reversed(range(spare)):  # from the end, so that places hold
        place = -(-(i + 1) * count // spare)
        middle.insert(place, (max(bottom, bottom + place - 1) if count else old - 1, True))
    first = [(index, False) for index in range(bottom)]
    last = [(min(bottom + i, old - 1), True) for i in range(max(0, late))]
    return [*first, *middle, *last, (old - 1, False)]


def _place(new: Tensor, old: Tensor, name: str, kv_heads: int, new_kv_heads: int, head_dim: int) -> None:
    """Write ``old`` into the corner of ``new``; heads stay with their keys and values."""
    if "q_proj" in name:
        old, new = (x.unflatten(0, (n, -1, head_dim)) for x, n in ((old, kv_heads), (new, new_kv_heads)))
    elif "o_proj" in name:
        old, new = (x.unflatten(1, (n, -1, head_dim)) for x, n in ((old, kv_heads), (new, new_kv_heads)))
    new[tuple(map(slice, old.shape))].copy_(old)
