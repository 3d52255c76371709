"""Logits and history -> the distribution that a step really samples from, in closed form.

Draft (p) and target (q) both go through ``probabilities``: the ratio q/p and the
residual then see temperature, top-k, top-p, RAS and the ban on end-of-speech.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..errors import InputError, check_number


@dataclass(frozen=True)
class Sampler:
    """How a step samples; the defaults are CosyVoice's since its commit f2ddcbe (2026-02-04).

    temperature  divides the logits; 0 is greedy (the most likely token; RAS is then off)
    top_k        nucleus: at most so many tokens; 0 is off
    top_p        nucleus: tokens while the mass before them is below this; 1 is off
    ras          repetition-aware sampling: a token drawn from the nucleus that stands at
                 least ras_window * ras_tau times among the last ras_window tokens is drawn
                 again from the full softmax
    ras_masks_repeat  that full softmax is without the repeated token; False: with it, CosyVoice
                 before f2ddcbe
    bans_by_mask banned tokens are masked before the softmax; False: the step is drawn again
                 until another comes, CosyVoice before 0e62489 (2026-02-11), which however
                 gave up after 100 trials. The distributions differ: a mask makes room in the nucleus.
    """

    temperature: float = 1.0
    top_k: int = 25
    top_p: float = 0.8
    ras: bool = True
    ras_window: int = 10
    ras_tau: float = 0.1
    ras_masks_repeat: bool = True
    bans_by_mask: bool = True

    def __post_init__(self):
        if self.temperature != 0:
            check_number("temperature (0 is greedy, otherwise)", self.temperature, 0.001, 1000.0)
        check_number("temperature", self.temperature, 0.0, 1000.0)
        check_number("top_k (0 is off)", self.top_k, 0, math.inf, whole=True)
        check_number("top_p (1 is off)", self.top_p, 0.001, 1.0)
        for name in ("ras", "ras_masks_repeat", "bans_by_mask"):
            if not isinstance(getattr(self, name), bool):
                raise InputError(f"{name} is {getattr(self, name)!r}; it must be True or False.")
        check_number("ras_window", self.ras_window, 1, 1000, whole=True)
        check_number("ras_tau", self.ras_tau, 0.001, 1.0)


class Law(Protocol):
    """What a step samples from as a function, in place of a ``Sampler``; draft and target go through the same."""

    def __call__(self, logits: Tensor, tokens: Tensor) -> Tensor:
        """logits (n, V), tokens (m + n - 1,) -> float32 (n, V); row i comes after the first m + i tokens.

        A row whose logits hold a NaN, or that leaves nothing to draw, must come out NaN.
        """


def probabilities(logits: Tensor, history: Tensor, sampler: Sampler, banned: Tensor | None = None) -> Tensor:
    """The distribution that a step samples from: logits (..., V) -> float32 (..., V).

    history: (..., H) int64, the speech tokens before each step, newest last, padded with
    -1 on the left, H >= ras_window. banned: bool, broadcastable to (..., V), tokens that
    must not come. Rows whose logits hold a NaN (or no finite value), or that leave nothing
    to draw, come out NaN. No host synchronisation.
    """
    logits = logits.float()
    if banned is not None and (sampler.bans_by_mask or sampler.temperature == 0):
        logits = logits.masked_fill(banned, -math.inf)
    if sampler.temperature == 0:
        peak, best = logits.max(-1, keepdim=True)
        one = peak - peak + 1  # 1, or NaN where the logits are not finite
        return torch.zeros_like(logits).scatter_(-1, best, one)
    if sampler.temperature != 1:
        logits = logits / sampler.temperature
    full = logits.softmax(-1)
    nucleus, peak = _nucleus(full, sampler)
    sampled = _repetition_aware(nucleus, full, peak, history, sampler) if sampler.ras else nucleus
    if banned is not None and not sampler.bans_by_mask:
        sampled = sampled.masked_fill(banned, 0.0)
        sampled = sampled / sampled.sum(-1, keepdim=True)
    return sampled


def _nucleus(full: Tensor, sampler: Sampler) -> tuple[Tensor, Tensor]:
    """CosyVoice's nucleus: at most top_k tokens, while the mass before them is < top_p.

    -> the nucleus (..., V) and the most likely token (..., 1).
    """
    size = full.shape[-1]
    k = min(sampler.top_k or size, size)
    if k == size and sampler.top_p == 1:
        return full, full.argmax(-1, keepdim=True)
    top, index = full.topk(k)  # sorted, descending
    if sampler.top_p < 1:
        top = top * (top.cumsum(-1) - top < sampler.top_p)
    return torch.zeros_like(full).scatter_(-1, index, top / top.sum(-1, keepdim=True)), index[..., :1]


def on_host(tensor: Tensor) -> bool:
    """Whether the host can read it at no cost: on a GPU a read waits for all that was asked for before."""
    return tensor.device.type == "cpu"


def _repetition_aware(nucleus: Tensor, full: Tensor, peak: Tensor, history: Tensor, sampler: Sampler) -> Tensor:
    """RAS: n(x)[x not in R] + sum over y in R of n(y) f(x) [x != y] / (1 - f(y)), (..., V).

    Without ras_masks_repeat the sum is of n(y) f(x). n: the nucleus, f: the full softmax,
    R: the tokens that repeat. Only the W tokens of the window can be in R, so the sum is
    over (..., W). Where f(y) is 1 nothing is left to draw again: y stays.
    """
    window = history[..., -sampler.ras_window :]
    needed = math.ceil(sampler.ras_window * sampler.ras_tau - 1e-9)  # 10 * 0.1 -> 1
    index = window.clamp_min(0)  # padding reads as token 0; it is counted only where it stands
    repeats = (index[..., :, None] == window[..., None, :]).sum(-1) >= needed
    if on_host(repeats) and not repeats.any():  # what follows is two thirds of the time
        return nucleus
    same = index[..., :, None] == index[..., None, :]  # (..., W, W)
    first = ~same.tril(-1).any(-1)  # a token that stands twice enters the sum once

    n, f = nucleus.gather(-1, index), full.gather(-1, index)
    if sampler.ras_masks_repeat:
        # 1 - f(y) without cancellation: for the most likely token add up all the others.
        others = full.scatter(-1, peak, 0.0).sum(-1, keepdim=True)
        rest, drawn = torch.where(index == peak, others, 1 - f), ~same
    else:
        rest, drawn = torch.ones_like(f), torch.ones_like(same)
    redraw = rest > 1e-30
    weight = torch.where(repeats & first & redraw, n / rest, 0.0)
    # The sum leaves x itself out (pair by pair: subtracting it would cancel).
    elsewhere = (weight[..., None, :] * drawn).sum(-1)
    mixed = torch.addcmul(nucleus, full, weight.sum(-1, keepdim=True))
    value = torch.where(redraw, f * elsewhere, n + f * elsewhere)
    mixed.scatter_(-1, index, torch.where(repeats, value, mixed.gather(-1, index)))
    return mixed / mixed.sum(-1, keepdim=True)


def draw(probs: Tensor, generator: torch.Generator) -> Tensor:
    """One token from each row of probs (..., V) -> (...,) int64; rows need not sum to 1.

    The cumulative sum inverted at one uniform number a row, in float64: no host
    synchronisation (``torch.multinomial`` has one), and at V = 6,564 on a CPU an eighth of
    the time of the argmax of probs / Exponential noise. A token of probability 0 is not drawn.
    """
    uniform = torch.rand((*probs.shape[:-1], 1), generator=generator, dtype=torch.float64, device=probs.device)
    return invert(probs, uniform)


def invert(probs: Tensor, uniform: Tensor) -> Tensor:
    """``draw`` with given numbers: probs (..., V), uniform (..., 1) float64 in [0, 1) -> (...,) int64."""
    total = probs.cumsum(-1, dtype=torch.float64)
    index = torch.searchsorted(total, uniform * total[..., -1:], right=True)
    return index[..., 0].clamp_max(probs.shape[-1] - 1)  # NaN rows end beyond the last
