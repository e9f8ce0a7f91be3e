"""What the rows of a user mask leave visible: a table that the fold looks up."""

import torch
import triton
import triton.language as tl

from ..shared.launch import FUSED
from ..shared.softmax import ADDITIVE_MASK, load_bounds, mask_arguments, visible_tile

# Keys that are scanned at a time.
_SCAN = 1024


@triton.jit(do_not_specialize=["window"])
def _scan_mask_kernel(
    table_ptr,
    mask_ptr,
    stride_mask_b,
    stride_mask_h,
    stride_mask_m,
    stride_mask_n,
    mask_heads,
    num_queries,
    num_keys,
    window,
    bounds_ptr,
    BLOCK: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
    PACKED: tl.constexpr,
    MASK: tl.constexpr,
):
    """A row of a user mask: how many keys are visible, which is the first, and its bias (as fp32 bits)."""
    place = tl.program_id(0).to(tl.int64)
    row = (place % num_queries).to(tl.int32)
    batch, head = place // num_queries // mask_heads, place // num_queries % mask_heads
    mask_ptr += batch * stride_mask_b + head * stride_mask_h + row.to(tl.int64) * stride_mask_m
    count = tl.zeros([BLOCK], tl.int32)
    first = tl.zeros([BLOCK], tl.int32) + num_keys
    rows = tl.zeros([BLOCK], tl.int32) + row
    lo = 0
    hi = num_keys
    if WINDOWED:
        lo = tl.maximum(row - window + 1, 0)
        hi = tl.minimum(hi, row + window)
    if CAUSAL:
        hi = tl.minimum(hi, row + 1)
    if PACKED:
        first_key, end_key = load_bounds(bounds_ptr, row, num_queries)
        lo = tl.maximum(lo, first_key)
        hi = tl.minimum(hi, end_key)
    for start in tl.range(lo, hi, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        # A sequence begins with its first tile; it ends where the keys do.
        end = end_key if PACKED else num_keys
        seen = visible_tile(rows, columns, num_queries, end, window, bounds_ptr, CAUSAL, WINDOWED, False)
        tile = tl.load(mask_ptr + columns.to(tl.int64) * stride_mask_n, mask=seen, other=0)
        hidden = tile.to(tl.float32) == (-float("inf") if MASK == ADDITIVE_MASK else 0.0)
        seen = seen & (hidden == 0)
        count += seen.to(tl.int32)
        first = tl.minimum(first, tl.where(seen, columns, num_keys))
    visible = tl.sum(count, 0)
    index = tl.min(first, 0)
    index = tl.where(visible > 0, index, 0)
    bias = 0.0
    if MASK == ADDITIVE_MASK:
        bias = tl.load(mask_ptr + index.to(tl.int64) * stride_mask_n, mask=visible > 0, other=0.0)
        bias = bias.to(tl.float32)
    size = tl.num_programs(0).to(tl.int64)
    tl.store(table_ptr + place, visible)
    tl.store(table_ptr + size + place, index)
    if MASK == ADDITIVE_MASK:
        tl.store(table_ptr + 2 * size + place, bias.to(tl.int32, bitcast=True))


def scan_mask(
    options, shape: tuple[int, int, int, int], bounds: torch.Tensor | None
) -> tuple[torch.Tensor, tuple[int, int, int]]:
    """Table (3, mask batch, mask heads, M) int32 of visible keys, first key and its bias; strides (b, h, part)."""
    _, _, num_queries, num_keys = shape
    attn_mask = options.attn_mask
    mask_batch, mask_heads = attn_mask.shape[:2]
    mask, strides, kind = mask_arguments(attn_mask, (mask_batch, mask_heads, num_queries, num_keys))
    size = mask_batch * mask_heads * num_queries
    table = torch.empty(3 * size, dtype=torch.int32, device=attn_mask.device)
    _scan_mask_kernel[(size,)](
        table,
        mask,
        *strides,
        mask_heads,
        num_queries,
        num_keys,
        options.window_size or 0,
        bounds,
        BLOCK=_SCAN,
        CAUSAL=options.is_causal,
        WINDOWED=options.window_size is not None,
        PACKED=bounds is not None,
        MASK=kind,
        **FUSED,
    )
    per_batch = mask_heads * num_queries if mask_batch > 1 else 0
    return table, (per_batch, num_queries if mask_heads > 1 else 0, size)
