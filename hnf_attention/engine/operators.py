"""Calls as operators of torch.library.

A compiler or a dispatch mode sees one operator with a fake kernel, so that `torch.compile(fullgraph=True)` keeps a call
whole. `derivatives` gives the operators their gradients.
"""
# No `from __future__ import annotations` here: torch.library reads the annotations themselves.

from collections.abc import Sequence
from typing import List, Optional, Tuple  # noqa: UP035 (torch 2.8 infers operator schemas from these only)

import torch
from torch import Tensor

from ..reference import sampling
from ..reference.attention import compute_dtype, empty_output
from ..reference.options import Options
from ..statistics.fields import EXTENDED_FIELDS
from ..statistics.rows import RowStats
from . import engines, library
from .call import BackwardInputs, Call

FlatCall = tuple[
    Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None,
    bool, int | None, list[float], bool,
]  # fmt: skip


def flat(call: Call) -> FlatCall:
    """A call in the types that operators take: they know no classes of ours."""
    query, key, value, o, extended = call
    numbers = [o.scale] if o.softcap is None else [o.scale, o.softcap]
    return query, key, value, o.attn_mask, o.sinks, o.seqlens, o.is_causal, o.window_size, numbers, extended


def unflat(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    attn_mask: Tensor | None,
    sinks: Tensor | None,
    seqlens: Tensor | None,
    is_causal: bool,
    window_size: int | None,
    numbers: list[float],
    extended: bool = False,
) -> Call:
    """The call that `flat` took apart. numbers: the scale, and the soft-cap if there is one."""
    scale, *softcap = numbers
    options = Options(
        attn_mask, is_causal, scale, window_size, softcap[0] if softcap else None, sinks, seqlens
    )
    return Call(query, key, value, options, extended)


def _placeholder(x: Tensor | None, query: Tensor) -> Tensor:
    """An operator returns tensors only: one without elements stands for None."""
    return query.new_empty(0) if x is None else x


def unpacked(rows: Sequence[Tensor]) -> RowStats:
    """Row statistics from an operator's results."""
    lse, entropy, max_logit, min_logit, more, *index = rows
    return RowStats.unpack(lse, entropy, max_logit, min_logit, None if more.dim() == 1 else more, *index)


def _forward(
    query: Tensor,
    key: Tensor,
    value: Optional[Tensor],  # noqa: UP045
    attn_mask: Optional[Tensor],  # noqa: UP045
    sinks: Optional[Tensor],  # noqa: UP045
    seqlens: Optional[Tensor],  # noqa: UP045
    is_causal: bool,
    window_size: Optional[int],  # noqa: UP045
    numbers: List[float],  # noqa: UP006
    extended: bool,
) -> Tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # noqa: UP006
    shape = (is_causal, window_size, numbers)
    out, *core, more = engines.forward(unflat(query, key, value, attn_mask, sinks, seqlens, *shape, extended))
    return _placeholder(out, query), *core, _placeholder(more, query)


forward_op = torch.library.custom_op("hnf_attention::forward", _forward, mutates_args=())


@forward_op.register_fake
def _(query, key, value, attn_mask, sinks, seqlens, is_causal, window_size, numbers, extended):
    out = None if value is None else empty_output(query, value.shape[3])
    return _placeholder(out, query), *_fake_rows(query, query.shape[2], extended)


def _fake_rows(query: Tensor, num_rows: int, extended: bool) -> list[Tensor]:
    dtype, shape = compute_dtype(query), (*query.shape[:2], num_rows)
    shapes = [shape] * 4 + [(len(EXTENDED_FIELDS), *shape) if extended else (0,)]
    return [query.new_empty(shape, dtype=dtype) for shape in shapes]


def _sample(
    query: Tensor,
    key: Tensor,
    attn_mask: Optional[Tensor],  # noqa: UP045
    sinks: Optional[Tensor],  # noqa: UP045
    seqlens: Optional[Tensor],  # noqa: UP045
    is_causal: bool,
    window_size: Optional[int],  # noqa: UP045
    numbers: List[float],  # noqa: UP006
    extended: bool,
    period: int,
    phase: int,
) -> Tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # noqa: UP006
    shape = (is_causal, window_size, numbers)
    call = unflat(query, key, None, attn_mask, sinks, seqlens, *shape, extended)
    *core, more, index = engines.sample(call, period, phase)
    return *core, _placeholder(more, query), index


sample_op = torch.library.custom_op("hnf_attention::sample", _sample, mutates_args=())


@sample_op.register_fake
def _(query, key, attn_mask, sinks, seqlens, is_causal, window_size, numbers, extended, period, phase):
    num_rows = sampling.num_rows(query.shape[2], period)
    index = query.new_empty((*query.shape[:2], num_rows), dtype=torch.int64)
    return *_fake_rows(query, num_rows, extended), index


def _gradients(
    query: Tensor,
    key: Tensor,
    value: Optional[Tensor],  # noqa: UP045
    attn_mask: Optional[Tensor],  # noqa: UP045
    sinks: Optional[Tensor],  # noqa: UP045
    seqlens: Optional[Tensor],  # noqa: UP045
    is_causal: bool,
    window_size: Optional[int],  # noqa: UP045
    numbers: List[float],  # noqa: UP006
    out: Tensor,
    lse: Tensor,
    entropy: Tensor,
    d_out: Optional[Tensor],  # noqa: UP045
    d_lse: Optional[Tensor],  # noqa: UP045
    d_entropy: Optional[Tensor],  # noqa: UP045
    switches: List[bool],  # noqa: UP006
) -> Tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # noqa: UP006
    shape = (is_causal, window_size, numbers)
    call = unflat(query, key, value, attn_mask, sinks, seqlens, *shape)
    inputs = BackwardInputs(out, lse, entropy, d_out, d_lse, d_entropy)
    mask_gradient, *chosen = switches  # whether the mask learns, and the user's `library.choice()`
    gradients = engines.backward(call, inputs, mask_gradient, library.Choice(*chosen))
    # Contiguous, as the fake kernel says.
    d_query, d_key, d_value, d_sinks, d_mask = (
        _placeholder(None if g is None else g.contiguous(), query) for g in gradients
    )
    return d_query, d_key, d_value, d_sinks, d_mask


gradients_op = torch.library.custom_op("hnf_attention::backward", _gradients, mutates_args=())


@gradients_op.register_fake
def _(query, key, value, attn_mask, sinks, *others):
    mask_gradient = others[-1][0]

    def like(x):
        contiguous = None if x is None else torch.empty_like(x, memory_format=torch.contiguous_format)
        return _placeholder(contiguous, query)

    return like(query), like(key), like(value), like(sinks), like(attn_mask if mask_gradient else None)
