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
    fits = query.dim() == 4 and query.shape[1] == len(factors) and query.stride(3) == 1 and query.numel() > 0
    if fits and engines.kernels_cover(query, None) and untraced(query):
        return _Scaled.apply(query, factors)
    return _product(query, factors[:, None, None])


def _product(x: Tensor, factors: Tensor) -> Tensor:
    return (x * factors).to(x.dtype)


def _kernel(x: Tensor, factors: Tensor) -> Tensor:
    with engines.on_device(x):
        return engines.kernel("measure.clip").scaled(x, factors)


class _Scaled(torch.autograd.Function):
    """By a kernel."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, factors: Tensor) -> Tensor:
        # A checkpoint may compute the product the other time: it saves the same.
        ctx.save_for_backward(factors[:, None, None])
        return _kernel(query, factors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (factors,) = ctx.saved_tensors
        # Autograd enables gradients in a backward whose own derivative is wanted (create_graph=True).
        differentiated = torch.is_grad_enabled() or not untraced(grad) or compat.in_gradient_batch(grad)
        if differentiated or grad.stride(3) != 1:
            return _product(grad, factors), None
        return _kernel(grad, factors.flatten()), None
