"""What a user mask leaves visible of each row: a table for the fold."""

import torch
import triton
import triton.language as tl

from ..shared.gate import STATISTICS, is_off
from ..shared.launch import launch
from ..shared.masks import load_bounds, mask_of, visible_tile
from ..shared.plan import Options, score_plan

_SCAN = 1024  # keys that are scanned at a time
_BLOCK = tl.constexpr(_SCAN)


@triton.jit(do_not_specialize=["window"])
def _scan_mask_kernel(
    table_ptr, mask, mask_heads, num_queries, num_keys, bounds_ptr, control_ptr, window, PLAN: tl.constexpr
):
    """One row of a user mask: how many keys are visible, and which is the first."""
    if control_ptr is not None:  # noqa: SIM102  # the compiler drops this branch, and not an `and`
        if is_off(control_ptr, STATISTICS):
            return
    place = tl.program_id(0).to(tl.int64)
    row = (place % num_queries).to(tl.int32)
    batch, head = place // num_queries // mask_heads, place // num_queries % mask_heads
    mask_ptr = mask.ptr + batch * mask.stride_b + head * mask.stride_h + row.to(tl.int64) * mask.stride_m
    count = tl.zeros([_BLOCK], tl.int32)
    first = tl.zeros([_BLOCK], tl.int32) + num_keys
    rows = tl.zeros([_BLOCK], tl.int32) + row
    lo = 0
    hi = num_keys
    if PLAN.is_windowed:
        lo = tl.maximum(row - window + 1, 0)
        hi = tl.minimum(hi, row + window)
    if PLAN.is_causal:
        hi = tl.minimum(hi, row + 1)
    if PLAN.is_packed:
        first_key, end_key = load_bounds(bounds_ptr, row, num_queries)
        lo = tl.maximum(lo, first_key)
        hi = tl.minimum(hi, end_key)
    for start in tl.range(lo, hi, _BLOCK):
        columns = start + tl.arange(0, _BLOCK)
        # The scan starts where the row's sequence does, so the tile is masked as if the keys ended with it.
        end = end_key if PLAN.is_packed else num_keys
        seen = visible_tile(rows, columns, num_queries, end, window, bounds_ptr, PLAN, False)
        tile = tl.load(mask_ptr + columns.to(tl.int64) * mask.stride_n, mask=seen, other=0)
        hidden = tile.to(tl.float32) == (-float("inf") if PLAN.has_bias else 0.0)
        seen = seen & (hidden == 0)
        count += seen.to(tl.int32)
        first = tl.minimum(first, tl.where(seen, columns, num_keys))
    visible = tl.sum(count, 0)
    index = tl.min(first, 0)
    index = tl.where(visible > 0, index, 0)
    size = tl.num_programs(0).to(tl.int64)
    tl.store(table_ptr + place, visible)
    tl.store(table_ptr + size + place, index)


def scan_mask(
    options: Options,
    num_queries: int,
    num_keys: int,
    bounds: torch.Tensor | None,
    control: torch.Tensor | None = None,
) -> tuple[torch.Tensor, tuple[int, int, int]]:
    """Table (2, mask batch, mask heads, M) int32 of visible keys and the first of them; strides (b, h, part).

    control: as for `probe`.
    """
    attn_mask = options.attn_mask
    mask_batch, mask_heads = attn_mask.shape[:2]
    size = mask_batch * mask_heads * num_queries
    table = torch.empty(2 * size, dtype=torch.int32, device=attn_mask.device)
    launch(
        _scan_mask_kernel,
        (size, 1, 1),
        score_plan(options),
        attn_mask.device,
        {
            "table_ptr": table,
            "mask": mask_of(attn_mask, (mask_batch, mask_heads, num_queries, num_keys)),
            "mask_heads": mask_heads,
            "num_queries": num_queries,
            "num_keys": num_keys,
            "bounds_ptr": bounds,
            "control_ptr": control,
        },
        {"window": options.window_size or 0},
        num_warps=4,
    )
    per_batch = mask_heads * num_queries if mask_batch > 1 else 0
    return table, (per_batch, num_queries if mask_heads > 1 else 0, size)
