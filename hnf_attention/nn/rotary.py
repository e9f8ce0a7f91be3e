"""Rotary position embedding (arXiv 2104.09864), in the order of LLaMA's checkpoints: halves of a head turn together."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..statistics.checks import expected


class Rope(NamedTuple):
    """theta: base of the wavelengths. dim: how many dimensions of a head turn, even; None for all of them."""

    theta: float = 10000.0
    dim: int | None = None


def tables(rope: Rope, positions: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines (..., M, dim / 2) in fp32, of positions (..., M)."""
    dim = head_dim if rope.dim is None else rope.dim
    exponents = torch.arange(0, dim, 2, dtype=torch.float32, device=positions.device) / dim
    angles = positions[..., None].float() * rope.theta**-exponents
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """x (B, H, M, D), turned. cosine, sine: (M, half) or (B, M, half), each angle once; dimensions past 2 half stay.

    Raises ValueError for tables of other shapes.
    """
    if cosine.shape != sine.shape or cosine.dim() not in (2, 3) or 2 * cosine.shape[-1] > x.shape[-1]:
        raise expected(
            f"cosines and sines of shape (M, half) or (B, M, half), half at most {x.shape[-1] // 2}",
            f"{tuple(cosine.shape)} and {tuple(sine.shape)}",
        )
    half = cosine.shape[-1]
    cosine, sine = ((t[None] if t.dim() == 2 else t)[:, None].to(x.dtype) for t in (cosine, sine))
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine, rest], -1)
