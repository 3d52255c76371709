"""Small decoders of transformers' families, all of which a ``SpeechLM`` can stand on.

qwen2     CosyVoice 2's and the bundled voice's: RMSNorm, SwiGLU, rotary positions, grouped heads, a bias of q, k and v
llama     the same without these biases
qwen3     without them, and with an RMSNorm of its own over each head's queries and keys
gpt_neox  attention and MLP side by side on one residual stream, LayerNorm, GELU, a quarter of each head rotary, as
          many heads of keys and values as of queries, biases everywhere
"""

from __future__ import annotations

from functools import partial

from torch import nn
from transformers import (
    GPTNeoXConfig,
    GPTNeoXModel,
    LlamaConfig,
    LlamaModel,
    PreTrainedModel,
    Qwen2Config,
    Qwen2Model,
    Qwen3Config,
    Qwen3Model,
)

from ..errors import InputError

FAMILIES = {
    "qwen2": (Qwen2Config, Qwen2Model),
    "llama": (LlamaConfig, LlamaModel),
    "qwen3": (Qwen3Config, Qwen3Model),
    "gpt_neox": (GPTNeoXConfig, GPTNeoXModel),
}
UNGROUPED = ("gpt_neox",)  # a key and a value for each head
BY_KIND = ("qwen2", "qwen3")  # their models take a mask for each kind of layer, the others one for all


def check_family(family: str) -> None:
    if family not in FAMILIES:
        raise InputError(f"family {family!r} is unknown: choose one of {', '.join(FAMILIES)}")


def small_decoder(
    family: str, hidden: int, ffn: int, layers: int, heads: int, kv_heads: int, vocab: int, **other
) -> PreTrainedModel:
    """A randomly initialised decoder without head; vocab: text tokens; other: fields of the family's configuration.

    Heads are of hidden / heads. InputError for an unknown family, and for kv_heads where it has none of its own.
    """
    check_family(family)
    make_config, make_model = FAMILIES[family]
    if family in UNGROUPED and kv_heads != heads:
        raise InputError(f"kv_heads is {kv_heads}; {family} has as many as heads, {heads}")
    grouped = {} if family in UNGROUPED else {"num_key_value_heads": kv_heads}
    if family == "qwen3":
        grouped["head_dim"] = hidden // heads  # 128 by default, whatever the width
    config = make_config(
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        vocab_size=vocab,
        attn_implementation="sdpa",
        **grouped,
        **other,
    )
    return make_model(config)


small_qwen2 = partial(small_decoder, "qwen2")


def sizes_of(config) -> dict:
    """What ``small_decoder`` makes a decoder of the same family and sizes from; qwen2, the default, is not named."""
    heads = config.num_attention_heads
    return {
        **({} if config.model_type == "qwen2" else {"family": config.model_type}),
        "hidden": config.hidden_size,
        "ffn": config.intermediate_size,
        "layers": config.num_hidden_layers,
        "heads": heads,
        "kv_heads": heads if config.model_type in UNGROUPED else config.num_key_value_heads,
        "vocab": config.vocab_size,
        "max_position_embeddings": config.max_position_embeddings,
    }


def mask_for(model: PreTrainedModel, mask):
    """A 4-D mask, or None for full causal attention, as the family's forward takes it: nothing is built anew."""
    return {"full_attention": mask} if model.config.model_type in BY_KIND else mask


def final_norm(model: PreTrainedModel) -> nn.Module:
    """What the residual stream passes after the last layer."""
    return model.final_layer_norm if model.config.model_type == "gpt_neox" else model.norm
