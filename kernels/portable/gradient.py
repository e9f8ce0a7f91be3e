"""What both backward kernels share: which queries see a block of keys, and the gradient of the softmax."""

from dataclasses import dataclass

import triton
import triton.language as tl

from ..shared.masks import cap_and_mask, key_range
from ..shared.plan import ScorePlan
from ..shared.softmax import LOG2_E


@dataclass(frozen=True, repr=False)
class GradientPlan(ScorePlan):
    """What the kernels of dq, and of dk and dv, are compiled for."""

    natural: bool  # see `is_natural`
    has_d_out: bool
    has_d_entropy: bool
    has_d_scores: bool  # dq's launch also stores the gradient of every score
    group: int  # query heads of a key head
    head_dim: int
    value_dim: int
    block_m: int
    block_n: int
    block_d: int
    block_dv: int
    pointers: bool  # see `load_tile`


@triton.jit
def query_range(start_n, call, window, PLAN: tl.constexpr):
    """Bounds of the query tiles that see some key of a block: [lo, full_lo) and [full_hi, hi) need masking."""
    # Windows and packs (as many keys as queries) are symmetric in queries and keys. A causal mask is not: it bounds
    # the other side.
    lo, full_lo, full_hi, hi = key_range(
        start_n,
        call.num_queries,
        call.num_queries,
        window,
        call.bounds_ptr,
        PLAN.block_n,
        PLAN.block_m,
        False,
        PLAN,
    )
    if PLAN.is_causal:
        lo = tl.maximum(lo, start_n // PLAN.block_m * PLAN.block_m)
        first_full = (start_n + PLAN.block_n + PLAN.block_m - 2) // PLAN.block_m * PLAN.block_m
        # Keys past the last query have no tile at all.
        full_lo = tl.minimum(tl.maximum(full_lo, first_full), hi)
        full_hi = tl.maximum(tl.minimum(full_hi, hi), full_lo)
    return lo, full_lo, full_hi, hi


@triton.jit
def walk_bounds(tiles, BOTH_ENDS: tl.constexpr, MASKED: tl.constexpr):
    """Bounds of a loop over the tiles of a range that need masking, or over those that do not.

    If both ends need masking, one loop walks them as if they touched, so that it is compiled once. `walk_position`
    skips the gap.
    """
    lo, full_lo, full_hi, hi = tiles
    if not MASKED:
        return full_lo, full_hi
    if BOTH_ENDS:
        return lo, hi - (full_hi - full_lo)
    return full_hi, hi


@triton.jit
def walk_position(start, tiles, BOTH_ENDS: tl.constexpr, MASKED: tl.constexpr):
    """The position that belongs to one step of the loop of `walk_bounds`."""
    if MASKED and BOTH_ENDS:
        return start + tl.where(start < tiles[1], 0, tiles[2] - tiles[1])
    return start


@triton.jit
def softmax_weights(
    qk, rows, columns, scaled_lse, call, window, mask_ptr, PLAN: tl.constexpr, MASKED: tl.constexpr
):
    """(p, t = log2 p, the soft-cap's slope) of one tile of q.k; queries lie along either axis.

    scaled_lse = lse * log2 e, and +inf in an empty row: one fused multiply-add then makes the exponent, and hidden
    keys get t = -inf, p = 0.
    """
    unit = LOG2_E if PLAN.natural else call.scale * LOG2_E
    s, _seen, slope = cap_and_mask(
        qk * call.scale if PLAN.natural else qk, rows, columns, call, window, mask_ptr, PLAN, MASKED
    )
    t = s * unit - scaled_lse
    return tl.exp2(t), t, slope


@triton.jit
def softmax_gradient(p, t, slope, dp, offset, scaled_d_entropy, PLAN: tl.constexpr, MASKED: tl.constexpr):
    """(d loss / d (scale * q.k), d loss / d score); the second is p * (dp - delta'' - d_entropy * log p).

    They differ by the soft-cap's slope, because a bias is added after the soft-cap. p, t, slope: of
    `softmax_weights`. offset = delta''. scaled_d_entropy = d_entropy * ln 2.
    """
    inner = dp - offset
    if PLAN.has_d_entropy:
        inner -= scaled_d_entropy * t
    d_score = p * inner
    ds = d_score
    if PLAN.has_softcap:
        ds = d_score * slope
    if MASKED:
        # A hidden key has infinite t, and dp may be NaN. Its p is exactly 0, so p == 0 replaces the mask here.
        ds = tl.where(p == 0.0, p, ds)
        d_score = tl.where(p == 0.0, p, d_score)
    return ds, d_score
