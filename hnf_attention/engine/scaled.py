"""Queries times a factor for each head, as a node of autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import compat
from ..tracing import untraced
from . import engines


def scaled_queries(query: Tensor, factors: Tensor) -> Tensor:
    """query (B, H, M, D) times factors (H,) fp32, each product rounded once, in the query's dtype and layout.

    The factors are constants of the gradient.
    """
    if engines.kernels_cover(query, None) and query.stride(3) == 1 and query.numel() and untraced(query):
        return _Scaled.apply(query, factors)
    return _product(query, factors)


def _product(x: Tensor, factors: Tensor) -> Tensor:
    return (x * factors[:, None, None]).to(x.dtype)


def _kernel(x: Tensor, factors: Tensor, out: Tensor) -> Tensor:
    with engines.on_device(x):
        return engines.kernel("measure.clip").scaled(x, factors, out)


class _Scaled(torch.autograd.Function):
    """By a kernel. The gradient that attention has just made is changed in place, in heads with a factor below 1."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, factors: Tensor) -> Tensor:
        ctx.factors = factors
        return _kernel(query, factors, torch.empty_like(query))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        # Autograd enables gradients in a backward whose own derivative is wanted (create_graph=True).
        differentiated = torch.is_grad_enabled() or not untraced(grad) or compat.in_gradient_batch(grad)
        if differentiated or not (grad.is_contiguous() or grad.transpose(1, 2).is_contiguous()):
            return _product(grad, ctx.factors), None
        return _kernel(grad, ctx.factors, grad), None
