"""What the loop asks for: a language model with sessions, and a drafter with two methods.

What a drafter (and the loop) knows of the sequence is a ``Tape``. The paper's drafter stands in
``speculative.py``, beside the loop that it serves; others follow the same contract.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ..errors import InputError
from .result import DecodeConfig
from .sampling import Law, Sampler, probabilities


class LanguageModel(Protocol):
    """A model that can open a sequence; one model may serve several at once."""

    def session(self) -> Session: ...


class Session(Protocol):
    """One sequence with its cache; ``length`` counts the positions that the cache holds."""

    length: int

    def prefill(self, prefix: Tensor) -> Tensor:
        """Feed embeddings (1, T, hidden), once -> logits (1, V) of the last position."""

    def extend(self, tokens: Tensor) -> Tensor:
        """Feed speech tokens (1, n) -> logits (1, n, V); the cache grows by n."""

    def crop(self, length: int) -> None:
        """The one rollback: forget all positions from ``length`` on."""


class Tape:
    """The speech tokens of one sequence on the device, and the distribution of the next ones.

    Positions 0 .. size-1 are accepted; the cells after them hold the round's draft while
    it is judged. ``probabilities`` is the one place where logits become what is sampled from, for
    draft and target alike.
    """

    def __init__(self, sampler: Sampler | Law, capacity: int, ban_mask: Tensor, min_tokens: int = 0) -> None:
        """capacity: cells, in tokens; ban_mask: bool (V,), banned at positions < min_tokens."""
        self.sampler, self.ban_mask, self.min_tokens = sampler, ban_mask, min_tokens
        self.pad = sampler.ras_window if isinstance(sampler, Sampler) and sampler.ras else 1
        self.cells = ban_mask.new_full((self.pad + capacity,), -1, dtype=torch.int64)
        self.size = 0

    @classmethod
    def empty(cls, config: DecodeConfig, logits: Tensor) -> Tape:
        """For logits (1, V); InputError if a stop or banned token is outside the vocabulary."""
        vocab = logits.shape[-1]
        for name, ids in (("stop_ids", config.stop_ids), ("banned_ids", config.banned)):
            if max(ids, default=0) >= vocab:
                raise InputError(f"{name} has {max(ids)}; the model's token ids end at {vocab - 1}.")
        mask = torch.zeros(vocab, dtype=torch.bool)
        mask[list(config.banned)] = True
        return cls(config.sampler, config.max_tokens, mask.to(logits.device), config.min_tokens)

    def tokens(self, start: int, end: int) -> Tensor:
        """Cells start .. end-1, (end - start,); a view."""
        return self.cells[self.pad + start : self.pad + end]

    def write(self, position: int, token: Tensor) -> None:
        self.cells[self.pad + position] = token

    def probabilities(self, logits: Tensor, first: int) -> Tensor:
        """Logits (n, V) for positions first .. first+n-1 -> the distribution of each, (n, V).

        Position i sees the cells before it, the draft's own among them.
        """
        n = logits.shape[0]
        if not isinstance(self.sampler, Sampler):
            return self.sampler(logits, self.tokens(0, first + n - 1))
        history = self.cells[first : first + self.pad + n - 1].unfold(0, self.pad, 1)
        banned = None
        if first + n <= self.min_tokens:
            banned = self.ban_mask
        elif first < self.min_tokens:
            position = torch.arange(first, first + n, device=logits.device)
            banned = (position < self.min_tokens)[:, None] & self.ban_mask
        return probabilities(logits, history, self.sampler, banned)


class Drafter(Protocol):
    """Proposes tokens for one sequence, for which it was made; ``calls`` counts its forwards."""

    calls: int

    def propose(self, tape: Tape, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draft positions tape.size .. tape.size+count-1 and write them on the tape.

        Returns tokens (count,) and p (count, V): exactly what each token was drawn from,
        given the tape before it.
        """

    def rollback(self, size: int) -> None:
        """The round is judged: the sequence now has ``size`` tokens, forget all others."""
