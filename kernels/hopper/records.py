"""Tables for the sm_90 forward: what it reads of each block of queries under a boolean mask.

A record of a block is eight int32: its place among the blocks, its `Span`, 1 if the kernel refuses it, and where the
bounds of its rows lie. The kernel cannot compute a block with a row whose visible keys have holes between them: it
leaves NaN there, and the launch behind it (`portable.huge_rows`) computes the block. The host never waits for a mask.
"""

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ..shared.launch import launch
from ..shared.masks import mask_of
from ..shared.packing import LARGEST
from ..shared.plan import Options, ScorePlan, score_plan
from ..shared.tiles import ceil_div
from .plan import BLOCK_M
from .spans import Span, row_bounds, span_of

FIELDS = 8
_SCAN = 1024  # keys of a mask that are read at once
_FIELDS = tl.constexpr(FIELDS)
_ROWS = tl.constexpr(BLOCK_M)


@dataclass(frozen=True, repr=False)
class TablePlan(ScorePlan):
    """What a kernel of tables is compiled for."""

    block_n: int  # keys of a tile


@functools.cache
def table_plan(scores: ScorePlan, block_n: int) -> TablePlan:
    return TablePlan(**vars(scores), block_n=block_n)


class Record(NamedTuple):
    """The fields of a record, in their order."""

    block: Any
    span: Span
    refused: Any
    row: Any  # index of the head's first row in the table of bounds
    part: Any  # from a row's first key to its end in that table


@triton.jit
def store_record(pointers, record, inside):
    tl.store(pointers, record.block, mask=inside)
    tl.store(pointers + 1, record.span.lo, mask=inside)
    tl.store(pointers + 2, record.span.full_lo, mask=inside)
    tl.store(pointers + 3, record.span.full_hi, mask=inside)
    tl.store(pointers + 4, record.span.hi, mask=inside)
    tl.store(pointers + 5, record.refused, mask=inside)
    tl.store(pointers + 6, record.row, mask=inside)
    tl.store(pointers + 7, record.part, mask=inside)


@triton.jit
def load_record(pointer):
    span = Span(tl.load(pointer + 1), tl.load(pointer + 2), tl.load(pointer + 3), tl.load(pointer + 4))
    return Record(tl.load(pointer), span, tl.load(pointer + 5), tl.load(pointer + 6), tl.load(pointer + 7))


@triton.jit(do_not_specialize=["mask_heads", "mask_rows", "num_queries", "num_keys"])
def _mask_rows_kernel(
    bounds_ptr, holes_ptr, mask, mask_heads, mask_rows, num_queries, num_keys, KEYS: tl.constexpr
):
    """Bounds of the visible keys of one row of a boolean mask, and whether some between them are hidden.

    KEYS are read at once. A mask with one row gives its bounds to all rows.
    """
    place = tl.program_id(0).to(tl.int64)
    head, row = place // mask_rows, place % mask_rows
    pointer = mask.ptr + head // mask_heads * mask.stride_b + head % mask_heads * mask.stride_h
    pointer += row * mask.stride_m
    count = tl.zeros([KEYS], tl.int32)
    least = tl.full([KEYS], LARGEST, tl.int32)
    most = tl.zeros([KEYS], tl.int32)
    for start in tl.range(0, num_keys, KEYS):
        columns = start + tl.arange(0, KEYS)
        seen = tl.load(pointer + columns.to(tl.int64) * mask.stride_n, mask=columns < num_keys, other=0) != 0
        count += seen.to(tl.int32)
        least = tl.minimum(least, tl.where(seen, columns, LARGEST))
        most = tl.maximum(most, tl.where(seen, columns + 1, 0))
    end = tl.max(most, 0)
    first = tl.minimum(tl.min(least, 0), end)
    holes = (end - first != tl.sum(count, 0)).to(tl.int32)
    size = tl.num_programs(0).to(tl.int64) // mask_rows * num_queries
    target = head * num_queries + row
    copies = tl.where(mask_rows == 1, num_queries, 1)
    for copy in tl.range(0, copies, KEYS):
        offsets = target + copy + tl.arange(0, KEYS)
        inside = copy + tl.arange(0, KEYS) < copies
        tl.store(bounds_ptr + offsets, tl.zeros([KEYS], tl.int32) + first, mask=inside)
        tl.store(bounds_ptr + size + offsets, tl.zeros([KEYS], tl.int32) + end, mask=inside)
        tl.store(holes_ptr + offsets, tl.zeros([KEYS], tl.int32) + holes, mask=inside)


@triton.jit(do_not_specialize=["heads", "per_batch", "per_head", "size", "num_queries", "num_keys", "window"])
def _mask_kernel(
    records_ptr,
    bounds_ptr,
    holes_ptr,
    heads,
    per_batch,
    per_head,
    size,
    num_queries,
    num_keys,
    window,
    PLAN: tl.constexpr,
):
    """The record of one block of queries of one head. Rows of the table: batch * per_batch + head * per_head + row."""
    blocks = tl.cdiv(num_queries, _ROWS)
    bh, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    row = bh // heads * per_batch + bh % heads * per_head
    offs_m = block * _ROWS + tl.arange(0, _ROWS)
    rows = tl.minimum(offs_m, num_queries - 1)
    first, end = row_bounds(
        rows, tl.load(bounds_ptr + row + rows), tl.load(bounds_ptr + size + row + rows), window, PLAN
    )
    refused = tl.max(tl.load(holes_ptr + row + rows), 0)
    empty = end <= first
    firsts = tl.where(empty, num_keys, first)
    ends = tl.where(empty, 0, end)
    span = span_of(
        tl.min(firsts, 0), tl.max(firsts, 0), tl.min(ends, 0), tl.max(ends, 0), num_keys, PLAN.block_n
    )
    lo, full_lo, full_hi, hi = span
    # A refused block takes one step: what it computes is thrown away.
    full_lo = tl.where(refused > 0, lo, full_lo)
    full_hi = tl.where(refused > 0, lo, full_hi)
    hi = tl.where(refused > 0, lo + 1, hi)
    pointer = records_ptr + tl.program_id(0) * _FIELDS
    store_record(pointer, Record(block, Span(lo, full_lo, full_hi, hi), refused, row, size), True)


def records_of(
    shape: tuple[int, int, int, int], options: Options, block_n: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(records, bounds) of a call of `shape` (B, H, M, N) with a boolean mask, computed on the device.

    records: int32 (B * H * blocks, FIELDS). bounds: int32, of rows their first keys, `part` numbers later their ends.
    block_n: keys of a tile.
    """
    batch, heads, num_queries, num_keys = shape
    attn_mask = options.attn_mask
    mask_batch, mask_heads, mask_rows = attn_mask.shape[:3]
    size = mask_batch * mask_heads * num_queries
    bounds, holes = (torch.empty(n, dtype=torch.int32, device=attn_mask.device) for n in (2 * size, size))
    launch(
        _mask_rows_kernel,
        (mask_batch * mask_heads * mask_rows, 1, 1),
        _SCAN,
        attn_mask.device,
        {
            "bounds_ptr": bounds,
            "holes_ptr": holes,
            "mask": mask_of(attn_mask, (mask_batch, mask_heads, mask_rows, num_keys)),
        },
        {
            "mask_heads": mask_heads,
            "mask_rows": mask_rows,
            "num_queries": num_queries,
            "num_keys": num_keys,
        },
        num_warps=4,
    )
    blocks = batch * heads * ceil_div(num_queries, BLOCK_M)
    records = torch.empty((blocks, FIELDS), dtype=torch.int32, device=attn_mask.device)
    launch(
        _mask_kernel,
        (blocks, 1, 1),
        table_plan(score_plan(options), block_n),
        attn_mask.device,
        {"records_ptr": records, "bounds_ptr": bounds, "holes_ptr": holes},
        {
            "heads": heads,
            "per_batch": mask_heads * num_queries if mask_batch > 1 else 0,
            "per_head": num_queries if mask_heads > 1 else 0,
            "size": size,
            "num_queries": num_queries,
            "num_keys": num_keys,
            "window": options.window_size or 0,
        },
        num_warps=4,
    )
    return records, bounds
