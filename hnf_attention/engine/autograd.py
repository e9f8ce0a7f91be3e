"""Calls as one node of autograd, for code that nothing traces."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import compat
from ..statistics.rows import RowStats
from ..tracing import untraced
from . import engines, library
from .call import BackwardInputs, Call
from .derivatives import gradients
from .operators import flat


class EagerAttention(torch.autograd.Function):
    """The forward and backward of a call, without torch.library between them and autograd.

    Every tensor that passes through autograd costs the host a few microseconds, so only what is
    differentiable does.
    """

    @classmethod
    def attach(cls, call: Call, detached: bool) -> tuple[Tensor | None, RowStats]:
        """The output and the row statistics of a call whose tensors require a gradient.

        detached: the statistics are outside autograd.
        """
        query, key, value, options, _ = call
        rest: list[Any] = []
        # `apply`, without its search for the transforms that `untraced` has ruled out.
        apply = super(torch.autograd.Function, cls).apply  # type: ignore[misc]
        results = apply(query, key, value, options.attn_mask, options.sinks, call, detached, rest)
        if detached:
            return results, RowStats.unpack(*rest)
        out, lse, entropy = results
        return out, RowStats.unpack(lse, entropy, *rest)

    @staticmethod
    def forward(ctx, query, key, value, attn_mask, sinks, call, detached, rest):
        out, *rows = engines.forward(call)
        options = call.options
        ctx.set_materialize_grads(False)
        ctx.chosen = library.choice()
        ctx.save_for_backward(query, key, value, attn_mask, sinks, options.seqlens, out, *rows[:2])
        ctx.options = options if options.plain else options._replace(attn_mask=None, sinks=None, seqlens=None)
        rest += rows if detached else rows[2:]
        return out if detached else (out, *rows[:2])

    @staticmethod
    def backward(ctx, d_out, d_lse=None, d_entropy=None):
        query, key, value, attn_mask, sinks, seqlens, out, lse, entropy = ctx.saved_tensors
        if d_out is None and d_lse is None and d_entropy is None:
            return (None,) * 8
        options, learns_mask = ctx.options, ctx.needs_input_grad[3]
        if not attn_mask is sinks is seqlens is None:
            options = options._replace(attn_mask=attn_mask, sinks=sinks, seqlens=seqlens)
        call = Call(query, key, value, options)
        results, cotangents = (out, lse, entropy), (d_out, d_lse, d_entropy)
        found: Sequence[Tensor | None]
        # Autograd enables gradients in a backward whose own derivative is wanted (create_graph=True).
        if torch.is_grad_enabled() or not untraced(query, *cotangents) or _batched(cotangents):
            found = gradients(flat(call)[:9], results, cotangents, [learns_mask, *ctx.chosen])
        else:
            found = engines.backward(call, BackwardInputs(*results, *cotangents), learns_mask, ctx.chosen)
        d_query, d_key, d_value, d_sinks, d_mask = found
        return d_query, d_key, d_value, d_mask, d_sinks, *(None,) * 3


def _batched(cotangents: tuple[Tensor | None, ...]) -> bool:
    return any(x is not None and compat.in_gradient_batch(x) for x in cotangents)
