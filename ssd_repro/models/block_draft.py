"""A drafter that reads the target's hidden states and says a block of tokens from one forward."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..decoding.drafters import BlockDrafter, LanguageModel
from .hidden_draft import HiddenDraft, HiddenDraftLM
from .speech_lm import SpeechLM, cast_parameters


class BlockDraft(HiddenDraft):
    """What ``decoding.drafters.BlockDrafter`` asks, for a target; a ``HiddenDraft`` but for masks and head.

    The head is in two parts, for it also hears the token in the slot before: what the runtime makes of the hidden state
    is of the head's rank alone, and a recurrent cell of that rank adds what the block's tokens have to say.
    """

    def __init__(
        self, target: SpeechLM, rank: int = 128, taps: tuple[int, ...] | list[int] = (), layers: int = 2, slots: int = 6
    ) -> None:
        """slots: tokens of a block, at most."""
        super().__init__(target, rank, taps, layers)
        self.sizes |= {"layers": layers, "slots": slots}
        (self.lm.head, self.up), hidden = self.lm.head, self.reducer.out_features
        rank = self.lm.head.out_features
        self.cell, self.carry = nn.GRUCell(2 * hidden, rank), nn.Linear(rank, rank, bias=False)
        self.masks = nn.Parameter(0.02 * torch.randn(slots - 1, hidden))
        nn.init.zeros_(self.carry.weight)  # at first the head hears the hidden state alone
        self.to(self.device)
        cast_parameters(self, self.dtype)

    @property
    def ends(self) -> tuple[nn.Linear, nn.Linear]:
        return self.lm.head, self.up

    def on(self, lm: LanguageModel) -> BlockDraftLM:
        return BlockDraftLM(self, lm)

    def follow(self, hidden: Tensor, embeddings: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        state = self.cell(torch.cat((hidden, embeddings), -1), state)
        return self.lm.head(hidden) + self.carry(state), state


class BlockDraftLM(HiddenDraftLM):
    """As ``HiddenDraftLM``."""

    kind = BlockDrafter

    def __init__(self, draft: BlockDraft, lm: LanguageModel) -> None:
        super().__init__(draft, lm)
        self.masks, self.follow, self.up = draft.masks, draft.follow, draft.up
