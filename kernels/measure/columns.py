"""How much weight each key gets from some rows of a head: who finds the key that the rows share reads this."""

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ..shared.descriptors import strided
from ..shared.gate import STATISTICS, is_off
from ..shared.launch import launch
from ..shared.masks import call_of, cap_and_mask, mask_of_head
from ..shared.plan import Options, ScorePlan, score_plan
from ..shared.tiles import block_dim, ceil_div, grid_1d, scheduled_block

_BLOCK_N = 64


@dataclass(frozen=True, repr=False)
class ColumnsPlan(ScorePlan):
    """What the kernel is compiled for."""

    group: int  # query heads of a key head
    head_dim: int
    has_index: bool  # which rows; otherwise they are evenly spread
    rows: int  # a power of two, at least 16
    block_n: int
    block_d: int


@functools.cache
def _plan(scores: ScorePlan, group: int, head_dim: int, has_index: bool, rows: int) -> ColumnsPlan:
    return ColumnsPlan(
        **vars(scores),
        group=group,
        head_dim=head_dim,
        has_index=has_index,
        rows=rows,
        block_n=_BLOCK_N,
        block_d=block_dim(head_dim),
    )


@triton.jit(do_not_specialize=["window"])
def _columns_kernel(weights_ptr, q, k, index_ptr, lse_ptr, control_ptr, call, window, PLAN: tl.constexpr):
    """Weights of one block of keys, summed over the rows."""
    if control_ptr is not None:  # noqa: SIM102  # the compiler drops this branch, and not an `and`
        if is_off(control_ptr, STATISTICS):
            return
    start_n, bh = scheduled_block(call.num_keys, PLAN.block_n, False)
    if bh >= call.num_bh:
        return
    batch, head = bh // call.heads, bh % call.heads
    offs, columns = tl.arange(0, PLAN.rows), tl.arange(0, PLAN.block_d)
    if PLAN.has_index:
        row = tl.load(index_ptr + bh.to(tl.int64) * PLAN.rows + offs)
        lse = tl.load(lse_ptr + bh.to(tl.int64) * PLAN.rows + offs)
    else:
        row = (2 * offs.to(tl.int64) + 1) * call.num_queries // (2 * PLAN.rows)
        lse = tl.load(lse_ptr + bh.to(tl.int64) * call.num_queries + row)
    # exp(s - inf) is 0: no weight comes from a place without a row, or from a row without a key.
    lse = tl.where((row >= 0) & (lse > -float("inf")), lse, float("inf"))
    row = tl.maximum(row, 0).to(tl.int32)
    q_ptr = q.ptr + batch.to(tl.int64) * q.stride_b + head.to(tl.int64) * q.stride_h
    k_ptr = k.ptr + batch.to(tl.int64) * k.stride_b + (head // PLAN.group).to(tl.int64) * k.stride_h
    n = start_n + tl.arange(0, PLAN.block_n)
    inside = columns < PLAN.head_dim
    q_tile = tl.load(
        q_ptr + row.to(tl.int64)[:, None] * q.stride_m + columns[None, :], mask=inside[None, :], other=0.0
    )
    k_tile = tl.load(
        k_ptr + n.to(tl.int64)[:, None] * k.stride_m + columns[None, :],
        mask=(n < call.num_keys)[:, None] & inside[None, :],
        other=0.0,
    )
    scores = tl.dot(q_tile, k_tile.T, input_precision="ieee") * call.scale
    mask_ptr = mask_of_head(call, batch, head, PLAN)
    scores, _, _ = cap_and_mask(scores, row[:, None], n[None, :], call, window, mask_ptr, PLAN, True)
    weights = tl.sum(tl.exp(scores - lse[:, None]), 0)
    tl.store(weights_ptr + bh.to(tl.int64) * call.num_keys + n, weights, mask=n < call.num_keys)


def column_weights(
    query: torch.Tensor,
    key: torch.Tensor,
    lse: torch.Tensor,
    options: Options,
    num_rows: int,
    index: torch.Tensor | None = None,
    control: torch.Tensor | None = None,
) -> torch.Tensor:
    """Weight of each key, fp32 (B, H, N), summed over some rows of a head.

    query (B, H, M, D), key (B, H_kv, N, D), D <= 256, not fp64; any strides; M > 0. index: int64 (B, H, num_rows), -1
    for no row; None for num_rows of all rows, evenly spread. num_rows: a power of two, at least 16. lse: fp32 of these
    rows (B, H, num_rows), without an index of all rows (B, H, M). control: as for `probe`.
    """
    batch, heads, _, head_dim = query.shape
    num_keys = key.shape[2]
    query, key = (x if x.stride(3) == 1 else x.contiguous() for x in (query, key))
    weights = torch.empty(batch, heads, num_keys, dtype=torch.float32, device=query.device)
    launch(
        _columns_kernel,
        (grid_1d(ceil_div(num_keys, _BLOCK_N), batch * heads), 1, 1),
        _plan(score_plan(options), heads // key.shape[1], head_dim, index is not None, num_rows),
        query.device,
        {
            "weights_ptr": weights,
            "q": strided(query),
            "k": strided(key),
            "index_ptr": None if index is None else index.contiguous(),
            "lse_ptr": lse.contiguous(),
            "control_ptr": control,
            "call": call_of(query, key, options),
        },
        {"window": options.window_size or 0},
        num_warps=4,
    )
    return weights
