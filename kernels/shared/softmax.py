"""What all kernels share: masks, key ranges, and the running softmax state.

The state of a row is (m, l, w): running maximum, sum of exp2(t) and sum of exp2(t) * t, where
t = (s - m) * unit <= 0 is the shifted score in log2 units and `unit` turns scores into them. Scores
`s` are raw q.k where nothing bends them (unit = scale * log2 e), else natural (unit = log2 e).

The extended state `more` of a row is (b, c, mean, m2, count, first): sums of exp2(t) * t^2 and of
exp2(t)^2; mean, sum of squared deviations and number of its visible scores, unweighted; and exp2(t) of
its first visible key.
"""

import torch
import triton
import triton.language as tl

from ...statistics.fields import EXTENDED_FIELDS

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)

NO_MASK = tl.constexpr(0)
BOOL_MASK = tl.constexpr(1)
ADDITIVE_MASK = tl.constexpr(2)


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)  # as `block_dim`: triton.cdiv is for kernels


def block_dim(head_dim: int) -> int:
    """The tile width of a head dimension: a power of two, at least 16 (the smallest matrix product)."""
    return max(16, 1 << (head_dim - 1).bit_length())  # Triton's own helper costs the host 4 microseconds


def mask_arguments(attn_mask: torch.Tensor | None, shape: tuple[int, int, int, int]) -> tuple:
    """(pointer, strides (b, h, m, n), kind) of a mask that broadcasts to `shape`."""
    if attn_mask is None:
        return None, (0, 0, 0, 0), NO_MASK.value
    strides = attn_mask.expand(shape).stride()
    if attn_mask.dtype == torch.bool:
        return attn_mask.view(torch.uint8), strides, BOOL_MASK.value
    return attn_mask, strides, ADDITIVE_MASK.value


def new_rows(shape, device, extended, blank):
    """[lse, entropy, max_logit, min_logit, more] to write to, fp32 of `shape` (B, H, M), as empty rows if `blank`.

    `more` is (6, B, H, M), the EXTENDED_FIELDS of `stats.py`; or None.
    """
    # Four tensors and not one in four parts: an operator's results may not share their storage.
    lse = torch.empty(shape, dtype=torch.float32, device=device)
    rows = [lse, torch.empty_like(lse), torch.empty_like(lse), torch.empty_like(lse)]
    more = (len(EXTENDED_FIELDS), *shape)
    rows.append(torch.empty(more, dtype=torch.float32, device=device) if extended else None)
    if blank:
        for row_stat, number in zip(rows, (-torch.inf, 0.0, -torch.inf, torch.inf, 0.0)):
            if row_stat is not None:
                row_stat.fill_(number)
    return rows


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
def load_bounds(bounds_ptr, rows, length):
    """First key, and one past the last key, of each row's sequence, from the table of `packing.sequence_bounds`.

    Rows past the last one repeat its bounds, so that a ragged tile still has unmasked key tiles.
    """
    pointers = bounds_ptr + tl.minimum(rows, length - 1)
    return tl.load(pointers), tl.load(pointers + length)


@triton.jit
def load_num_sequences(bounds_ptr, length):
    """How many sequences hold a token, from the same table."""
    return tl.load(bounds_ptr + 2 * length)


@triton.jit
def visible_tile(
    rows,
    columns,
    num_queries,
    num_keys,
    window,
    bounds_ptr,
    CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
    PACKED: tl.constexpr,
):
    """Which keys the positions allow; rows and columns broadcast against each other, either way round."""
    # The last visible key is a number per row, so that an element costs one comparison.
    last = num_keys - 1
    # Two positions see each other's sequence or neither does: bounds are loaded for what lies down the tile, of
    # which a thread holds few, and for every masked tile anew, so that no other loop has to keep them.
    ROWS_DOWN: tl.constexpr = columns.shape[0] == 1
    if PACKED:
        first, end = load_bounds(bounds_ptr, rows if ROWS_DOWN else columns, num_queries)
        if ROWS_DOWN:
            last = end - 1
    if CAUSAL:
        last = tl.minimum(rows, last)
    if WINDOWED:
        last = tl.minimum(rows + (window - 1), last)
    seen = columns <= tl.where(rows < num_queries, last, -1)
    if PACKED:
        seen = seen & ((columns >= first) if ROWS_DOWN else ((rows >= first) & (rows < end)))
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
    bounds_ptr,
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
        tanh = 1.0 - 2.0 / (tl.exp2(s * (2.0 * LOG2_E / softcap)) + 1.0)
        s = softcap * tanh
        slope = 1.0 - tanh * tanh
    seen = True
    if MASKED:
        seen = visible_tile(
            rows, columns, num_queries, num_keys, window, bounds_ptr, CAUSAL, WINDOWED, PACKED
        )
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
    num_queries,
    num_keys,
    window,
    bounds_ptr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
    PACKED: tl.constexpr,
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
    if PACKED:
        # Bounds never decrease from row to row: those of the first and the last one hold for the block.
        first, end = load_bounds(bounds_ptr, start_m, num_queries)
        last_first, last_end = load_bounds(bounds_ptr, start_m + BLOCK_M - 1, num_queries)
        lo = tl.maximum(lo, first // BLOCK_N * BLOCK_N)
        hi = tl.minimum(hi, last_end)
        full_lo = tl.maximum(full_lo, (last_first + BLOCK_N - 1) // BLOCK_N * BLOCK_N)
        full_hi = tl.minimum(full_hi, end // BLOCK_N * BLOCK_N)
    if MASK != NO_MASK:
        full_hi = 0
    full_lo = tl.maximum(full_lo, lo)
    full_hi = tl.maximum(full_hi, full_lo)
    return lo, full_lo, full_hi, hi


@triton.jit
def start_more(ROWS: tl.constexpr, EXTENDED: tl.constexpr):
    """The extended state of rows that have seen nothing; nothing where it is not asked for."""
    if EXTENDED:
        zeros = tl.zeros([ROWS], tl.float32)
        return zeros, zeros, zeros, zeros, zeros, zeros
    else:
        return ()


@triton.jit
def softmax_update(
    m_i, l_i, w_i, more, s, seen, unit, MASKED: tl.constexpr, EXACT: tl.constexpr, EXTENDED: tl.constexpr
):
    """Take one tile of scores into the running state; returns the state, exp2(t), and the rescaling.

    EXACT subtracts before it scales. Otherwise one fused multiply-add does both, whose rounding of
    m * unit is common to the row and so cancels from the entropy.
    """
    m_new = tl.maximum(m_i, tl.max(s, 1))
    # A row that has seen nothing yet has m = -inf, which is never subtracted.
    shift = tl.where(m_new == -float("inf"), 0.0, m_new) if MASKED else m_new
    t = (s - shift[:, None]) * unit if EXACT else s * unit - (shift * unit)[:, None]
    # Exactly 0 where the maximum stays: fused as above, a rounding error would come back with every tile,
    # and make 1e-3 of a row of a million keys.
    d = tl.where(m_i == -float("inf"), 0.0, (m_i - shift) * unit)
    alpha = tl.exp2(d)
    p = tl.exp2(t)
    # 0 * -inf is NaN: right for a visible score of -inf (an infinite input), wrong for a hidden one.
    pt = tl.where(seen, p * t, 0.0) if MASKED else p * t
    if EXTENDED:
        b_i, c_i, mean, m2, count, first = more
        ptt = tl.where(seen, pt * t, 0.0) if MASKED else pt * t
        b_i = alpha * (b_i + d * (2.0 * w_i + d * l_i)) + tl.sum(ptt, 1)
        c_i = alpha * alpha * c_i + tl.sum(p * p, 1)
        mean, m2, count = _take_in(mean, m2, count, s, seen, MASKED)
        more = b_i, c_i, mean, m2, count, first * alpha
    w_i = alpha * (w_i + l_i * d) + tl.sum(pt, 1)
    l_i = l_i * alpha + tl.sum(p, 1)
    return m_new, l_i, w_i, more, p, alpha


@triton.jit
def _take_in(mean, m2, count, s, seen, MASKED: tl.constexpr):
    """Mean, squared deviations and number of scores with one tile more (Chan, Golub and LeVeque 1979)."""
    if MASKED:
        number = tl.sum(tl.where(seen, 1.0, 0.0), 1)
        tile_mean = tl.sum(tl.where(seen, s, 0.0), 1) / tl.maximum(number, 1.0)
        deviation = tl.where(seen, s - tile_mean[:, None], 0.0)
    else:
        number = s.shape[1]
        tile_mean = tl.sum(s, 1) / number
        deviation = s - tile_mean[:, None]
    total = count + number
    share = number / tl.maximum(total, 1.0)
    apart = tile_mean - mean
    m2 += tl.sum(deviation * deviation, 1) + apart * apart * count * share
    return mean + apart * share, m2, total


@triton.jit
def first_weight(more, unseen, p, seen, columns, start_n, SCATTERED: tl.constexpr):
    """The extended state with the first visible key of a tile, for rows that had seen no key before it.

    SCATTERED = False promises that it is the tile's first key for all of them.
    """
    b_i, c_i, mean, m2, count, first = more
    place = start_n
    if SCATTERED:
        place = tl.min(tl.where(seen, columns, 2147483647), 1)[:, None]
    weight = tl.sum(tl.where(columns == place, p, 0.0), 1)
    return b_i, c_i, mean, m2, count, tl.where(unseen, weight, first)


@triton.jit
def softmax_merge(m_a, l_a, w_a, low_a, m_b, l_b, w_b, low_b, unit):
    """The running state (m, l, w, low) of the keys of both; of no key it is the identity."""
    m_i = tl.maximum(m_a, m_b)
    shift = tl.where(m_i == -float("inf"), 0.0, m_i)
    d_a = tl.where(m_a == -float("inf"), 0.0, (m_a - shift) * unit)
    d_b = tl.where(m_b == -float("inf"), 0.0, (m_b - shift) * unit)
    alpha, beta = tl.exp2(d_a), tl.exp2(d_b)
    w_i = alpha * (w_a + l_a * d_a) + beta * (w_b + l_b * d_b)
    return m_i, alpha * l_a + beta * l_b, w_i, tl.minimum(low_a, low_b)


@triton.jit
def softmax_finish(
    m_i, l_i, w_i, low, more, unit, to_natural, sink, SINKS: tl.constexpr, EXTENDED: tl.constexpr
):
    """(lse, entropy, max_logit, min_logit) in nats; the EXTENDED_FIELDS or (); and the factor that
    normalises the output.

    `sink` is in score units. Empty rows give lse = -inf, entropy = 0; rows that NaN or inf reached
    give NaN everywhere but in visible_keys.
    """
    empty = m_i == -float("inf")
    shift = tl.where(empty, 0.0, m_i)
    factor = 1.0
    if SINKS:
        top = tl.maximum(shift, sink)
        d = (shift - top) * unit
        z = (sink - top) * unit
        factor = tl.exp2(d)
        e_sink = tl.exp2(z)
        # A sink of -inf is no sink: 0 * -inf must not become NaN.
        z = tl.where(z == -float("inf"), 0.0, z)
        if EXTENDED:
            b_i, c_i, mean, m2, count, first = more
            b_i = factor * (b_i + d * (2.0 * w_i + d * l_i)) + e_sink * z * z
            c_i = factor * factor * c_i + e_sink * e_sink
            more = b_i, c_i, mean, m2, count, factor * first + e_sink
        w_i = factor * (w_i + l_i * d) + e_sink * z
        l_i = factor * l_i + e_sink
        shift = top
    broken = (l_i + w_i) != (l_i + w_i)
    nan = float("nan")
    l_safe = tl.where(empty, 1.0, l_i)
    log_l = tl.log2(l_safe) * LN_2
    lse = tl.where(empty & (broken == 0), -float("inf"), shift * to_natural + log_l)
    entropy = tl.where(empty & (broken == 0), 0.0, log_l - LN_2 * w_i / l_safe)
    max_logit = tl.where(broken, nan, m_i * to_natural)
    min_logit = tl.where(broken, nan, low * to_natural)
    if EXTENDED:
        b_i, c_i, mean, m2, count, first = more
        t_mean = w_i / l_safe
        logit_var = LN_2 * LN_2 * tl.maximum(b_i / l_safe - t_mean * t_mean, 0.0)
        collision = c_i / (l_safe * l_safe)
        score_std = tl.sqrt(m2 / tl.maximum(count, 1.0)) * to_natural
        more = (
            _unless(logit_var, empty, broken),
            _unless(collision, empty, broken),
            _unless(score_std, empty, broken),
            _unless(first / l_safe, empty, broken),
            _unless(mean * to_natural, empty, broken),
            count,
        )
    core = tl.where(broken, nan, lse), tl.where(broken, nan, entropy), max_logit, min_logit
    return core, more, factor / l_safe


@triton.jit
def _unless(number, empty, broken):
    return tl.where(broken, float("nan"), tl.where(empty, 0.0, number))
