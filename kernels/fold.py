"""One attention call to head statistics on the device: `fold.fold` in one launch, no atomics.

Each program owns one slot of the accumulator, (slot, head), and adds to it what it found in every
SLOTS-th block of rows: nobody waits for anybody, no number depends on the order in which programs run,
and a captured graph may replay the launch. Whoever reads an accumulator adds its slots up.

Bytes: q and k once per query head (a group's k comes from the L2 cache), 16 a row for its statistics.
"""

import torch
import triton
import triton.language as tl

from ..stats import (
    DEAD_ENTROPY_RATIO,
    HISTOGRAM_BINS,
    JUDGED_MIN_KEYS,
    MAX_FIELDS,
    NUM_FIELDS,
    NUM_SUMS,
    SUM_FIELDS,
)
from .launch import launch
from .primitives import ADDITIVE_MASK, block_dim, mask_arguments, visible_tile

# Constants of the kernel. As globals of this file they would be compared anew at every launch, at two
# microseconds of the host's time each.
_LAYOUT = {
    "NUM_SUM_FIELDS": len(SUM_FIELDS),
    "NUM_SUMS": NUM_SUMS,
    "NUM_FIELDS": NUM_FIELDS,
    "WIDTH": triton.next_power_of_2(NUM_FIELDS + 1),
    "BINS": HISTOGRAM_BINS,
    "JUDGED_MIN_KEYS": JUDGED_MIN_KEYS,
    "DEAD": DEAD_ENTROPY_RATIO,
}

# One wave on the 132 multiprocessors of an H100 for 16 heads; the accumulator grows with it.
SLOTS = 32
# Elements of q and k held at a time, 32 a thread: four programs fit a multiprocessor, without spills.
_TILE = 4096
# Keys of a user mask that are scanned at a time.
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
    BLOCK: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
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
    for start in tl.range(lo, hi, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        seen = visible_tile(rows, columns, num_queries, num_keys, window, CAUSAL, WINDOWED)
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


@triton.jit
def _put(values, offs, field: tl.constexpr, number):
    return tl.where(offs == field, number, values)


@triton.jit
def _squares(tile):
    """Sum of squares per row in fp64; a row that holds NaN is left out."""
    squares = tl.sum(tile * tile, 1)
    return tl.where(squares == squares, squares, 0.0).to(tl.float64)


@triton.jit(do_not_specialize=["window"])
def _fold_kernel(
    accumulator_ptr,
    lse_ptr,
    entropy_ptr,
    max_ptr,
    min_ptr,
    q_ptr,
    k_ptr,
    sink_ptr,
    table_ptr,
    stride_qb,
    stride_qh,
    stride_qm,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_table_b,
    stride_table_h,
    stride_table_part,
    batch,
    heads,
    num_queries,
    num_keys,
    scale,
    softcap,
    window,
    HEAD_DIM: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SINKS: tl.constexpr,
    TABLE: tl.constexpr,
    BIAS: tl.constexpr,
    NUM_SUM_FIELDS: tl.constexpr,
    NUM_SUMS: tl.constexpr,
    NUM_FIELDS: tl.constexpr,
    WIDTH: tl.constexpr,
    BINS: tl.constexpr,
    JUDGED_MIN_KEYS: tl.constexpr,
    DEAD: tl.constexpr,
):
    slot, head = tl.program_id(0), tl.program_id(1)
    slots = tl.num_programs(0)
    if slot >= batch * tl.cdiv(tl.maximum(num_queries, num_keys), BLOCK):
        return
    q_ptr += head.to(tl.int64) * stride_qh
    k_ptr += (head // GROUP).to(tl.int64) * stride_kh
    infinity = float("inf")
    zeros = tl.zeros([BLOCK], tl.float64)
    lows = tl.full([BLOCK], -infinity, tl.float32)
    none = tl.zeros([BLOCK], tl.int32)
    rows, judged_rows, broken_rows, dead_rows = none, none, none, none
    entropies, ranges, ratios, weights, sinks, traces = zeros, zeros, zeros, zeros, zeros, zeros
    query_squares, key_squares = zeros, zeros
    top_max, top_min, top_range, top_weight, top_ratio = lows, lows, lows, lows, lows
    histogram = tl.zeros([WIDTH], tl.int32)
    offs = tl.arange(0, BLOCK)
    offs_d = tl.arange(0, BLOCK_D)
    inside_d = offs_d < HEAD_DIM
    sink = 0.0
    if SINKS:
        sink = tl.load(sink_ptr + head).to(tl.float32)

    blocks = tl.cdiv(num_queries, BLOCK)
    for work in tl.range(slot, batch * blocks, slots):
        b = (work // blocks).to(tl.int64)
        m = work % blocks * BLOCK + offs
        inside = m < num_queries
        q_rows = q_ptr + b * stride_qb + m.to(tl.int64) * stride_qm
        q = tl.load(
            q_rows[:, None] + offs_d[None, :], mask=inside[:, None] & inside_d[None, :], other=0.0
        ).to(tl.float32)
        row = (b * heads + head) * num_queries + m
        lse = tl.load(lse_ptr + row, mask=inside, other=0.0)
        entropy = tl.load(entropy_ptr + row, mask=inside, other=0.0)
        max_logit = tl.load(max_ptr + row, mask=inside, other=0.0)
        min_logit = tl.load(min_ptr + row, mask=inside, other=0.0)
        # How many keys the row sees and which is the first: from positions, or from the scanned mask.
        if TABLE:
            entry = table_ptr + b * stride_table_b + head.to(tl.int64) * stride_table_h + m
            visible = tl.load(entry, mask=inside, other=0)
            first = tl.load(entry + stride_table_part, mask=inside, other=0)
        else:
            first = tl.zeros([BLOCK], tl.int32)
            last = tl.zeros([BLOCK], tl.int32) + (num_keys - 1)
            if WINDOWED:
                first = tl.maximum(m - window + 1, 0)
                last = tl.minimum(last, m + window - 1)
            if CAUSAL:
                last = tl.minimum(last, m)
            visible = tl.where(inside, tl.maximum(last - first + 1, 0), 0)
        k_first = k_ptr + b * stride_kb
        if TABLE or WINDOWED:
            k_rows = k_first + first.to(tl.int64) * stride_kn
            k = tl.load(
                k_rows[:, None] + offs_d[None, :],
                mask=(visible > 0)[:, None] & inside_d[None, :],
                other=0.0,
            ).to(tl.float32)
        else:
            width = tl.where(num_keys > 0, HEAD_DIM, 0)
            k = tl.load(k_first + offs_d, mask=offs_d < width, other=0.0).to(tl.float32)[None, :]
        score = tl.sum(q * k, 1) * scale
        if SOFTCAP:
            # tanh by exp, as in bend_and_mask
            score = softcap * (1.0 - 2.0 / (tl.exp(score * (2.0 / softcap)) + 1.0))
        if BIAS:
            score += tl.load(entry + 2 * stride_table_part, mask=inside, other=0).to(tl.float32, bitcast=True)
        sink_mass = tl.exp(score - lse)
        if SINKS:
            sink_mass += tl.exp(sink - lse)

        # NaN and inf both fail "x - x == 0".
        spread = entropy + max_logit + min_logit
        finite = (visible > 0) & (spread - spread == 0.0)
        judged = finite & (visible >= JUDGED_MIN_KEYS)
        ratio = entropy / tl.log(tl.maximum(visible, 2).to(tl.float32))
        weight = tl.exp(max_logit - lse)
        logit_range = max_logit - min_logit
        rows += finite.to(tl.int32)
        judged_rows += judged.to(tl.int32)
        broken_rows += ((visible > 0) & (finite == 0)).to(tl.int32)
        dead_rows += (judged & (ratio < DEAD)).to(tl.int32)
        entropies += tl.where(finite, entropy, 0.0)
        ranges += tl.where(finite, logit_range, 0.0)
        ratios += tl.where(judged, ratio, 0.0)
        weights += tl.where(judged, weight, 0.0)
        sinks += tl.where(judged, sink_mass, 0.0)
        traces += tl.where(judged, 1.0 - weight * weight, 0.0)
        query_squares += _squares(q)
        top_max = tl.maximum(top_max, tl.where(finite, max_logit, -infinity))
        top_min = tl.maximum(top_min, tl.where(finite, -min_logit, -infinity))
        top_range = tl.maximum(top_range, tl.where(finite, logit_range, -infinity))
        top_weight = tl.maximum(top_weight, tl.where(judged, weight, -infinity))
        top_ratio = tl.maximum(top_ratio, tl.where(judged, -ratio, -infinity))
        # Bins are counted at their place in the accumulator; rows that are not judged, after its end.
        bins = tl.minimum(tl.maximum(tl.where(judged, ratio, 0.0) * BINS, 0.0), BINS - 1.0).to(tl.int32)
        histogram += tl.histogram(tl.where(judged, bins + NUM_SUM_FIELDS, WIDTH - 1), WIDTH)

    blocks = tl.cdiv(num_keys, BLOCK)
    for work in tl.range(slot, batch * blocks, slots):
        n = work % blocks * BLOCK + offs
        k_rows = k_ptr + (work // blocks).to(tl.int64) * stride_kb + n.to(tl.int64) * stride_kn
        inside = (n < num_keys)[:, None] & inside_d[None, :]
        k = tl.load(k_rows[:, None] + offs_d[None, :], mask=inside, other=0.0)
        key_squares += _squares(k.to(tl.float32))

    field = tl.arange(0, WIDTH)
    sums = histogram.to(tl.float64)
    sums = _put(sums, field, 0, tl.sum(rows, 0).to(tl.float64))
    sums = _put(sums, field, 1, tl.sum(judged_rows, 0).to(tl.float64))
    sums = _put(sums, field, 2, tl.sum(broken_rows, 0).to(tl.float64))
    sums = _put(sums, field, 3, tl.sum(entropies, 0))
    sums = _put(sums, field, 4, tl.sum(ranges, 0))
    sums = _put(sums, field, 5, tl.sum(ratios, 0))
    sums = _put(sums, field, 6, tl.sum(weights, 0))
    sums = _put(sums, field, 7, tl.sum(sinks, 0))
    sums = _put(sums, field, 8, tl.sum(traces, 0))
    sums = _put(sums, field, 9, tl.sum(dead_rows, 0).to(tl.float64))
    sums = _put(sums, field, 10, tl.where(slot == 0, batch, 0).to(tl.float64))
    sums = _put(sums, field, 11, tl.sum(query_squares, 0))
    sums = _put(sums, field, 12, tl.sum(key_squares, 0))
    tops = tl.full([WIDTH], -infinity, tl.float32)
    tops = _put(tops, field, NUM_SUMS + 0, tl.max(top_max, 0))
    tops = _put(tops, field, NUM_SUMS + 1, tl.max(top_min, 0))
    tops = _put(tops, field, NUM_SUMS + 2, tl.max(top_range, 0))
    tops = _put(tops, field, NUM_SUMS + 3, tl.max(top_weight, 0))
    tops = _put(tops, field, NUM_SUMS + 4, tl.max(top_ratio, 0))
    pointers = accumulator_ptr + (slot * NUM_FIELDS + field) * heads + head
    before = tl.load(pointers, mask=field < NUM_FIELDS, other=0.0)
    after = tl.where(field < NUM_SUMS, before + sums, tl.maximum(before, tops.to(tl.float64)))
    tl.store(pointers, after, mask=field < NUM_FIELDS)


# The lines above follow this order; a field added in one place only must not go unnoticed.
assert (len(SUM_FIELDS), len(MAX_FIELDS)) == (13, 5), "kernels/fold.py does not cover every field of stats.py"


def _scan_mask(options, shape: tuple[int, int, int, int]) -> tuple[torch.Tensor, tuple[int, int, int]]:
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
        BLOCK=_SCAN,
        CAUSAL=options.is_causal,
        WINDOWED=options.window_size is not None,
        MASK=kind,
    )
    per_batch = mask_heads * num_queries if mask_batch > 1 else 0
    return table, (per_batch, num_queries if mask_heads > 1 else 0, size)


def fold(accumulator, query, key, rows, options):
    """`fold.fold` on the device, for head dimensions up to 256 and not fp64.

    accumulator (slots, NUM_FIELDS, H) fp64, query (B, H, M, D), key (B, H_kv, N, D), rows of (B, H, M)
    fp32; any strides (rows or an inner stride that are not contiguous are copied).
    """
    batch, heads, num_queries, head_dim = query.shape
    kv_heads, num_keys = key.shape[1:3]
    query, key = (x if x.stride(3) == 1 else x.contiguous() for x in (query, key))
    table, table_strides, has_bias = None, (0, 0, 0), False
    if options.attn_mask is not None:
        table, table_strides = _scan_mask(options, (batch, heads, num_queries, num_keys))
        has_bias = options.attn_mask.dtype != torch.bool
    width = block_dim(head_dim)
    arguments = (
        accumulator,
        rows.lse.contiguous(),
        rows.entropy.contiguous(),
        rows.max_logit.contiguous(),
        rows.min_logit.contiguous(),
        query,
        key,
        options.sinks,
        table,
        *query.stride()[:3],
        *key.stride()[:3],
        *table_strides,
        batch,
        heads,
        num_queries,
        num_keys,
        options.scale,
        options.softcap or 0.0,
        options.window_size or 0,
    )
    constants = {
        "HEAD_DIM": head_dim,
        "GROUP": heads // kv_heads,
        "BLOCK": min(64, _TILE // width),
        "BLOCK_D": width,
        "CAUSAL": options.is_causal,
        "WINDOWED": options.window_size is not None,
        "SOFTCAP": options.softcap is not None,
        "SINKS": options.sinks is not None,
        "TABLE": table is not None,
        "BIAS": has_bias,
        **_LAYOUT,
    }
    sinks_dtype = None if options.sinks is None else options.sinks.dtype
    kind = (query.device, query.dtype, sinks_dtype, *arguments[9:22])
    launch(_fold_kernel, (accumulator.shape[0], heads, 1), kind, arguments, constants, num_warps=4)
