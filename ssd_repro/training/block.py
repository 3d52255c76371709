"""The block drafter in training: every slot at once, of a block that begins at every position."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError
from ..models.block_draft import BlockDraft
from ..models.speech_lm import SpeechLM
from .deployed import Target
from .hidden import HiddenTask, unrolled


class BlockTask(HiddenTask):
    """As HiddenTask: slot k of a block is its pass k, fed with a mask; it hears the tokens that the data has before it.

    A slot counts for less the later it is: it is used only where all before it were accepted.
    """

    kind, decay = BlockDraft, 0.8

    def __init__(self, target: Target, begin: BlockDraft | None = None, **sizes: int):
        """As HiddenTask; InputError for a causal model of transformers."""
        if not isinstance(target.lm, SpeechLM):
            raise InputError(f"drafter is 'block'; of {type(target.lm.model).__name__} only paper and hidden are there")
        super().__init__(target, begin, **sizes)

    def made(self, features: Tensor, embedded: Tensor, at: Tensor) -> list[Tensor]:
        draft, before, state, found = self.draft, embedded[:, 1:], None, []
        for output in unrolled(draft, features, embedded, len(draft.masks) + 1, draft.masks):
            if state is not None:  # the slot before stands a position before
                state = F.pad(state[:, :-1], (0, 0, 1, 0)).flatten(0, 1)
            rows, state = draft.follow(output.flatten(0, 1), before.flatten(0, 1), state)
            rows, state = (x.unflatten(0, before.shape[:2]) for x in (rows, state))
            found.append(draft.up(rows[at]))
        return found
