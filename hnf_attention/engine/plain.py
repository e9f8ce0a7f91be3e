"""Calls in plain PyTorch, which PyTorch itself can differentiate in any way and any number of times.

Kernels have a first derivative in reverse mode only. Whatever goes beyond it is computed here. Reverse mode then keeps
the weights: the memory is one number per score.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..reference import attention as reference
from ..statistics.rows import RowStats
from ..tracing import functional
from . import engines
from .call import Call


def attend(call: Call) -> tuple[Tensor | None, RowStats]:
    """The output and the row statistics of a checked call; only out, lse and entropy are differentiable."""
    with engines.no_autocast(call.query):
        out, rows = reference.attention(*call[:4], extended=call.extended)
    return out, replace(rows.detach(), lse=rows.lse, entropy=rows.entropy)


def vjp(
    function: Callable[..., tuple[Tensor, ...]], inputs: tuple[Tensor, ...], cotangents: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """The gradients of the inputs of a function, from the cotangents of its results."""
    if functional():
        return torch.func.vjp(function, *inputs)[1](cotangents)
    # torch.func refuses hooks on saved tensors, and torch.autograd.functional a batch of cotangents.
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        own = [x.view_as(x) if x.requires_grad else x.detach().requires_grad_() for x in inputs]
        results = function(*own)
    return torch.autograd.grad(results, own, cotangents, create_graph=again, materialize_grads=True)


def pull_back(
    call: Call, cotangents: Sequence[Tensor | None], mask_gradient: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of query, key, value, sinks and mask, each None where there is no such input.

    cotangents: of out, lse and entropy; a None is 0. The gradients are differentiable in them and in the inputs.
    mask_gradient: also that of the additive mask.
    """
    query, key, value, options, _ = call
    inputs = [query, key, value, options.sinks, options.attn_mask if mask_gradient else None]
    there = [x is not None for x in inputs]

    def results(*given: Tensor) -> tuple[Tensor, ...]:
        left = iter(given)
        query, key, value, sinks, mask = (next(left) if x else None for x in there)
        shaped = options._replace(sinks=sinks, attn_mask=mask if mask_gradient else options.attn_mask)
        out, rows = attend(Call(query, key, value, shaped))  # type: ignore[arg-type]  # both are there
        computed = (out, rows.lse, rows.entropy)
        return tuple(x for x, cotangent in zip(computed, cotangents) if cotangent is not None)  # type: ignore[misc]

    given = tuple(x for x in cotangents if x is not None)
    gradients = iter(vjp(results, tuple(x for x in inputs if x is not None), given))
    return tuple(next(gradients) if x else None for x in there)  # type: ignore[return-value]
