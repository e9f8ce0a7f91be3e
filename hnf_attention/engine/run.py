"""Which way a checked call takes: straight to its engine, through autograd, or as what else runs it needs it."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import tracing
from ..reference import sampling
from ..statistics.rows import RowStats
from . import engines, plain
from .autograd import EagerAttention
from .call import Call
from .derivatives import AttentionNode
from .operators import flat, forward_op, sample_op, unpacked


def run(call: Call, detached: bool = False) -> tuple[Tensor | None, RowStats]:
    """The output and the row statistics of a checked call.

    detached: the statistics are outside autograd. Without a value the output is None or has no elements.
    """
    query, key, value, options, _ = call
    if not tracing.untraced(query, key, value):
        out, rows = _run_traced(call)
        return out, rows.detach() if detached else rows
    if torch.is_grad_enabled():
        differentiable = (query, key, value, options.attn_mask, options.sinks)
        if any(x is not None and x.requires_grad for x in differentiable):
            return EagerAttention.attach(call, detached)
    out, *numbers = engines.forward(call)
    return out, RowStats.unpack(*numbers)


def _run_traced(call: Call) -> tuple[Tensor | None, RowStats]:
    query, key, value, options, _ = call
    functional = tracing.functional()
    # Operators have no forward mode. Compilers do not differentiate the nodes of a transform.
    if (functional and tracing.traced()) or tracing.has_tangent(
        query, key, value, options.attn_mask, options.sinks
    ):
        return plain.attend(call)
    out, *rows = (AttentionNode.apply if functional else forward_op)(*flat(call))
    return out, unpacked(rows)


@torch.no_grad()
def run_sample(call: Call, sample: tuple[int, int]) -> RowStats:
    """The row statistics of a sample (period, phase) of a checked call's rows."""
    period = sampling.effective_period(sample[0], call.query.shape[2])
    phase = sample[1] % period
    if tracing.untraced(call.query, call.key):
        return RowStats.unpack(*engines.sample(call, period, phase))
    query, key, _, *others = flat(call)
    return unpacked(sample_op(query, key, *others, period, phase))
