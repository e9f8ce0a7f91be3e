"""Gradients where all scores of a query are low, which some versions of cuDNN get wrong: PyTorch's and ours."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ...engine.api import attention
from ...engine.card import current_device
from ...reference import attention as reference
from .self_test import OUTPUT_TOLERANCE, options_of, relative

OURS = "attention()"
KEYS = (64, 97, 128, 192)  # cuDNN 9.19 is wrong with 64 and 192 (bench/cudnn_low_lse.py)
SCORE = -122.0  # exp(-SCORE) is beyond the largest fp32, exp(88.7)
_HEADS, _HEAD_DIM, _DTYPE = 2, 64, torch.bfloat16


@dataclass(frozen=True)
class LowScores:
    """Who gives wrong gradients: name -> the numbers of keys with which the gradients are not finite, or wrong."""

    wrong: dict[str, list[int]]

    @property
    def passed(self) -> bool:
        """Whether ours are right. PyTorch's own are not ours to fail."""
        return not self.wrong[OURS]

    def text(self) -> str:
        """'SDPA right, SDPA by cuDNN WRONG (64 and 192 keys), attention() right'"""
        return ", ".join(
            f"{name} " + (f"WRONG ({' and '.join(map(str, keys))} keys)" if keys else "right")
            for name, keys in self.wrong.items()
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON types."""
        return {"keys_with_wrong_gradients": self.wrong, "passed": self.passed}


def low_scores() -> LowScores:
    """Try SDPA as PyTorch chooses its kernel, SDPA by cuDNN where that is offered, and ours."""
    tried: dict[str, Callable[..., Tensor]] = {
        "SDPA": F.scaled_dot_product_attention,
        "SDPA by cuDNN": _by_cudnn,
        OURS: lambda query, key, value: attention(query, key, value)[0],
    }
    wrong: dict[str, list[int]] = {}
    for name, attend in tried.items():
        try:
            wrong[name] = [keys for keys in KEYS if not _right(attend, keys)]
        except RuntimeError:
            if name == OURS:
                raise
            # PyTorch offers no such kernel.
    return LowScores(wrong)


def _by_cudnn(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    with warnings.catch_warnings(), sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        warnings.simplefilter("ignore")  # they say why the other kernels are not used
        return F.scaled_dot_product_attention(query, key, value)


def _right(attend: Callable[..., Tensor], keys: int) -> bool:
    """Whether the gradients agree with fp64's."""
    *tensors, d_out = _problem(keys)
    leaves = [x.requires_grad_() for x in tensors]
    gradients = torch.autograd.grad(attend(*leaves), leaves, d_out)
    q, k, v = (x.detach().double() for x in leaves)
    options = options_of(q, False)
    out, rows = reference.attention(q, k, v, options)
    assert out is not None
    true = reference.backward(q, k, v, options, out, rows.lse, rows.entropy, d_out.double(), None, None)
    # The first coordinate of dq and dk is the rounded rest of a sum that cancels.
    errors = (relative(g[..., 1:], t[..., 1:]) for g, t in zip(gradients, true[:3]) if t is not None)
    return all(error <= OUTPUT_TOLERANCE[_DTYPE] for error in errors)  # False for NaN


def _problem(keys: int) -> list[Tensor]:
    """(q, k, v, d_out) whose scores are SCORE and noise. One coordinate adds the same number to every score."""
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(1, _HEADS, keys, _HEAD_DIM, generator=generator) for _ in range(4)]
    size = math.sqrt(-SCORE * _HEAD_DIM**0.5)
    tensors[0][..., 0], tensors[1][..., 0] = size, -size
    return [x.to(current_device(), _DTYPE) for x in tensors]
