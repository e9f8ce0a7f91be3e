"""One attention call to head statistics on the device, by one launch of `fold_kernel`.

Whoever reads an accumulator adds its slots up.
"""

import functools
from typing import Protocol

import torch
import triton

from ..shared.descriptors import strided
from ..shared.launch import launch
from ..shared.packing import sequence_bounds
from ..shared.plan import Options, ScorePlan, score_plan
from ..shared.results import Core
from ..shared.sampling import BLOCK_ROWS
from ..shared.tiles import block_dim
from .fold_kernel import FoldPlan, Layout, MaxFields, Sizes, SumFields, Table, fold_kernel
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


@functools.cache
def _plan(
    scores: ScorePlan,
    has_sinks: bool,
    is_sampled: bool,
    group: int,
    head_dim: int,
    layout: Layout,
) -> FoldPlan:
    width = block_dim(head_dim)
    return FoldPlan(
        **vars(scores),
        has_sinks=has_sinks,
        has_table=scores.has_mask,
        is_sampled=is_sampled,
        group=group,
        head_dim=head_dim,
        block=BLOCK_ROWS,
        block_d=width,
        columns=min(width, _COLUMNS),
        width=triton.next_power_of_2(layout.num_fields + 1),
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
    layout: Layout,
) -> None:
    """Add one call to `accumulator`, for head dimensions up to 256 and not fp64.

    accumulator (slots, layout.num_fields, H) fp64, query (B, H, M, D), key (B, H_kv, N, D), rows of (B, H, M)
    or a sample of them; any strides (rows, and q and k of an inner stride other than 1, are copied if need be).
    """
    batch, heads, num_queries, head_dim = query.shape
    kv_heads, num_keys = key.shape[1:3]
    query, key = (x if x.stride(3) == 1 else x.contiguous() for x in (query, key))
    bounds = sequence_bounds(options.seqlens, num_keys)
    table = Table(None, 0, 0, 0)
    if options.attn_mask is not None:
        scanned, strides = scan_mask(options, num_queries, num_keys, bounds)
        table = Table(scanned, *strides)
    index = rows.row_index
    core = (rows.lse, rows.entropy, rows.max_logit, rows.min_logit)
    launch(
        fold_kernel,
        (accumulator.shape[0], heads, 1),
        _plan(
            score_plan(options),
            options.sinks is not None,
            index is not None,
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
            "bounds_ptr": bounds,
            "sizes": Sizes(batch, heads, num_queries, num_keys, rows.lse.shape[2]),
            "scale": options.scale,
            "softcap": options.softcap or 0.0,
        },
        {"window": options.window_size or 0},
        num_warps=4,
    )
