"""Tiny random models of the families that speech models come from, sharp enough that their choices differ."""

from __future__ import annotations

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

EOS, PAD = 1, 0
FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gemma3", "gpt_neox", "phi", "lfm2")
SLIDING = ("mistral", "gemma3")  # windows of 5 and 4 positions


def tiny(family: str, layers: int = 3, vocab: int = 11, seed: int = 0, **other) -> PreTrainedModel:
    """other: fields of the configuration, and dtype."""
    dtype = other.pop("dtype", torch.float32)
    sizes = {"vocab_size": vocab, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": layers}
    common = {**sizes, "num_attention_heads": 4, "max_position_embeddings": 64, "initializer_range": 0.3}
    common |= {"bos_token_id": 2, "eos_token_id": EOS, "pad_token_id": PAD, "tie_word_embeddings": False}
    grouped = {"num_key_value_heads": 2}
    kinds = (["sliding_attention", "full_attention"] * layers)[:layers]
    name, own = {
        "llama": ("LlamaConfig", {**grouped, "head_dim": 4}),
        "qwen2": ("Qwen2Config", grouped),
        "qwen3": ("Qwen3Config", {**grouped, "head_dim": 4}),
        "mistral": ("MistralConfig", {**grouped, "head_dim": 4, "sliding_window": 5}),
        "gemma3": (
            "Gemma3TextConfig",
            {
                **grouped,
                "head_dim": 4,
                "sliding_window": 4,
                "layer_types": kinds,
                "final_logit_softcapping": 3.0,
                "attn_logit_softcapping": 5.0,
                "attn_implementation": "eager",  # SDPA has no soft caps
            },
        ),
        "gpt_neox": ("GPTNeoXConfig", {}),
        "phi": ("PhiConfig", {}),
        "lfm2": ("Lfm2Config", {**grouped, "full_attn_idxs": [1]}),
    }[family]
    torch.manual_seed(seed)
    config = getattr(transformers, name)(**{**common, **own, **other})
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def uncached(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """Logits (n, T, V) of whole sequences (n, T), without a cache."""
    with torch.no_grad():
        return model(ids, use_cache=False).logits
