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


def aligned(x: torch.Tensor) -> torch.Tensor:
    """x (B, H, L, D) as the bulk-copy engine wants it, or a copy padded with zeros along D.

    It wants unit inner stride and 16-byte aligned outer strides and base.
    """
    align = 16 // x.element_size()
    strides_fit = all(x.shape[i] == 1 or (x.stride(i) > 0 and x.stride(i) % align == 0) for i in range(3))
    if x.stride(3) == 1 and strides_fit and x.data_ptr() % 16 == 0:
        return x
    padded = x.new_zeros(*x.shape[:3], triton.cdiv(x.shape[3], align) * align)
    padded[..., : x.shape[3]] = x
    return padded


def describe(x: torch.Tensor, rows: int) -> TensorDescriptor:
    """A descriptor that loads (rows, block_dim(D)) tiles of one (batch, head) of x (B, H, L, D).

    Reads beyond L and D give zeros. A tensor that is not `aligned` is copied.
    """
    x = aligned(x)
    align = 16 // x.element_size()
    # The stride of a dimension of size 1 is arbitrary; give it one that the engine accepts.
    strides = [x.stride(i) if x.shape[i] > 1 else align for i in range(3)] + [1]
    return TensorDescriptor(x, list(x.shape), strides, [1, 1, rows, block_dim(x.shape[3])])


def describe_rows(x: torch.Tensor, rows: int) -> TensorDescriptor:
    """A descriptor that loads `rows` numbers of one (batch, head) of x (B, H, M), stored one after another.

    Reads beyond M give zeros. The stride of a head must be a multiple of 16 bytes.
    """
    return TensorDescriptor(x, [x.shape[0] * x.shape[1], x.shape[2]], [x.stride(1), 1], [1, rows])


def mask_arguments(attn_mask: torch.Tensor | None, shape: tuple[int, int, int, int]) -> tuple:
    """(pointer, strides (b, h, m, n), kind) of a mask that broadcasts to `shape`."""
    if attn_mask is None:
        return None, (0, 0, 0, 0), NO_MASK.value
    strides = attn_mask.expand(shape).stride()
    if attn_mask.dtype == torch.bool:
        return attn_mask.view(torch.uint8), strides, BOOL_MASK.value
    return attn_mask, strides, ADDITIVE_MASK.value


@triton.jit
def scheduled_block(length, BLOCK: tl.constexpr, HEAD_GROUP: tl.constexpr, LAST_FIRST: tl.constexpr):
    """(first position, batch * head) of this program: HEAD_GROUP heads abreast, the long blocks first.

    Under a causal mask the long ones are the last query blocks and the first key blocks. In a last
    group that is not full, some programs get a batch * head that does not exist.
    """
    num_blocks = tl.cdiv(length, BLOCK)
    group = tl.program_id(0) // (HEAD_GROUP * num_blocks)
    inside = tl.program_id(0) % (HEAD_GROUP * num_blocks)
    block = inside // HEAD_GROUP
    if LAST_FIRST:
        block = num_blocks - 1 - block
    return block * BLOCK, group * HEAD_GROUP + inside % HEAD_GROUP


@triton.jit
def load_tile(desc, batch, head, row, ROWS: tl.constexpr, COLS: tl.constexpr):
    return desc.load([batch, head, row, 0]).reshape(ROWS, COLS)


@triton.jit
def load_rows(desc, batch_head, row, ROWS: tl.constexpr):
    return desc.load([batch_head, row]).reshape(ROWS)


@triton.jit
def visible_tile(rows, columns, num_queries, num_keys, window, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr):
    """Which keys the positions allow; rows and columns broadcast against each other, either way round."""
    # The last visible key is a number per row, so that an element costs one comparison.
    last = num_keys - 1
    if CAUSAL:
        last = tl.minimum(rows, last)
    if WINDOWED:
        last = tl.minimum(rows + (window - 1), last)
    seen = columns <= tl.where(rows < num_queries, last, -1)
    if WINDOWED:
        seen = seen & (rows - columns < window)
    return seen


@triton.jit
def bend_and_mask(
    s,
    rows,
    columns,
    num_queries,
    num_keys,
    window,
    softcap,
    mask_ptr,
    stride_mask_m,
    stride_mask_n,
    CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
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
        seen = visible_tile(rows, columns, num_queries, num_keys, window, CAUSAL, WINDOWED)
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
    num_keys,
    window,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
    MASK: tl.constexpr,
):
    """Key tiles that some query of a block sees: [lo, full_lo) and [full_hi, hi) need masking."""
    lo = 0
    hi = num_keys
    full_lo = 0
    full_hi = num_keys // BLOCK_N * BLOCK_N
    if CAUSAL:
        hi = tl.minimum(hi, start_m + BLOCK_M)
        full_hi = tl.minimum(full_hi, (start_m + 1) // BLOCK_N * BLOCK_N)
    if WINDOWED:
        lo = tl.maximum(start_m - window + 1, 0) // BLOCK_N * BLOCK_N
        hi = tl.minimum(hi, start_m + BLOCK_M - 1 + window)
        full_lo = tl.maximum(start_m + BLOCK_M - window + BLOCK_N - 1, 0) // BLOCK_N * BLOCK_N
        full_hi = tl.minimum(full_hi, (start_m + window) // BLOCK_N * BLOCK_N)
    if MASK != NO_MASK:
        full_hi = 0
    full_lo = tl.maximum(full_lo, lo)
    full_hi = tl.maximum(full_hi, full_lo)
    return lo, full_lo, full_hi, hi


@triton.jit
def query_range(
    start_n,
    num_queries,
    window,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
    MASK: tl.constexpr,
):
    """Query tiles that see some key of a block: [lo, full_lo) and [full_hi, hi) need masking."""
    # A window is symmetric in queries and keys; a causal mask bounds the other side.
    lo, full_lo, full_hi, hi = key_range(
        start_n, num_queries, window, BLOCK_N, BLOCK_M, False, WINDOWED, MASK
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
    mask_ptr,
    stride_mask_m,
    stride_mask_n,
    CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    MASK: tl.constexpr,
    NATURAL: tl.constexpr,
    MASKED: tl.constexpr,
):
    """(p, t = log2 p, soft-cap's slope) of one tile of q.k, in either orientation.

    scaled_lse = lse * log2 e, and +inf in an empty row, so that one fused multiply-add makes the exponent
    and hidden keys come out as t = -inf, p = 0. NATURAL is for scores that are bent, or scale <= 0.
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
        mask_ptr,
        stride_mask_m,
        stride_mask_n,
        CAUSAL,
        WINDOWED,
        SOFTCAP,
        MASK,
        MASKED,
    )
    t = s * unit - scaled_lse
    return tl.exp2(t), t, slope


@triton.jit
def softmax_gradient(p, t, dp, offset, scaled_d_entropy, HAS_D_ENTROPY: tl.constexpr, MASKED: tl.constexpr):
    """d loss / d score, of scores after soft-cap and bias: p * (dp - delta'' - d_entropy * log p).

    `p` and `t` are of `softmax_weights`; offset = delta'', scaled_d_entropy = d_entropy * ln 2.
    """
    inner = dp - offset
    if HAS_D_ENTROPY:
        inner -= scaled_d_entropy * t
    d_scores = p * inner
    if MASKED:
        # Of a hidden key t is infinite and dp may be NaN; the mask itself need not be kept until here.
        d_scores = tl.where(p == 0.0, p, d_scores)
    return d_scores
