"""Several sequences of a SpeechLM in caches of fixed length, each at a position of its own."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..errors import InputError


def blank_caches(lm, rows: int, cells: int) -> tuple[list[Tensor], list[Tensor]]:
    """Keys and values of a SpeechLM, one of zeros for each layer: (rows, kv heads, cells, head size)."""
    heads, size = kv_shape(lm)
    shape = rows, heads, cells, size
    keys, values = ([lm.head.weight.new_zeros(shape) for _ in lm.model.layers] for _ in range(2))
    return keys, values


def kv_shape(lm) -> tuple[int, int]:
    """A SpeechLM's kv heads, and their size."""
    config = lm.model.config
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_key_value_heads, size


class BatchSession:
    """``decoding.batch.BatchSession``. Keys and values, per layer (B, kv heads, cells, head size).

    A rollback is a smaller length: what lies beyond it is masked until it is written over.
    """

    def __init__(self, lm, prefixes: list[int], room: int) -> None:
        """lm: a SpeechLM; prefixes: positions of each; room: for so many tokens after the longest.

        InputError if its decoder is not a Qwen2.
        """
        if lm.model.config.model_type != "qwen2":
            raise InputError(f"a batch needs a Qwen2 decoder, not {type(lm.model).__name__}: decode one by one")
        self.lm, self.lengths = lm, torch.tensor(prefixes, device=lm.head.weight.device)
        self.keys, self.values = blank_caches(lm, len(prefixes), max(prefixes) + room)
        self.positions: Tensor | None = None

    def prefill(self, prefixes: list[Tensor]) -> Tensor:
        """Embeddings (1, T, hidden) of each -> logits (B, V) of their last positions. They are padded on the right."""
        embedded = pad_sequence([prefix[0] for prefix in prefixes], batch_first=True)
        places = torch.arange(embedded.shape[1], device=embedded.device)[None]
        hidden = self._run(embedded, places, None)
        return self.lm.head(hidden[torch.arange(len(hidden), device=hidden.device), self.lengths - 1])

    def extend(self, tokens: Tensor) -> Tensor:
        positions = self.lengths[:, None] + torch.arange(tokens.shape[1], device=tokens.device)
        cells = torch.arange(self.keys[0].shape[2], device=tokens.device)
        visible = (cells <= positions[..., None])[:, None]  # (B, 1, n, cells)
        self.positions = positions
        hidden = self._run(self.lm.speech_embedding(tokens), positions, visible)
        self.lengths = self.lengths + tokens.shape[1]
        return self.lm.head(hidden)

    def keep(self, rows: Tensor) -> None:
        self.lengths = self.lengths.index_select(0, rows)
        for tensors in (self.keys, self.values):
            for layer, tensor in enumerate(tensors):
                tensors[layer] = tensor.index_select(0, rows)

    def update(self, key: Tensor, value: Tensor, layer: int, *_, **__) -> tuple[Tensor, Tensor]:
        """transformers' cache protocol: the prefill stores from 0 on and sees itself, later tokens see all cells."""
        pairs = ((self.keys[layer], key), (self.values[layer], value))
        for ours, given in pairs:
            if self.positions is None:
                ours[:, :, : given.shape[2]] = given
            else:
                rows = torch.arange(len(given), device=given.device)[:, None]
                ours[rows, :, self.positions] = given.transpose(1, 2)
        return (key, value) if self.positions is None else (self.keys[layer], self.values[layer])

    def _run(self, embeddings: Tensor, positions: Tensor, visible: Tensor | None) -> Tensor:
        return self.lm.model(
            inputs_embeds=embeddings,
            attention_mask={"full_attention": visible},
            position_ids=positions,
            past_key_values=self,
            use_cache=True,
        ).last_hidden_state
