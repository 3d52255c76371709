"""A Qwen2 decoder after its prefill, for a GPU: few tokens over a cache of fixed length, in few kernels.

For one token a kernel takes two or three microseconds whatever it does, and transformers' layer is 46 of them. Here it
is 17: one matrix product makes queries, keys and values, one both halves of the MLP, the residual is added by the
product before it, RMSNorm is one kernel, keys and values of a layer are one tensor with one write. Queries that share
a key head are rows of one matrix, so that attention is two products whether one token is fed or four.

The numbers are transformers' but for rounding (tests/models/test_graphs.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

_packed = WeakTensorKeyDictionary()  # a first matrix -> several as one: a draft's top layers are its target's


@dataclass(frozen=True)
class Layer:
    """Matrices (out, in); qkv_bias (out,)."""

    before_attention: Tensor
    qkv: Tensor
    qkv_bias: Tensor
    out: Tensor
    before_mlp: Tensor
    gate_up: Tensor
    down: Tensor

    @classmethod
    def of(cls, layer: nn.Module) -> Layer:
        attention, mlp = layer.self_attn, layer.mlp
        three = attention.q_proj, attention.k_proj, attention.v_proj
        return cls(
            layer.input_layernorm.weight,
            _as_one(*(each.weight for each in three)),
            _as_one(*(each.bias for each in three)),
            attention.o_proj.weight,
            layer.post_attention_layernorm.weight,
            _as_one(mlp.gate_proj.weight, mlp.up_proj.weight),
            mlp.down_proj.weight,
        )


def _as_one(*parts: nn.Parameter) -> Tensor:
    """The parts one below the other; they become views of it, so that they are in memory once."""
    whole = _packed.get(parts[0])
    if whole is None or whole.data_ptr() != parts[0].data_ptr():  # moved or cast since
        whole = torch.cat([part.detach() for part in parts])
        for part, own in zip(parts, whole.split([len(part) for part in parts]), strict=True):
            part.data = own
        _packed[parts[0]] = whole
    return whole


class FusedDecoder:
    """``model``, a Qwen2Model of full attention, called for tokens after a prefill; ``taps`` as a SpeechLM's."""

    def __init__(self, model: nn.Module, taps: tuple[int, ...]) -> None:
        self.rotary, self.norm, self.taps = model.rotary_emb, model.norm.weight, taps
        self.layers = [Layer.of(layer) for layer in model.layers]
        config = model.config
        self.epsilon, self.heads, self.kv_heads = (
            config.rms_norm_eps,
            config.num_attention_heads,
            config.num_key_value_heads,
        )

    def __call__(self, x: Tensor, positions: Tensor, caches: list[Tensor]) -> tuple[Tensor, Tensor | None]:
        """x (1, n, hidden) at positions (n,) -> (1, n, hidden), and at the taps (1, n, taps x hidden).

        caches: of each layer (cells, 2 x kv heads, head size), keys first; position i is cell i.
        """
        x, kept = x[0], {}
        cos, sin = self._angles(x, positions)
        unseen = self._unseen(x, positions, len(caches[0]))
        for depth, (layer, cache) in enumerate(zip(self.layers, caches, strict=True), 1):
            x = self._attend(layer, x, positions, cache, cos, sin, unseen)
            gate, up = F.linear(self._normed(x, layer.before_mlp), layer.gate_up).chunk(2, -1)
            x = torch.addmm(x, F.silu(gate) * up, layer.down.T)
            kept[depth] = x
        made = kept[len(self.layers)] = self._normed(x, self.norm)
        return made[None], torch.cat([kept[tap] for tap in self.taps], -1)[None] if self.taps else None

    def _attend(self, layer: Layer, x: Tensor, positions: Tensor, cache: Tensor, cos, sin, unseen) -> Tensor:
        n = len(x)
        made = F.linear(self._normed(x, layer.before_attention), layer.qkv, layer.qkv_bias)
        made = made.view(n, self.heads + 2 * self.kv_heads, -1)
        size = made.shape[-1]
        swapped = torch.cat((made[..., size // 2 :], made[..., : size // 2]), -1)
        made = torch.addcmul(made * cos, swapped, sin)
        cache.index_copy_(0, positions, made[:, self.heads :])
        keys, values = cache.transpose(0, 1).chunk(2)  # (kv heads, cells, head size)
        shape = n, self.kv_heads, self.heads // self.kv_heads, size
        query = made[:, : self.heads].reshape(shape).transpose(0, 1).reshape(self.kv_heads, -1, size)
        scores = torch.baddbmm(unseen, query, keys.mT, alpha=size**-0.5)
        said = torch.bmm(scores.softmax(-1), values).view(self.kv_heads, n, -1, size)
        return torch.addmm(x, said.transpose(0, 1).reshape(n, -1), layer.out.T)

    def _normed(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, weight.shape, weight, self.epsilon)

    def _angles(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and signed sine for each head, (n, heads + 2 x kv heads, head size); values are not turned: 1, 0."""
        cos, sin = (each[0, :, None] for each in self.rotary(x[None], positions[None]))
        half = sin.shape[-1] // 2
        sin = torch.cat((-sin[..., :half], sin[..., half:]), -1)
        turned, plain = self.heads + self.kv_heads, self.kv_heads
        one = torch.ones_like(cos)
        return (
            torch.cat((cos.expand(-1, turned, -1), one.expand(-1, plain, -1)), 1),
            torch.cat((sin.expand(-1, turned, -1), (one - one).expand(-1, plain, -1)), 1),
        )

    def _unseen(self, x: Tensor, positions: Tensor, cells: int) -> Tensor:
        """0 where a query sees a cell, else -inf: (1, n x heads of a key head, cells)."""
        later = torch.arange(cells, device=x.device) > positions[:, None]
        mask = torch.zeros(later.shape, dtype=x.dtype, device=x.device).masked_fill_(later, -math.inf)
        return mask.repeat_interleave(self.heads // self.kv_heads, 0)[None]
