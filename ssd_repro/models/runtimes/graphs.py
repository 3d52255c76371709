"""Caches of fixed length: forwards of few, fixed shapes, which torch.compile can make CUDA graphs of.

As in gpt-fast: keys and values are allocated once, a rollback is a smaller position, and what
lies beyond the position is masked until it is written over.
"""

from __future__ import annotations

import inspect
import weakref
from functools import cache

import torch
from torch import Tensor
from transformers import Qwen2Model

from ...errors import InputError, check_number
from ..speech_lm import Session, SpeechLM


class StaticLM:
    """A SpeechLM whose sessions hold at most ``max_length`` positions, prefix included.

    Takes the place of the SpeechLM wherever a language model with sessions is asked for; the
    logits are the same but for rounding. Nothing is padded: with a padded verification the
    price of a draft length would be that of another one.

    compile: each number of tokens once through torch.compile, when it first comes (seconds to
    minutes; on CUDA captured as a CUDA graph, on the CPU C++, which needs a compiler). With L_d
    drafted tokens these are 1, 2 (the draft, after a full acceptance) and L_d + 1, and fewer where
    max_tokens is near. The prefill is never compiled. Call ``lm.to(device)`` and ``lm.cast`` before.
    InputError if a setting is out of range, or if this torch is too old to compile.
    """

    def __init__(self, lm: SpeechLM, max_length: int, compile: bool = False) -> None:
        check_number("max_length", max_length, 1, 1_000_000, whole=True)
        if not isinstance(lm.model, Qwen2Model):
            raise InputError(
                f"runtime graphs knows Qwen2 decoders, not {type(lm.model).__name__}: choose runtime eager"
            )
        if compile and "isolate_recompiles" not in inspect.signature(torch.compile).parameters:
            raise InputError(
                f"torch {torch.__version__} is too old to compile forwards: its torch.compile lacks isolate_recompiles"
            )
        self.lm, self.max_length, self.compile = lm, max_length, compile
        self.positions = torch.arange(max_length, device=lm.head.weight.device)
        self.step = cache(self._step)
        self._free: list[FixedCache] = []

    def session(self) -> StaticSession:
        """A new sequence. Its cache returns to this model's store when the session is dropped.

        A CUDA graph is bound to the addresses that it was recorded with; so the caches are
        as many as sessions were ever open at once, and used again and again.
        """
        return StaticSession(self)

    def take(self) -> FixedCache:
        """A cache without any trace of an earlier sequence (a NaN would get through the mask)."""
        try:
            found = self._free.pop()  # atomic: threads may share a model
        except IndexError:
            return FixedCache(self.lm, self.max_length)
        for tensor in (*found.keys, *found.values):
            tensor.zero_()
        return found

    def give_back(self, used: FixedCache) -> None:
        self._free.append(used)

    def _step(self, n: int):
        """The forward of n tokens: (1, n), their positions, cache -> logits (1, n, V)."""
        lm = self.lm

        def step(tokens: Tensor, positions: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
            visible = torch.arange(keys[0].shape[2], device=positions.device) <= positions[:, None]
            hidden = lm.model(
                inputs_embeds=lm.speech_embedding(tokens),
                attention_mask={"full_attention": visible[None, None]},
                position_ids=positions[None],
                past_key_values=_Writer(keys, values, positions),
                use_cache=True,
            ).last_hidden_state
            return lm.head(hidden)

        if not self.compile:
            return step
        # isolate_recompiles: dynamo counts recompilations by code object, and every model
        # and number of tokens shares this one.
        compiled = torch.compile(step, mode="reduce-overhead", fullgraph=True, dynamic=False, isolate_recompiles=True)

        def run(*inputs) -> Tensor:
            torch.compiler.cudagraph_mark_step_begin()
            return compiled(*inputs).clone()  # the graph's own output is gone at its next replay

        return run


class FixedCache:
    """Keys and values, per layer (1, kv heads, cells, head size), at addresses that stay."""

    def __init__(self, lm: SpeechLM, cells: int) -> None:
        config, weight = lm.model.config, lm.head.weight
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        shape = (1, config.num_key_value_heads, cells, size)
        with torch.inference_mode(False):  # of one kind, wherever a session is opened: no recompilation
            self.keys, self.values = (
                [torch.zeros(shape, dtype=weight.dtype, device=weight.device) for _ in lm.model.layers]
                for _ in range(2)
            )
        for tensor in (*self.keys, *self.values):
            torch._dynamo.mark_static_address(tensor)  # CUDA graphs: written in place, not copied

    def update(self, key: Tensor, value: Tensor, layer: int, *_, **__) -> tuple[Tensor, Tensor]:
        """transformers' protocol, for the prefill: store, and attend to what was given."""
        for ours, given in ((self.keys[layer], key), (self.values[layer], value)):
            ours[:, :, : given.shape[2]] = given
        return key, value

    def crop(self, _: int) -> None:
        """Nothing to do: the session's length is the position."""


class _Writer:
    """transformers' cache protocol, inside a step: store at ``positions``, attend to all cells."""

    def __init__(self, keys: list[Tensor], values: list[Tensor], positions: Tensor) -> None:
        self.keys, self.values, self.positions = keys, values, positions

    def update(self, key: Tensor, value: Tensor, layer: int, *_, **__) -> tuple[Tensor, Tensor]:
        keys, values = self.keys[layer], self.values[layer]
        keys.index_copy_(2, self.positions, key)
        values.index_copy_(2, self.positions, value)
        return keys, values


class StaticSession(Session):
    """A session in a cache of fixed length. InputError if it is asked to hold more."""

    def __init__(self, model: StaticLM) -> None:
        super().__init__(model.lm, model.take())
        self.model = model
        weakref.finalize(self, model.give_back, self.cache).atexit = False

    @torch.inference_mode()
    def prefill(self, prefix: Tensor) -> Tensor:
        self._check_room(prefix.shape[1])
        return super().prefill(prefix)

    @torch.inference_mode()
    def extend(self, tokens: Tensor) -> Tensor:
        n, model = tokens.shape[1], self.model
        self._check_room(n)
        positions = model.positions[self.length : self.length + n]
        # clone: a view of the tape has another storage offset in each round, a graph one address
        logits = model.step(n)(tokens.clone(), positions, self.cache.keys, self.cache.values)
        self.length += n
        return logits

    def _check_room(self, n: int) -> None:
        if self.length + n > self.model.max_length:
            raise InputError(
                f"the sequence needs {self.length + n} positions and the static cache has "
                f"{self.model.max_length}: make max_length larger."
            )
