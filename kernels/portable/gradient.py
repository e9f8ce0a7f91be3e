"""What both backward kernels share: which queries see a block of keys, and the gradient of the softmax."""

import triton
import triton.language as tl

from ..shared.softmax import LOG2_E, bend_and_mask, key_range


@triton.jit
def query_range(
    start_n,
    num_queries,
    window,
    bounds_ptr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
    PACKED: tl.constexpr,
    MASK: tl.constexpr,
):
    """Query tiles that see some key of a block: [lo, full_lo) and [full_hi, hi) need masking."""
    # Windows and packed sequences (as many keys as queries) are symmetric in both; a causal mask bounds the
    # other side.
    lo, full_lo, full_hi, hi = key_range(
        start_n,
        num_queries,
        num_queries,
        window,
        bounds_ptr,
        BLOCK_N,
        BLOCK_M,
        False,
        WINDOWED,
        PACKED,
        MASK,
    )
    if CAUSAL:
        lo = tl.maximum(lo, start_n // BLOCK_M * BLOCK_M)
        full_lo = tl.maximum(full_lo, (start_n + BLOCK_N + BLOCK_M - 2) // BLOCK_M * BLOCK_M)
        # Keys past the last query have no tile at all.
        full_lo = tl.minimum(full_lo, hi)
        full_hi = tl.maximum(tl.minimum(full_hi, hi), full_lo)
    return lo, full_lo, full_hi, hi


@triton.jit
def walk_bounds(tiles, BOTH_ENDS: tl.constexpr, MASKED: tl.constexpr):
    """Bounds of a loop over the tiles of a range that need masking, or over those that do not.

    Where both ends need masking, one loop walks them as if they touched, so that it is compiled once;
    `walk_position` takes it across the gap.
    """
    lo, full_lo, full_hi, hi = tiles
    if not MASKED:
        return full_lo, full_hi
    if BOTH_ENDS:
        return lo, hi - (full_hi - full_lo)
    return full_hi, hi


@triton.jit
def walk_position(start, tiles, BOTH_ENDS: tl.constexpr, MASKED: tl.constexpr):
    if MASKED and BOTH_ENDS:
        return start + tl.where(start < tiles[1], 0, tiles[2] - tiles[1])
    return start


@triton.jit
def softmax_weights(
    qk,
    rows,
    columns,
    scaled_lse,
    num_queries,
    num_keys,
    scale,
    softcap,
    window,
    bounds_ptr,
    mask_ptr,
    stride_mask_m,
    stride_mask_n,
    CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
    PACKED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    MASK: tl.constexpr,
    NATURAL: tl.constexpr,
    MASKED: tl.constexpr,
):
    """(p, t = log2 p, soft-cap's slope) of one tile of q.k, in either orientation.

    scaled_lse = lse * log2 e, and +inf in an empty row, so that one fused multiply-add makes the exponent
    and hidden keys come out as t = -inf, p = 0. NATURAL: scores are soft-capped or masked, or scale <= 0.
    """
    unit = LOG2_E if NATURAL else scale * LOG2_E
    s, _seen, slope = bend_and_mask(
        qk * scale if NATURAL else qk,
        rows,
        columns,
        num_queries,
        num_keys,
        window,
        softcap,
        bounds_ptr,
        mask_ptr,
        stride_mask_m,
        stride_mask_n,
        CAUSAL,
        WINDOWED,
        PACKED,
        SOFTCAP,
        MASK,
        MASKED,
    )
    t = s * unit - scaled_lse
    return tl.exp2(t), t, slope


@triton.jit
def softmax_gradient(
    p,
    t,
    slope,
    dp,
    offset,
    scaled_d_entropy,
    SOFTCAP: tl.constexpr,
    HAS_D_ENTROPY: tl.constexpr,
    MASKED: tl.constexpr,
):
    """(d loss / d (scale * q.k), d loss / d score), the second p * (dp - delta'' - d_entropy * log p).

    They differ by the soft-cap's slope: a bias is added after it. `p`, `t`, `slope` are of `softmax_weights`;
    offset = delta'', scaled_d_entropy = d_entropy * ln 2.
    """
    inner = dp - offset
    if HAS_D_ENTROPY:
        inner -= scaled_d_entropy * t
    d_score = p * inner
    ds = d_score
    if SOFTCAP:
        ds = d_score * slope
    if MASKED:
        # Of a hidden key t is infinite and dp may be NaN; the mask itself need not be kept until here.
        ds = tl.where(p == 0.0, p, ds)
        d_score = tl.where(p == 0.0, p, d_score)
    return ds, d_score
