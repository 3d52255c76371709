"""A drafter that reads the target's hidden states: one layer or a few, and a head of low rank."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..decoding.drafters import HiddenDrafter, LanguageModel, Session
from ..errors import InputError
from .causal import CausalLM
from .families import small_qwen2
from .speech_lm import PRECISIONS, SpeechLM, cast_parameters

ALIKE = ("qwen2", "llama", "mistral")  # families whose last layer a Qwen2 layer can begin as
TURNING = ("default", "linear", "llama3", "yarn")  # rotary embeddings that depend on the position alone


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

    layers: Qwen2's, of the target's width, whatever its family. The target's hidden states come from the depths
    ``taps``, by default a third, two thirds and the whole. Its speech embedding is the target's, frozen. It begins on
    the target's device in its dtype. As ``assistant_model`` it answers what ``generate`` asks a model of transformers.

    InputError if the target's embeddings are of another width than its hidden states.
    """

    def __init__(
        self, target: SpeechLM | CausalLM, rank: int = 128, taps: tuple[int, ...] | list[int] = (), layers: int = 1
    ) -> None:
        super().__init__()
        config, embedding = target.model.config.get_text_config(decoder=True), target.speech_embedding
        vocab, hidden = target.head.weight.shape
        if embedding.weight.shape[1] != hidden:
            wide = f"{type(target.model).__name__} has embeddings of width {embedding.weight.shape[1]}"
            raise InputError(f"{wide} and hidden states of {hidden}: a hidden-state drafter needs one width for both")
        self.taps = tuple(taps) or taps_of(config.num_hidden_layers)
        self.sizes = {"rank": rank, "taps": list(self.taps)}
        self.lm = SpeechLM(small_qwen2(**_layers_like(config, layers)), 1)
        self.lm.head, self.lm.taps = LowRankHead(hidden, min(rank, vocab, hidden), vocab), (layers,)
        self.lm.model.embed_tokens.requires_grad_(False)
        self.reducer = nn.Linear(len(self.taps) * hidden, hidden, bias=False)
        self.joiner = nn.Linear(2 * hidden, hidden, bias=False)
        self.to(target.head.weight.device)
        cast_parameters(self, target.head.weight.dtype)
        self.lm.speech_embedding = embedding.requires_grad_(False)

    @property
    def base_model(self) -> nn.Module:
        return self.lm.model

    @property
    def device(self) -> torch.device:
        return self.joiner.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.joiner.weight.dtype

    def get_input_embeddings(self) -> nn.Module:
        return self.lm.speech_embedding

    def get_output_embeddings(self) -> nn.Module:
        return self.lm.head

    @torch.no_grad()
    def begin_from(self, target: SpeechLM | CausalLM) -> HiddenDraft:
        """Where training starts: the head's best low rank, the last depth's hidden state passed on.

        And the target's last layers, where these are Qwen2's but for biases; else new ones.
        """
        (down, up), hidden, source = self.ends, self.reducer.out_features, target.model.base_model
        rank, own = down.out_features, self.lm.model.layers
        if source.config.model_type in ALIKE:
            own.load_state_dict(source.layers[-len(own) :].state_dict(), strict=False)
            self.lm.model.norm.load_state_dict(source.norm.state_dict())
        u, s, v = torch.linalg.svd(target.head.weight.float(), full_matrices=False)
        down.weight.copy_(s[:rank, None].sqrt() * v[:rank])
        up.weight.copy_(u[:, :rank] * s[:rank].sqrt())
        if target.head.bias is not None:
            up.bias.copy_(target.head.bias)
        passed = torch.eye(hidden, device=self.device)
        self.reducer.weight.mul_(0.1)[:, -hidden:].add_(passed)
        self.joiner.weight.mul_(0.1)[:, :hidden].add_(passed)
        return self

    @property
    def ends(self) -> tuple[nn.Linear, nn.Linear]:
        """The two matrices of its head."""
        return tuple(self.lm.head)

    def cast(self, precision: str) -> HiddenDraft:
        """As ``SpeechLM.cast``; the speech embedding is the target's, and changes with it."""
        self.lm.cast(precision)
        cast_parameters(self, PRECISIONS[precision])
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

    kind = HiddenDrafter

    def __init__(self, draft: HiddenDraft, lm: LanguageModel) -> None:
        self.draft = draft
        self.reduce, self.join, self.embed, self.open = draft.reduce, draft.join, draft.embed, lm.session

    def __call__(self, prefix: Tensor, target: Session) -> HiddenDrafter:
        """prefix: embeddings (1, T, hidden), or ids (1, T)."""
        embedded = prefix.to(self.draft.dtype) if prefix.is_floating_point() else self.embed(prefix)
        return self.kind(self, embedded, target)


def _layers_like(config, layers: int) -> dict:
    """Arguments of ``small_qwen2`` for layers with the heads, feed-forward and positions of a target's."""
    hidden, heads = config.hidden_size, config.num_attention_heads
    rope = getattr(config, "rope_parameters", None) or {}
    known = {name: value for name, value in rope.items() if name != "partial_rotary_factor"}
    return {
        "hidden": hidden,
        "ffn": getattr(config, "intermediate_size", None) or 4 * hidden,
        "layers": layers,
        "heads": heads,
        "kv_heads": getattr(config, "num_key_value_heads", None) or heads,
        "vocab": 1,
        "head_dim": getattr(config, "head_dim", None) or hidden // heads,
        "max_position_embeddings": getattr(config, "max_position_embeddings", None) or 32_768,
        "rope_parameters": known if rope.get("rope_type") in TURNING else None,  # Gemma's are of each kind of layer
    }


def taps_of(depth: int) -> tuple[int, ...]:
    """A third, two thirds and the whole of so many layers."""
    return tuple(sorted({max(1, depth // 3), max(1, 2 * depth // 3), depth}))
