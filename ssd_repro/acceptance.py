"""The maths of speculative sampling. SYMBOLS, as in the paper: p is the DRAFT, q the TARGET.

(Leviathan et al. and several libraries use them the other way round.) Imports torch alone,
but for the draw.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .sampling import draw


def accept_probability(p: Tensor, q: Tensor, tokens: Tensor, tolerance: float) -> Tensor:
    """Eq. 5: min(1, q(x)/p(x)) + beta, at most 1. p, q (..., V), tokens x (...) -> (...).

    Where p(x) = 0 (a token that the draft cannot have drawn) the ratio is 0 if q(x) = 0, else 1.
    """
    p_x = p.gather(-1, tokens[..., None])[..., 0]
    q_x = q.gather(-1, tokens[..., None])[..., 0]
    ratio = (q_x / p_x.clamp_min(torch.finfo(p.dtype).tiny)).clamp_max(1.0)
    return (ratio + tolerance).clamp_max(1.0)


def residual(p: Tensor, q: Tensor) -> Tensor:
    """Eq. 6: normalize(max(0, q - p)), (..., V); q itself where that is zero everywhere."""
    excess = (q - p).clamp_min(0.0)
    total = excess.sum(-1, keepdim=True)
    return torch.where(total > 0, excess / total, q)


class Rule(Protocol):
    """An acceptance rule: when to keep a drafted token, and what to draw in its place."""

    def accept(self, p: Tensor, q: Tensor, tokens: Tensor) -> Tensor:
        """Probability to keep tokens (...), given p, q (..., V) -> (...)."""

    def residual(self, p: Tensor, q: Tensor) -> Tensor:
        """The distribution after a rejection, (..., V); it must be q where p is zero everywhere."""


@dataclass(frozen=True)
class Tolerance:
    """The paper's rule, tolerance factor beta in [0, 1]; 0 is lossless speculative sampling."""

    beta: float

    def accept(self, p: Tensor, q: Tensor, tokens: Tensor) -> Tensor:
        return accept_probability(p, q, tokens, self.beta)

    def residual(self, p: Tensor, q: Tensor) -> Tensor:
        return residual(p, q)


def verify(
    p: Tensor, q: Tensor, tokens: Tensor, tolerance: float | Rule, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """One round of Algorithm 1 -> (n, next), 0-dim int64 on the device, no host synchronisation.

    p (L, V): what the draft sampled tokens (L,) from; q (L+1, V): the target's. n: how many
    drafted tokens are accepted before the first rejection; next: the token after them,
    resampled from the residual (n < L) or the bonus token from q_(L+1) (n = L). With L = 0
    it is a plain step of the target.
    """
    length = tokens.shape[0]
    if length == 0:
        return tokens.new_zeros(()), draw(q[0], generator)
    rule = Tolerance(tolerance) if isinstance(tolerance, (int, float)) else tolerance
    uniform = torch.rand(length, generator=generator, device=p.device)  # [0, 1)
    kept = uniform < rule.accept(p, q[:-1], tokens)
    n = kept.long().cumprod(0).sum()
    ended = n[None]  # an index tensor: p[n] would read n on the host
    drafted = torch.cat((p, torch.zeros_like(p[:1])))  # past the draft p = 0: residual is q
    rest = rule.residual(drafted.index_select(0, ended), q.index_select(0, ended))
    return n, draw(rest[0], generator)


def output_law(p: Tensor, q: Tensor, tolerance: float | Rule) -> Tensor:
    """What one position outputs: P(x) = p(x) a(x) + (1 - sum p a) r(x); p, q (V,) -> (V,)."""
    rule = Tolerance(tolerance) if isinstance(tolerance, (int, float)) else tolerance
    size = p.shape[-1]
    every = torch.arange(size, device=p.device)
    accepted = p * rule.accept(p.expand(size, size), q.expand(size, size), every)
    return accepted + (1 - accepted.sum()) * rule.residual(p, q)


def total_variation(a: Tensor, b: Tensor) -> Tensor:
    """Half the sum of |a - b| over the last dimension: (..., V) -> (...)."""
    return (a - b).abs().sum(-1) / 2
