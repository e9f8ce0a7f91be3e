"""Which keys a query sees: one mask for all kernels, and the tiles that it leaves to walk."""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .packing import sequence_bounds
from .plan import Options
from .results import LEAST_BIAS
from .softmax import LOG2_E

_LEAST_BIAS = tl.constexpr(LEAST_BIAS)


class Mask(NamedTuple):
    """A user mask as kernels take it: a pointer and strides, or None and zeros."""

    ptr: Any
    stride_b: int
    stride_h: int
    stride_m: int
    stride_n: int


class Call(NamedTuple):
    """The numbers of one attention call, its mask and its sequences, as kernels take them.

    `heads` and the number of (batch, head) pairs, `num_bh`, count what the kernel's programs are spread over: query
    heads, or key heads. The window is a parameter of its own, because Triton specialises on integers in a tuple. The
    fields of the `Mask` stand here one by one, because Triton 3.6 loses an integer 1 in a tuple within a tuple.
    """

    num_bh: int
    heads: int
    num_queries: int
    num_keys: int
    scale: float
    softcap: float  # 0 without one
    mask_ptr: Any
    mask_stride_b: int
    mask_stride_h: int
    mask_stride_m: int
    mask_stride_n: int
    bounds_ptr: Any  # of `sequence_bounds`; None without packed sequences


def mask_of(attn_mask: torch.Tensor | None, shape: tuple[int, int, int, int]) -> Mask:
    """A mask that broadcasts to `shape` (B, H, M, N)."""
    if attn_mask is None:
        return Mask(None, 0, 0, 0, 0)
    strides = attn_mask.expand(shape).stride()
    return Mask(attn_mask.view(torch.uint8) if attn_mask.dtype == torch.bool else attn_mask, *strides)


def call_of(
    query: torch.Tensor, key: torch.Tensor, options: Options, bounds: torch.Tensor | None = None
) -> Call:
    """The call of query (B, H, M, D) and key (B, H_kv, N, D), over query heads.

    bounds: of `sequence_bounds`, if they have been computed already.
    """
    batch, heads, num_queries, _ = query.shape
    num_keys = key.shape[2]
    return Call(
        batch * heads,
        heads,
        num_queries,
        num_keys,
        options.scale,
        options.softcap or 0.0,
        *mask_of(options.attn_mask, (batch, heads, num_queries, num_keys)),
        sequence_bounds(options.seqlens, num_keys) if bounds is None else bounds,
    )


@triton.jit
def mask_of_head(call, batch, head, PLAN: tl.constexpr):
    """A pointer to the mask's rows of one (batch, head)."""
    mask_ptr = call.mask_ptr
    if PLAN.has_mask:
        mask_ptr += batch.to(tl.int64) * call.mask_stride_b + head.to(tl.int64) * call.mask_stride_h
    return mask_ptr


@triton.jit
def load_bounds(bounds_ptr, rows, length):
    """First key, and one past the last key, of each row's sequence.

    bounds_ptr: the table of `sequence_bounds`. Rows past the last one repeat its bounds, so that a ragged tile still
    has unmasked key tiles.
    """
    pointers = bounds_ptr + tl.minimum(rows, length - 1)
    return tl.load(pointers), tl.load(pointers + length)


@triton.jit
def load_num_sequences(bounds_ptr, length):
    """How many sequences hold a token, from the same table."""
    return tl.load(bounds_ptr + 2 * length)


@triton.jit
def visible_tile(
    rows, columns, num_queries, num_keys, window, bounds_ptr, PLAN: tl.constexpr, PACKED: tl.constexpr
):
    """Which keys the positions allow, as a boolean tile; rows and columns broadcast against each other."""
    # The last visible key is one number a row, so an element costs one comparison.
    last = num_keys - 1
    # Sequences are symmetric: a query sees a key's sequence if the key's sequence holds the query. Bounds are
    # loaded along the tile's first axis, of which a thread holds fewer positions. Every masked tile loads them
    # again, so that they take no registers in the unmasked loop.
    ROWS_FIRST: tl.constexpr = columns.shape[0] == 1
    if PACKED:
        first, end = load_bounds(bounds_ptr, rows if ROWS_FIRST else columns, num_queries)
        if ROWS_FIRST:
            last = end - 1
    if PLAN.is_causal:
        last = tl.minimum(rows, last)
    if PLAN.is_windowed:
        last = tl.minimum(rows + (window - 1), last)
    seen = columns <= tl.where(rows < num_queries, last, -1)
    if PACKED:
        seen = seen & ((columns >= first) if ROWS_FIRST else ((rows >= first) & (rows < end)))
    if PLAN.is_windowed:
        seen = seen & (rows - columns < window)
    return seen


@triton.jit
def cap_and_mask(s, rows, columns, call, window, mask_ptr, PLAN: tl.constexpr, MASKED: tl.constexpr):
    """Scores after soft-cap and bias, which of them are visible, and the soft-cap's slope.

    s: scale * q.k if there is a soft-cap or an additive mask. mask_ptr: of `mask_of_head`. MASKED = False promises
    that every position of the tile is visible.
    """
    slope = 1.0
    if PLAN.has_softcap:
        # tanh by exp2; exact at both ends: exp2 overflows to inf and 2 / inf is 0.
        tanh = 1.0 - 2.0 / (tl.exp2(s * (2.0 * LOG2_E / call.softcap)) + 1.0)
        s = call.softcap * tanh
        slope = 1.0 - tanh * tanh
    seen = True
    if MASKED:
        seen = visible_tile(
            rows, columns, call.num_queries, call.num_keys, window, call.bounds_ptr, PLAN, PLAN.is_packed
        )
        if PLAN.has_mask:
            offsets = rows.to(tl.int64) * call.mask_stride_m + columns.to(tl.int64) * call.mask_stride_n
            tile = tl.load(mask_ptr + offsets, mask=seen, other=0)
            if PLAN.has_bias:
                bias = tile.to(tl.float32)
                seen = seen & (bias != -float("inf"))
                s = s + tl.maximum(bias, _LEAST_BIAS, propagate_nan=tl.PropagateNan.ALL)
            else:
                seen = seen & (tile != 0)
        s = tl.where(seen, s, -float("inf"))
    return s, seen, slope


@triton.jit
def key_range(
    start_m,
    num_queries,
    num_keys,
    window,
    bounds_ptr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr,
    PLAN: tl.constexpr,
):
    """Bounds of the key tiles that some query of a block sees: [lo, full_lo) and [full_hi, hi) need masking."""
    lo = 0
    hi = num_keys
    full_lo = 0
    full_hi = num_keys // BLOCK_N * BLOCK_N
    if CAUSAL:
        hi = tl.minimum(hi, start_m + BLOCK_M)
        full_hi = tl.minimum(full_hi, (start_m + 1) // BLOCK_N * BLOCK_N)
    if PLAN.is_windowed:
        lo = tl.maximum(start_m - window + 1, 0) // BLOCK_N * BLOCK_N
        hi = tl.minimum(hi, start_m + BLOCK_M - 1 + window)
        full_lo = tl.maximum(start_m + BLOCK_M - window + BLOCK_N - 1, 0) // BLOCK_N * BLOCK_N
        full_hi = tl.minimum(full_hi, (start_m + window) // BLOCK_N * BLOCK_N)
    if PLAN.is_packed:
        # Bounds never decrease from row to row: those of the first and the last one hold for the block.
        first, end = load_bounds(bounds_ptr, start_m, num_queries)
        last_first, last_end = load_bounds(bounds_ptr, start_m + BLOCK_M - 1, num_queries)
        lo = tl.maximum(lo, first // BLOCK_N * BLOCK_N)
        hi = tl.minimum(hi, last_end)
        full_lo = tl.maximum(full_lo, (last_first + BLOCK_N - 1) // BLOCK_N * BLOCK_N)
        full_hi = tl.minimum(full_hi, end // BLOCK_N * BLOCK_N)
    if PLAN.has_mask:
        full_hi = 0
    full_lo = tl.maximum(full_lo, lo)
    full_hi = tl.maximum(full_hi, full_lo)
    return lo, full_lo, full_hi, hi
