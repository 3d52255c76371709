"""Matrices as whole numbers of one byte: how a voice's files hold them, and a runtime its weights."""

from __future__ import annotations

import torch
from torch import Tensor


def by_row(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Float32 (m, n), rounded to int8 of -127 .. 127 and a scale of each row, float32 (m, 1)."""
    scale = weight.abs().amax(1, keepdim=True).clamp_min(1e-12) / 127
    return (weight / scale).round().to(torch.int8), scale


def is_by_row(weight: Tensor) -> bool:
    """Whether ``by_row`` changes nothing, but for rounding of float32."""
    whole, scale = by_row(weight)
    return torch.allclose(whole.float() * scale, weight, rtol=1e-6, atol=0)
