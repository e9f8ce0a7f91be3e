"""Which rows of a head are asked for the key that they share, where some rows do not count: one launch.

`measured.rows_asked` is the specification: the rows are evenly spread over those that count.
"""

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ..shared.gate import STATISTICS, is_off
from ..shared.launch import launch
from ..shared.plan import Plan

_BLOCK = 256  # rows of a step


@dataclass(frozen=True, repr=False)
class RowsPlan(Plan):
    """What the kernel is compiled for."""

    rows: int  # a power of two, at least 16
    block: int


_plan = functools.cache(RowsPlan)


@triton.jit(do_not_specialize=["heads", "num_queries", "least_rows"])
def _rows_asked_kernel(
    index_ptr,
    lse_ptr,
    left_out_ptr,
    stride_b,
    stride_m,
    all_lse_ptr,
    control_ptr,
    heads,
    num_queries,
    least_rows,
    PLAN: tl.constexpr,
):
    """The rows of one (batch, head) and their lse; -1 and 0 for none."""
    if control_ptr is not None:  # noqa: SIM102  # the compiler drops this branch, and not an `and`
        if is_off(control_ptr, STATISTICS):
            return
    bh = tl.program_id(0).to(tl.int64)
    left_out_ptr += bh // heads * stride_b
    offs = tl.arange(0, PLAN.block)
    total = 0
    for start in tl.range(0, num_queries, PLAN.block):
        m = start + offs
        left = tl.load(left_out_ptr + m.to(tl.int64) * stride_m, mask=m < num_queries, other=1)
        total += tl.sum((left == 0).to(tl.int32), 0)
    place = tl.arange(0, PLAN.rows)
    wanted = ((place.to(tl.float32) + 0.5) * (total.to(tl.float32) / PLAN.rows)).to(tl.int32)
    found = tl.full([PLAN.rows], -1, tl.int32)
    before = 0
    for start in tl.range(0, num_queries, PLAN.block):
        m = start + offs
        left = tl.load(left_out_ptr + m.to(tl.int64) * stride_m, mask=m < num_queries, other=1)
        counts = (left == 0).to(tl.int32)
        rank = before + tl.cumsum(counts, 0) - 1
        here = (rank[None, :] == wanted[:, None]) & (counts != 0)[None, :]
        found = tl.maximum(found, tl.max(tl.where(here, m[None, :], -1), 1))
        before += tl.sum(counts, 0)
    found = tl.where(total >= least_rows, found, -1)
    lse = tl.load(all_lse_ptr + bh * num_queries + found, mask=found >= 0, other=0.0)
    tl.store(index_ptr + bh * PLAN.rows + place, found.to(tl.int64))
    tl.store(lse_ptr + bh * PLAN.rows + place, lse)


def rows_asked(
    lse: torch.Tensor,
    left_out: torch.Tensor,
    num_rows: int,
    least_rows: int,
    control: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(index int64, lse fp32) of num_rows rows of each head, (B, H, num_rows); -1 and 0 for none.

    lse: fp32 (B, H, M), contiguous. left_out: boolean (B, M), rows that do not count. Fewer than least_rows that count
    give none. num_rows: a power of two, at least 16. control: as for `probe`.
    """
    batch, heads, num_queries = lse.shape
    index = torch.empty(batch, heads, num_rows, dtype=torch.int64, device=lse.device)
    chosen = torch.empty(batch, heads, num_rows, dtype=torch.float32, device=lse.device)
    launch(
        _rows_asked_kernel,
        (batch * heads, 1, 1),
        _plan(num_rows, _BLOCK),
        lse.device,
        {
            "index_ptr": index,
            "lse_ptr": chosen,
            "left_out_ptr": left_out.view(torch.uint8),
            "stride_b": left_out.stride(0),
            "stride_m": left_out.stride(1),
            "all_lse_ptr": lse,
            "control_ptr": control,
        },
        {"heads": heads, "num_queries": num_queries, "least_rows": least_rows},
        num_warps=4,
    )
    return index, chosen
