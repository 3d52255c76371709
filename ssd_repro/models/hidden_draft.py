"""A drafter that reads the target's hidden states: one layer, and a head of low rank."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..decoding.drafters import HiddenDrafter, LanguageModel, Session
from .families import small_qwen2
from .speech_lm import SpeechLM


class LowRankHead(nn.Sequential):
    """hidden -> rank -> V: at 6,564 codes a full head costs as much as the layer below it."""

    def __init__(self, hidden: int, rank: int, vocab: int) -> None:
        super().__init__(nn.Linear(hidden, rank, bias=False), nn.Linear(rank, vocab))

    @property
    def weight(self) -> Tensor:
        """(V, rank)"""
        return self[1].weight


class HiddenDraft(nn.Module):
    """What ``decoding.drafters.HiddenDrafter`` asks, for a target; own: layers, head and two small matrices.

    layers: of the target's geometry; the target's hidden states come from a third, two thirds and the whole
    of its depth. Its speech embedding is the target's, frozen.
    """

    def __init__(self, target: SpeechLM, rank: int = 128, layers: int = 1) -> None:
        super().__init__()
        config, hidden = target.model.config, target.model.config.hidden_size
        self.taps, self.sizes = taps_of(target), {"rank": rank}
        sizes = (hidden, config.intermediate_size, layers, config.num_attention_heads, config.num_key_value_heads, 1)
        places = {"max_position_embeddings": config.max_position_embeddings, "rope_parameters": config.rope_parameters}
        vocab = target.speech_embedding.num_embeddings
        self.lm = SpeechLM(small_qwen2(*sizes, **places), vocab)
        self.lm.head, self.lm.taps = LowRankHead(hidden, min(rank, *target.head.weight.shape), vocab), (layers,)
        self.lm.speech_embedding = target.speech_embedding
        self.reducer = nn.Linear(len(self.taps) * hidden, hidden, bias=False)
        self.joiner = nn.Linear(2 * hidden, hidden, bias=False)
        self.lm.model.embed_tokens.requires_grad_(False)
        self.lm.speech_embedding.requires_grad_(False)

    @torch.no_grad()
    def begin_from(self, target: SpeechLM) -> HiddenDraft:
        """Where training starts: the last layer, the head's best low rank, the last depth's hidden state passed on."""
        (down, up), hidden = self.ends, self.reducer.out_features
        rank = down.out_features
        own = self.lm.model.layers
        own.load_state_dict(target.model.layers[-len(own) :].state_dict())
        self.lm.model.norm.load_state_dict(target.model.norm.state_dict())
        u, s, v = torch.linalg.svd(target.head.weight.float(), full_matrices=False)
        down.weight.copy_(s[:rank, None].sqrt() * v[:rank])
        up.weight.copy_(u[:, :rank] * s[:rank].sqrt())
        if target.head.bias is not None:
            up.bias.copy_(target.head.bias)
        self.reducer.weight.mul_(0.1)[:, -hidden:].add_(torch.eye(hidden))
        self.joiner.weight.mul_(0.1)[:, :hidden].add_(torch.eye(hidden))
        return self

    @property
    def ends(self) -> tuple[nn.Linear, nn.Linear]:
        """The two matrices of its head."""
        return tuple(self.lm.head)

    def cast(self, precision: str) -> HiddenDraft:
        """As ``SpeechLM.cast``; the speech embedding is the target's, and changes with it."""
        self.lm.cast(precision)
        for parameter in self.parameters():
            parameter.data = parameter.data.to(self.lm.head.weight.dtype)
        return self

    def on(self, lm: LanguageModel) -> HiddenDraftLM:
        """On a runtime; lm: ``self.lm`` as it decodes."""
        return HiddenDraftLM(self, lm)

    def reduce(self, features: Tensor) -> Tensor:
        return self.reducer(features)

    def join(self, features: Tensor, embeddings: Tensor) -> Tensor:
        return self.joiner(torch.cat((features, embeddings), -1))

    def embed(self, tokens: Tensor) -> Tensor:
        return self.lm.speech_embedding(tokens)


class HiddenDraftLM:
    """``draft`` on a runtime; called with a prefix and the target's session it makes the drafter of a sequence.

    lm: ``draft.lm`` as it decodes. The target's ``taps`` must be the draft's before the target is compiled.
    """

    def __init__(self, draft: HiddenDraft, lm: LanguageModel) -> None:
        self.reduce, self.join, self.embed, self.open = draft.reduce, draft.join, draft.embed, lm.session

    def __call__(self, prefix: Tensor, target: Session) -> HiddenDrafter:
        return HiddenDrafter(self, prefix, target)


def taps_of(target: SpeechLM) -> tuple[int, ...]:
    """A third, two thirds and the whole of its depth."""
    depth = len(target.model.layers)
    return tuple(sorted({max(1, depth // 3), max(1, 2 * depth // 3), depth}))
