"""What all kernels share: tile descriptors, masks, key ranges, and the running softmax state.

The state of a row is (m, l, w): running maximum, sum of exp2(t) and sum of exp2(t) * t, where
t = (s - m) * unit <= 0 is the shifted score in log2 units and `unit` turns scores into them. Scores
`s` are raw q.k where nothing bends them (unit = scale * log2 e), else natural (unit = log2 e).
"""

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)

NO_MASK = tl.constexpr(0)
BOOL_MASK = tl.constexpr(1)
ADDITIVE_MASK = tl.constexpr(2)


def block_dim(head_dim: int) -> int:
    """The tile width of a head dimension: a power of two, at least 16 (the smallest matrix product)."""
    return max(16, triton.next_power_of_2(head_dim))


def describe(x: torch.Tensor, rows: int) -> TensorDescriptor:
    """A descriptor that loads (rows, block_dim(D)) tiles of one (batch, head) of x (B, H, L, D).

    Reads beyond L and D give zeros. The bulk-copy engine wants unit inner stride and 16-byte aligned
    outer strides and base; a tensor that has not is copied once, padded.
    """
    align = 16 // x.element_size()
    strides_fit = all(x.shape[i] == 1 or (x.stride(i) > 0 and x.stride(i) % align == 0) for i in range(3))
    if x.stride(3) != 1 or not strides_fit or x.data_ptr() % 16:
        padded = x.new_zeros(*x.shape[:3], triton.cdiv(x.shape[3], align) * align)
        padded[..., : x.shape[3]] = x
        x = padded
    # The stride of a dimension of size 1 is arbitrary; give it one that the engine accepts.
    strides = [x.stride(i) if x.shape[i] > 1 else align for i in range(3)] + [1]
    return TensorDescriptor(x, list(x.shape), strides, [1, 1, rows, block_dim(x.shape[3])])


def mask_arguments(attn_mask: torch.Tensor | None, shape: tuple[int, int, int, int]) -> tuple:
    """(pointer, strides (b, h, m, n), kind) of a mask that broadcasts to `shape`."""
    if attn_mask is None:
        return None, (0, 0, 0, 0), NO_MASK.value
    strides = attn_mask.expand(shape).stride()
    if attn_mask.dtype == torch.bool:
        return attn_mask.view(torch.uint8), strides, BOOL_MASK.value
    return attn_mask, strides, ADDITIVE_MASK.value


@triton.jit
def load_tile(desc, batch, head, row, ROWS: tl.constexpr, COLS: tl.constexpr):
    return desc.load([batch, head, row, 0]).reshape(ROWS, COLS)


@triton.jit
def load_bounds(bounds_ptr, rows, num_rows):
    """First key and one past the last key of each row's sequence (`masks.sequence_bounds`).

    Rows past the last one repeat its bounds, so that a ragged tile still has unmasked key tiles.
    """
    pointers = bounds_ptr + 2 * tl.minimum(rows, num_rows - 1)
    return tl.load(pointers), tl.load(pointers + 1)


@triton.jit
def visible_tile(
    rows,
    columns,
    first_key,
    end_key,
    num_queries,
    window,
    CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
    PACKED: tl.constexpr,
):
    """Which keys the positions allow; rows and columns broadcast against each other, either way round.

    A row's sequence holds the keys [first_key, end_key): PACKED, `load_bounds` of the rows, in their
    shape; otherwise 0 and the number of keys.
    """
    seen = (rows < num_queries) & (columns < end_key)
    if PACKED:
        seen = seen & (columns >= first_key)
    if CAUSAL:
        seen = seen & (columns <= rows)
    if WINDOWED:
        seen = seen & (rows - columns < window) & (columns - rows < window)
    return seen


@triton.jit
def bend_and_mask(
    s,
    rows,
    columns,
    first_key,
    end_key,
    num_queries,
    window,
    softcap,
    mask_ptr,
    stride_mask_m,
    stride_mask_n,
    CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
    PACKED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    MASK: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Scores after soft-cap and bias, which of them are visible, and the soft-cap's slope.

    `s` is scale * q.k where SOFTCAP or an additive mask is used. MASKED = False promises that every
    position of the tile is visible.
    """
    slope = 1.0
    if SOFTCAP:
        # tanh by exp2; exact at both ends: exp2 overflows to inf and 2 / inf is 0.
        bent = 1.0 - 2.0 / (tl.exp2(s * (2.0 * LOG2_E / softcap)) + 1.0)
        s = softcap * bent
        slope = 1.0 - bent * bent
    seen = True
    if MASKED:
        seen = visible_tile(rows, columns, first_key, end_key, num_queries, window, CAUSAL, WINDOWED, PACKED)
        if MASK != NO_MASK:
            offsets = rows.to(tl.int64) * stride_mask_m + columns.to(tl.int64) * stride_mask_n
            tile = tl.load(mask_ptr + offsets, mask=seen, other=0)
            if MASK == BOOL_MASK:
                seen = seen & (tile != 0)
            else:
                bias = tile.to(tl.float32)
                seen = seen & (bias != -float("inf"))
                s = s + bias
        s = tl.where(seen, s, -float("inf"))
    return s, seen, slope


@triton.jit
def key_range(
    start_m,
    first_key,
    end_key,
    window,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
    PACKED: tl.constexpr,
    MASK: tl.constexpr,
):
    """Key tiles that some query of a block sees: [lo, full_lo) and [full_hi, hi) need masking.

    The keys [first_key, end_key) are those of `visible_tile`, one number a query where PACKED.
    """
    lo = 0
    hi = tl.max(end_key, 0) if PACKED else end_key
    full_lo = 0
    full_hi = (tl.min(end_key, 0) if PACKED else end_key) // BLOCK_N * BLOCK_N
    if CAUSAL:
        hi = tl.minimum(hi, start_m + BLOCK_M)
        full_hi = tl.minimum(full_hi, (start_m + 1) // BLOCK_N * BLOCK_N)
    if WINDOWED:
        lo = tl.maximum(start_m - window + 1, 0) // BLOCK_N * BLOCK_N
        hi = tl.minimum(hi, start_m + BLOCK_M - 1 + window)
        full_lo = tl.maximum(start_m + BLOCK_M - window + BLOCK_N - 1, 0) // BLOCK_N * BLOCK_N
        full_hi = tl.minimum(full_hi, (start_m + window) // BLOCK_N * BLOCK_N)
    if PACKED:
        lo = tl.maximum(lo, tl.min(first_key, 0) // BLOCK_N * BLOCK_N)
        full_lo = tl.maximum(full_lo, (tl.max(first_key, 0) + BLOCK_N - 1) // BLOCK_N * BLOCK_N)
    if MASK != NO_MASK:
        full_hi = 0
    full_lo = tl.maximum(full_lo, lo)
    full_hi = tl.maximum(full_hi, full_lo)
    return lo, full_lo, full_hi, hi


@triton.jit
def softmax_update(m_i, l_i, w_i, s, seen, unit, MASKED: tl.constexpr, EXACT: tl.constexpr):
    """Take one tile of scores into the running state; returns the state, exp2(t), and the rescaling.

    EXACT subtracts before it scales. Otherwise one fused multiply-add does both, whose rounding of
    m * unit is common to the row and so cancels from the entropy.
    """
    m_new = tl.maximum(m_i, tl.max(s, 1))
    # A row that has seen nothing yet has m = -inf, which is never subtracted.
    shift = tl.where(m_new == -float("inf"), 0.0, m_new) if MASKED else m_new
    if EXACT:
        t = (s - shift[:, None]) * unit
        d = (m_i - shift) * unit
    else:
        t = s * unit - (shift * unit)[:, None]
        d = m_i * unit - shift * unit
    d = tl.where(m_i == -float("inf"), 0.0, d)
    alpha = tl.exp2(d)
    p = tl.exp2(t)
    # 0 * -inf is NaN: right for a visible score of -inf (an infinite input), wrong for a hidden one.
    pt = tl.where(seen, p * t, 0.0) if MASKED else p * t
    w_i = alpha * (w_i + l_i * d) + tl.sum(pt, 1)
    l_i = l_i * alpha + tl.sum(p, 1)
    return m_new, l_i, w_i, p, alpha


@triton.jit
def softmax_finish(m_i, l_i, w_i, low, unit, to_natural, sink, SINKS: tl.constexpr):
    """(lse, entropy, max_logit, min_logit) in nats, and the factor that normalises the output.

    `sink` is in score units. Empty rows give lse = -inf, entropy = 0; rows that NaN or inf reached
    give NaN everywhere.
    """
    empty = m_i == -float("inf")
    shift = tl.where(empty, 0.0, m_i)
    factor = 1.0
    if SINKS:
        top = tl.maximum(shift, sink)
        d = (shift - top) * unit
        z = (sink - top) * unit
        factor = tl.exp2(d)
        # A sink of -inf is no sink: 0 * -inf must not become NaN.
        w_i = factor * (w_i + l_i * d) + tl.where(z == -float("inf"), 0.0, tl.exp2(z) * z)
        l_i = factor * l_i + tl.exp2(z)
        shift = top
    broken = (l_i + w_i) != (l_i + w_i)
    nan = float("nan")
    l_safe = tl.where(empty, 1.0, l_i)
    log_l = tl.log2(l_safe) * LN_2
    lse = tl.where(empty & (broken == 0), -float("inf"), shift * to_natural + log_l)
    entropy = tl.where(empty & (broken == 0), 0.0, log_l - LN_2 * w_i / l_safe)
    max_logit = tl.where(broken, nan, m_i * to_natural)
    min_logit = tl.where(broken, nan, low * to_natural)
    return (
        tl.where(broken, nan, lse),
        tl.where(broken, nan, entropy),
        max_logit,
        min_logit,
        factor / l_safe,
    )
