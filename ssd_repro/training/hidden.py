"""The hidden-state drafter in training: several unrolled steps at once, as it is used.

A first pass reads the target's hidden states; each further pass reads the output of the one before, a position
on, and attends as a drafter does that is so many tokens ahead ("training-time test", EAGLE-3: Li et al. 2025).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.qwen2.modeling_qwen2 import apply_rotary_pos_emb, repeat_kv

from ..models.hidden_draft import HiddenDraft
from .data import Example
from .deployed import Target
from .loop import Task, divergence, overlap

PASSES = 4  # one more than the paper's L_d


class HiddenTask(Task):
    """A HiddenDraft on a frozen target: towards what the target samples from, by ``loop.divergence``."""

    kind, decay = HiddenDraft, 1.0  # decay: what a pass counts, over the one before

    def __init__(self, target: Target, begin: HiddenDraft | None = None, **sizes: int):
        """begin: a drafter of this target whose weights are gone on from; None: ``HiddenDraft.begin_from``.

        sizes: of the drafter, if it does not go on from another.
        """
        super().__init__()
        target.lm.requires_grad_(False)
        self.target, self.draft = target, self.kind(target.lm, **(begin.sizes if begin else sizes))
        if begin is None:
            self.draft.begin_from(target.lm)
        else:
            self.draft.load_state_dict(begin.state_dict())
        target.lm.taps = self.draft.taps

    def forward(self, items: list[Example]) -> dict[str, Tensor]:
        """The loss; evaluating, "acceptance_k" of pass k: mean of sum min(p, q) of what is sampled from."""
        batch = self.target.collate(items)
        foreseen = batch.at.nonzero()[:, 1] > 0  # what follows a prompt of one token is not
        history = batch.history[foreseen]
        with self.autocast():
            with torch.no_grad():
                q, features = self.target.lm.with_features(batch.embedded, batch.at)
            made = [logits.float() for logits in self.made(features, batch.embedded, batch.at[:, 1:])]  # (N, V) each
        q = self.target.deployed(q[foreseen].float(), history)
        if not self.training:
            drafted = [self.target.deployed(logits, history) for logits in made]
            accepted = {f"acceptance_{k}": overlap(p, q) for k, p in enumerate(drafted, 1)}
            return {"loss": 1 - torch.stack(list(accepted.values())).mean(), **accepted}
        terms = torch.stack([divergence(logits / self.target.temperature, q) for logits in made])
        weights = self.decay ** torch.arange(len(made), device=terms.device)
        return {"loss": (terms * weights).sum() / weights.sum()}

    def made(self, features: Tensor, embedded: Tensor, at: Tensor) -> list[Tensor]:
        """Logits (N, V) of each pass where ``at`` (B, T - 1), of the positions that ``unrolled`` has, says so."""
        return [self.draft.lm.head(output[at]) for output in unrolled(self.draft, features, embedded, PASSES)]


def unrolled(
    draft: HiddenDraft, features: Tensor, embedded: Tensor, passes: int, masks: Tensor | None = None
) -> list[Tensor]:
    """Outputs (B, T - 1, hidden) of each pass, from the target's features (B, T, F) and inputs (B, T, hidden).

    Position i foresees what stands at i + 2. In pass k (from 0) it is k tokens ahead of the target: it sees
    the first pass up to i - k, and of pass j > 0 the position i - k + j, as the drafter's cache holds them then.
    masks (passes - 1, hidden): what each pass but the first is fed with, in place of the output of the one before.
    """
    model, after = draft.lm.model, embedded[:, 1:]
    angles = model.rotary_emb(embedded, torch.arange(after.shape[1], device=embedded.device)[None])
    given, made, caches = draft.reduce(features[:, :-1]), [], [([], []) for _ in model.layers]
    for k in range(passes):
        x = draft.join(given, after) if masks is None or not k else masks[k - 1].to(given.dtype).expand_as(given)
        for layer, (keys, values) in zip(model.layers, caches, strict=True):
            x = _ahead(layer, x, angles, keys, values)
        made.append(model.norm(x))
        if masks is None:
            given = torch.cat((given[:, :1], made[-1][:, :-1]), 1)
    return made


def _ahead(layer: nn.Module, x: Tensor, angles: tuple, keys: list[Tensor], values: list[Tensor]) -> Tensor:
    """A layer of the next pass of ``unrolled``, (B, T, hidden); keys and values of a pass are added to the lists."""
    attention, length, k = layer.self_attn, x.shape[1], len(keys)
    places = torch.arange(length, device=x.device)
    normed = layer.input_layernorm(x)
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    query, key, value = (f(normed).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2) for f in projections)
    query, key = apply_rotary_pos_emb(query, key, *angles)
    keys.append(repeat_kv(key, attention.num_key_value_groups))
    values.append(repeat_kv(value, attention.num_key_value_groups))
    unseen = places[None, :] > places[:, None] - k
    scores = (query @ keys[0].mT).masked_fill(unseen, -math.inf)
    own = [(query * _later(keys[j], k - j)).sum(-1, keepdim=True) for j in range(1, k + 1)]
    weights = (torch.cat((scores, *own), -1) * attention.scaling).float().softmax(-1).to(x.dtype)
    seen = weights[..., :length] @ values[0]
    for j in range(1, k + 1):
        seen = seen + weights[..., length + j - 1, None] * _later(values[j], k - j)
    x = x + attention.o_proj(seen.transpose(1, 2).flatten(2))
    return x + layer.mlp(layer.post_attention_layernorm(x))


def _later(x: Tensor, count: int) -> Tensor:
    """(B, H, T, d), each position with what stood ``count`` before it; zeros before the first."""
    return F.pad(x, (0, 0, count, 0))[:, :, : x.shape[2]]
