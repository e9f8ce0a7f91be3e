"""One attention call to head statistics on the device, by one launch of `fold_kernel`.

Whoever reads an accumulator adds its slots up.
"""

import functools
from typing import Protocol

import torch
import triton

from ..shared.descriptors import strided
from ..shared.launch import launch
from ..shared.masks import call_of
from ..shared.plan import Options, ScorePlan, score_plan
from ..shared.results import Core
from ..shared.sampling import BLOCK_ROWS
from ..shared.tiles import block_dim
from .fold_kernel import fold_kernel
from .fold_layout import Context, FoldPlan, Layout, MaxFields, SumFields, Table
from .mask_map import scan_mask

__all__ = ["SLOTS", "Layout", "MaxFields", "SumFields", "fold"]

# One wave on the 132 multiprocessors of an H100 for 16 heads; the accumulator grows with it.
SLOTS = 32
# Columns of q and k held at a time, so that 64 rows are 32 elements a thread: four programs fit a
# multiprocessor, without spills.
_COLUMNS = 64


class RowStatistics(Protocol):
    """Row statistics (B, H, M), fp32, of all rows, or of the sample `row_index`, int64 (B, H, M_s)."""

    lse: torch.Tensor
    entropy: torch.Tensor
    max_logit: torch.Tensor
    min_logit: torch.Tensor
    row_index: torch.Tensor | None


class CallContext(Protocol):
    """What is known of a call beside its tensors; each may be None."""

    left_out: torch.Tensor | None  # boolean (B, M)
    hidden_keys: torch.Tensor | None  # boolean (B, N)
    shared_key: torch.Tensor | None  # int64 (B, H), -1 for none
    value_size: torch.Tensor | None  # (B, H_kv, N)
    out_size: torch.Tensor | None  # (B, 1 or H, M)
    continues: bool


def _context(given: CallContext, query: torch.Tensor, key: torch.Tensor) -> Context:
    """Pointers and strides of a context."""
    batch, heads, num_queries, _ = query.shape
    num_keys = key.shape[2]
    left_out, hidden, shared, out = given.left_out, given.hidden_keys, given.shared_key, given.out_size
    if left_out is not None or hidden is not None:  # both or neither
        left_out, hidden = (
            torch.zeros(batch, length, dtype=torch.bool, device=query.device) if x is None else x
            for x, length in ((left_out, num_queries), (hidden, num_keys))
        )
    if shared is None:
        shared = torch.full((batch, heads), -1, dtype=torch.int64, device=query.device)
    if out is not None:
        out = out.expand(batch, heads, num_queries)
    of_tokens = *_pointer(left_out, 2), *_pointer(hidden, 2), *_pointer(shared, 2)
    return Context(*of_tokens, *_pointer(given.value_size, 3), *_pointer(out, 3))


def _pointer(x: torch.Tensor | None, dims: int) -> tuple[torch.Tensor | int | None, ...]:
    """The tensor, booleans as bytes, and its strides; None and zeros for None."""
    if x is None:
        return None, *[0] * dims
    return x.view(torch.uint8) if x.dtype == torch.bool else x, *x.stride()


@functools.cache
def _plan(
    scores: ScorePlan,
    has_sinks: bool,
    is_sampled: bool,
    has_context: tuple[bool, bool, bool],
    group: int,
    head_dim: int,
    layout: Layout,
) -> FoldPlan:
    width = block_dim(head_dim)
    return FoldPlan(
        **vars(scores),
        has_sinks=has_sinks,
        has_table=scores.has_mask,
        has_padding=has_context[0],
        has_values=has_context[1],
        has_outputs=has_context[2],
        is_sampled=is_sampled,
        group=group,
        head_dim=head_dim,
        block=BLOCK_ROWS,
        block_d=width,
        columns=min(width, _COLUMNS),
        width=triton.next_power_of_2(layout.num_fields),
        bins=triton.next_power_of_2(layout.bins + 1),
        num_sums=layout.num_sums,
        num_fields=layout.num_fields,
        layout=layout,
    )


def fold(
    accumulator: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    rows: RowStatistics,
    options: Options,
    context: CallContext,
    layout: Layout,
    control: torch.Tensor | None = None,
) -> None:
    """Add one call to `accumulator`, for head dimensions up to 256 and not fp64.

    accumulator (slots, layout.num_fields, H) fp64, query (B, H, M, D), key (B, H_kv, N, D), rows of (B, H, M)
    or a sample of them; any strides (rows, and q and k of an inner stride other than 1, are copied if need be).
    control: see `shared.control`. The accumulator is then (2, slots, layout.num_fields, H), for forwards under grad and
    for others. None for a fold that always runs.
    """
    batch, heads, num_queries, head_dim = query.shape
    kv_heads, num_keys = key.shape[1:3]
    told = _context(context, query, key)
    query, key = (x if x.stride(3) == 1 else x.contiguous() for x in (query, key))
    call = call_of(query, key, options)
    table = Table(None, 0, 0, 0)
    if options.attn_mask is not None:
        scanned, strides = scan_mask(options, num_queries, num_keys, call.bounds_ptr, control)
        table = Table(scanned, *strides)
    index = rows.row_index
    core = (rows.lse, rows.entropy, rows.max_logit, rows.min_logit)
    launch(
        fold_kernel,
        (accumulator.shape[-3], heads, 1),
        _plan(
            score_plan(options),
            options.sinks is not None,
            index is not None,
            (told.left_out_ptr is not None, told.value_ptr is not None, told.out_ptr is not None),
            heads // kv_heads,
            head_dim,
            layout,
        ),
        query.device,
        {
            "accumulator_ptr": accumulator,
            "rows": Core(*(x.contiguous() for x in core)),
            "q": strided(query),
            "k": strided(key),
            "sink_ptr": options.sinks,
            "table": table,
            "index_ptr": None if index is None else index.contiguous(),
            "context": told,
            "control_ptr": control,
            "call": call,
        },
        {
            "num_places": rows.lse.shape[2],
            "sequences": 0 if context.continues else batch if options.seqlens is None else -1,
            "first_new_key": max(0, num_keys - num_queries) if context.continues else 0,
            "window": options.window_size or 0,
        },
        num_warps=4,
    )
