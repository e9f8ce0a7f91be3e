"""One attention call to head statistics on the device: `fold.fold` in one launch, no atomics.

Each program owns one slot of the accumulator, (slot, head), and adds to it what it found in every
SLOTS-th block of rows: nobody waits for anybody, no number depends on the order in which programs run,
and a captured graph may replay the launch. Whoever reads an accumulator adds its slots up.

Bytes: q and k once per query head (a group's k comes from the L2 cache), 16 a row for its statistics; of
a sample, the sampled rows of q once more.
"""

import torch
import triton
import triton.language as tl

from ...reference.sampling import BLOCK_ROWS
from ...statistics.fields import (
    HISTOGRAM_BINS,
    JUDGED_MIN_KEYS,
    MAX_FIELDS,
    NUM_FIELDS,
    NUM_SUMS,
    SATURATED_ENTROPY,
    SUM_FIELDS,
)
from ..shared.launch import launch
from ..shared.packing import sequence_bounds
from ..shared.softmax import block_dim, load_bounds, load_num_sequences
from .mask_map import scan_mask

# Constants of the kernel. As globals of this file they would be compared anew at every launch, at two
# microseconds of the host's time each.
_LAYOUT = {
    "NUM_SUM_FIELDS": len(SUM_FIELDS),
    "NUM_SUMS": NUM_SUMS,
    "NUM_FIELDS": NUM_FIELDS,
    "WIDTH": triton.next_power_of_2(NUM_FIELDS + 1),
    "BINS": HISTOGRAM_BINS,
    "JUDGED_MIN_KEYS": JUDGED_MIN_KEYS,
    "SATURATED": SATURATED_ENTROPY,
}

# One wave on the 132 multiprocessors of an H100 for 16 heads; the accumulator grows with it.
SLOTS = 32
# Columns of q and k held at a time, so that 64 rows are 32 elements a thread: four programs fit a
# multiprocessor, without spills.
_COLUMNS = 64


@triton.jit
def _put(values, offs, field: tl.constexpr, number):
    return tl.where(offs == field, number, values)


@triton.jit
def _load_columns(pointers, columns, inside, HEAD_DIM: tl.constexpr):
    """Some columns of the rows at `pointers`, fp32; zeros of rows that are not inside."""
    mask = inside[:, None] & (columns < HEAD_DIM)[None, :]
    return tl.load(pointers[:, None] + columns[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _but_nan(squares):
    return tl.where(squares == squares, squares, 0.0).to(tl.float64)


@triton.jit
def _largest(squares, inside):
    """Of a block, as a number: kept as a vector until the end it costs registers that the fold does not have."""
    return tl.max(tl.where(inside & (squares == squares), squares, -float("inf")), 0)


@triton.jit
def _squares(
    x_ptr,
    stride_b,
    stride_row,
    batch,
    length,
    slot,
    slots,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    COLUMNS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """Squared lengths of this slot's share of the rows of x, without those that hold NaN: their sum and maximum."""
    total = tl.zeros([BLOCK], tl.float64)
    top = -float("inf")
    blocks = tl.cdiv(length, BLOCK)
    for work in tl.range(slot, batch * blocks, slots):
        row = work % blocks * BLOCK + tl.arange(0, BLOCK)
        pointers = x_ptr + (work // blocks).to(tl.int64) * stride_b + row.to(tl.int64) * stride_row
        squares = tl.zeros([BLOCK], tl.float32)
        for start in tl.static_range(0, BLOCK_D, COLUMNS):
            x = _load_columns(pointers, start + tl.arange(0, COLUMNS), row < length, HEAD_DIM)
            squares += tl.sum(x * x, 1)
        total += _but_nan(squares)
        top = tl.maximum(top, _largest(squares, row < length))
    return tl.sum(total, 0), top


@triton.jit
def _of_block(values, judged):
    """Sum over the judged rows of a block, fp64."""
    return tl.sum(tl.where(judged, values, 0.0).to(tl.float64), 0)


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
    index_ptr,
    bounds_ptr,
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
    num_places,
    scale,
    softcap,
    window,
    HEAD_DIM: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    COLUMNS: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
    PACKED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SINKS: tl.constexpr,
    TABLE: tl.constexpr,
    BIAS: tl.constexpr,
    SAMPLED: tl.constexpr,
    NUM_SUM_FIELDS: tl.constexpr,
    NUM_SUMS: tl.constexpr,
    NUM_FIELDS: tl.constexpr,
    WIDTH: tl.constexpr,
    BINS: tl.constexpr,
    JUDGED_MIN_KEYS: tl.constexpr,
    SATURATED: tl.constexpr,
):
    slot, head = tl.program_id(0), tl.program_id(1)
    slots = tl.num_programs(0)
    if slot >= batch * tl.cdiv(tl.maximum(num_queries, num_keys), BLOCK):
        return
    q_ptr += head.to(tl.int64) * stride_qh
    k_ptr += (head // GROUP).to(tl.int64) * stride_kh
    infinity = float("inf")
    zeros = tl.zeros([BLOCK], tl.float64)
    nothing = tl.sum(zeros, 0)
    lows = tl.full([BLOCK], -infinity, tl.float32)
    none = tl.zeros([BLOCK], tl.int32)
    rows, broken_rows = none, none
    entropies, ranges, query_squares = zeros, zeros, zeros
    # Sums over judged rows, which are taken block by block for the spread between blocks.
    judged_rows, ratios, weights = nothing, nothing, nothing
    sinks, traces, saturated_rows = nothing, nothing, nothing
    judged_blocks, ratio_blocks, weight_blocks = nothing, nothing, nothing
    sink_blocks, trace_blocks, saturated_blocks = nothing, nothing, nothing
    top_max, top_min, top_range, top_weight, top_ratio = lows, lows, lows, lows, lows
    top_low_weight, top_query = lows, -infinity
    histogram = tl.zeros([WIDTH], tl.int32)
    offs = tl.arange(0, BLOCK)
    offs_d = tl.arange(0, COLUMNS)
    sink = 0.0
    if SINKS:
        sink = tl.load(sink_ptr + head).to(tl.float32)

    # Tokens of no sequence have no part in the norms.
    query_end, key_end, sequences = num_queries, num_keys, batch
    if PACKED:
        _, key_end = load_bounds(bounds_ptr, num_keys - 1, num_keys)
        query_end, sequences = key_end, load_num_sequences(bounds_ptr, num_keys)
    blocks = tl.cdiv(num_places, BLOCK)
    for work in tl.range(slot, batch * blocks, slots):
        b = (work // blocks).to(tl.int64)
        m = work % blocks * BLOCK + offs
        inside = m < num_places
        row = (b * heads + head) * num_places + m
        lse = tl.load(lse_ptr + row, mask=inside, other=0.0)
        entropy = tl.load(entropy_ptr + row, mask=inside, other=0.0)
        max_logit = tl.load(max_ptr + row, mask=inside, other=0.0)
        min_logit = tl.load(min_ptr + row, mask=inside, other=0.0)
        if SAMPLED:  # the place of a row is not its position; one that holds no row says -1
            m = tl.load(index_ptr + row, mask=inside, other=-1).to(tl.int32)
            inside = m >= 0
        # How many keys the row sees and which is the first: from positions, or from the scanned mask.
        if TABLE:
            entry = table_ptr + b * stride_table_b + head.to(tl.int64) * stride_table_h + m
            visible = tl.load(entry, mask=inside, other=0)
            first = tl.load(entry + stride_table_part, mask=inside, other=0)
        else:
            first = tl.zeros([BLOCK], tl.int32)
            last = tl.zeros([BLOCK], tl.int32) + (num_keys - 1)
            if PACKED:
                first, last = load_bounds(bounds_ptr, tl.maximum(m, 0), num_queries)
                last -= 1
            if WINDOWED:
                first = tl.maximum(m - window + 1, first)
                last = tl.minimum(last, m + window - 1)
            if CAUSAL:
                last = tl.minimum(last, m)
            visible = tl.where(inside, tl.maximum(last - first + 1, 0), 0)
        q_rows = q_ptr + b * stride_qb + m.to(tl.int64) * stride_qm
        k_rows = k_ptr + b * stride_kb + first.to(tl.int64) * stride_kn
        score = tl.zeros([BLOCK], tl.float32)
        squares = tl.zeros([BLOCK], tl.float32)
        for start in tl.static_range(0, BLOCK_D, COLUMNS):
            columns = start + offs_d
            q = _load_columns(q_rows, columns, inside, HEAD_DIM)
            if TABLE or WINDOWED or PACKED:
                k = _load_columns(k_rows, columns, visible > 0, HEAD_DIM)
            else:
                width = tl.where(num_keys > 0, HEAD_DIM, 0)
                k = tl.load(k_ptr + b * stride_kb + columns, mask=columns < width, other=0.0)
                k = k.to(tl.float32)[None, :]
            score += tl.sum(q * k, 1)
            squares += tl.sum(q * q, 1)
        if not SAMPLED:
            squares = tl.where(m < query_end, squares, 0.0) if PACKED else squares
            query_squares += _but_nan(squares)
            top_query = tl.maximum(top_query, _largest(squares, inside))
        score *= scale
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
        broken_rows += ((visible > 0) & (finite == 0)).to(tl.int32)
        entropies += tl.where(finite, entropy, 0.0)
        ranges += tl.where(finite, logit_range, 0.0)
        block_rows = _of_block(1.0, judged)
        judged_rows += block_rows
        judged_blocks += tl.where(block_rows > 0.0, 1.0, 0.0)
        share = 1.0 / tl.maximum(block_rows, 1.0)
        block = _of_block(ratio, judged)
        ratios += block
        ratio_blocks += block * block * share
        block = _of_block(weight, judged)
        weights += block
        weight_blocks += block * block * share
        block = _of_block(sink_mass, judged)
        sinks += block
        sink_blocks += block * block * share
        block = _of_block(1.0 - weight * weight, judged)
        traces += block
        trace_blocks += block * block * share
        block = _of_block(1.0, judged & (ratio < SATURATED))
        saturated_rows += block
        saturated_blocks += block * block * share
        top_max = tl.maximum(top_max, tl.where(finite, max_logit, -infinity))
        top_min = tl.maximum(top_min, tl.where(finite, -min_logit, -infinity))
        top_range = tl.maximum(top_range, tl.where(finite, logit_range, -infinity))
        top_weight = tl.maximum(top_weight, tl.where(judged, weight, -infinity))
        top_ratio = tl.maximum(top_ratio, tl.where(judged, -ratio, -infinity))
        top_low_weight = tl.maximum(top_low_weight, tl.where(finite, -weight, -infinity))
        # Bins are counted at their place in the accumulator; rows that are not judged, after its end.
        bins = tl.minimum(tl.maximum(tl.where(judged, ratio, 0.0) * BINS, 0.0), BINS - 1.0).to(tl.int32)
        histogram += tl.histogram(tl.where(judged, bins + NUM_SUM_FIELDS, WIDTH - 1), WIDTH)

    query_square = tl.sum(query_squares, 0)
    if SAMPLED:
        query_square, top_query = _squares(
            q_ptr, stride_qb, stride_qm, batch, query_end, slot, slots, BLOCK, BLOCK_D, COLUMNS, HEAD_DIM
        )
    key_square, top_key = _squares(
        k_ptr, stride_kb, stride_kn, batch, key_end, slot, slots, BLOCK, BLOCK_D, COLUMNS, HEAD_DIM
    )

    field = tl.arange(0, WIDTH)
    sums = histogram.to(tl.float64)
    sums = _put(sums, field, 0, tl.sum(rows, 0).to(tl.float64))
    sums = _put(sums, field, 1, judged_rows)
    sums = _put(sums, field, 2, tl.sum(broken_rows, 0).to(tl.float64))
    sums = _put(sums, field, 3, tl.sum(entropies, 0))
    sums = _put(sums, field, 4, tl.sum(ranges, 0))
    sums = _put(sums, field, 5, ratios)
    sums = _put(sums, field, 6, weights)
    sums = _put(sums, field, 7, sinks)
    sums = _put(sums, field, 8, traces)
    sums = _put(sums, field, 9, saturated_rows)
    sums = _put(sums, field, 10, judged_blocks)
    sums = _put(sums, field, 11, ratio_blocks)
    sums = _put(sums, field, 12, weight_blocks)
    sums = _put(sums, field, 13, sink_blocks)
    sums = _put(sums, field, 14, trace_blocks)
    sums = _put(sums, field, 15, saturated_blocks)
    sums = _put(sums, field, 16, tl.where(slot == 0, sequences, 0).to(tl.float64))
    sums = _put(sums, field, 17, query_square)
    sums = _put(sums, field, 18, key_square)
    tops = tl.full([WIDTH], -infinity, tl.float32)
    tops = _put(tops, field, NUM_SUMS + 0, tl.max(top_max, 0))
    tops = _put(tops, field, NUM_SUMS + 1, tl.max(top_min, 0))
    tops = _put(tops, field, NUM_SUMS + 2, tl.max(top_range, 0))
    tops = _put(tops, field, NUM_SUMS + 3, tl.max(top_weight, 0))
    tops = _put(tops, field, NUM_SUMS + 4, tl.max(top_ratio, 0))
    tops = _put(tops, field, NUM_SUMS + 5, tl.max(top_low_weight, 0))
    tops = _put(tops, field, NUM_SUMS + 6, scale * scale * top_query)
    tops = _put(tops, field, NUM_SUMS + 7, top_key)
    tops = _put(tops, field, NUM_SUMS + 8, num_keys * 1.0)
    tops = _put(tops, field, NUM_SUMS + 9, 2.0 if SOFTCAP or SINKS else 1.0 if BIAS else 0.0)
    pointers = accumulator_ptr + (slot * NUM_FIELDS + field) * heads + head
    before = tl.load(pointers, mask=field < NUM_FIELDS, other=0.0)
    after = tl.where(field < NUM_SUMS, before + sums, tl.maximum(before, tops.to(tl.float64)))
    tl.store(pointers, after, mask=field < NUM_FIELDS)


# The lines above follow this order; a field added in one place only must not go unnoticed.
assert (len(SUM_FIELDS), len(MAX_FIELDS)) == (19, 10), "kernels/fold.py does not cover all of stats.py"


def fold(accumulator, query, key, rows, options):
    """`fold.fold` on the device, for head dimensions up to 256 and not fp64.

    accumulator (slots, NUM_FIELDS, H) fp64, query (B, H, M, D), key (B, H_kv, N, D), rows of (B, H, M)
    or a sample of them, fp32; any strides (rows or an inner stride that are not contiguous are copied).
    """
    batch, heads, num_queries, head_dim = query.shape
    kv_heads, num_keys = key.shape[1:3]
    query, key = (x if x.stride(3) == 1 else x.contiguous() for x in (query, key))
    table, table_strides, has_bias = None, (0, 0, 0), False
    bounds = sequence_bounds(options.seqlens, num_keys)
    if options.attn_mask is not None:
        table, table_strides = scan_mask(options, (batch, heads, num_queries, num_keys), bounds)
        has_bias = options.attn_mask.dtype != torch.bool
    width, index = block_dim(head_dim), rows.row_index
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
        None if index is None else index.contiguous(),
        bounds,
        *query.stride()[:3],
        *key.stride()[:3],
        *table_strides,
        batch,
        heads,
        num_queries,
        num_keys,
        rows.lse.shape[2],
        options.scale,
        options.softcap or 0.0,
        options.window_size or 0,
    )
    constants = {
        "HEAD_DIM": head_dim,
        "GROUP": heads // kv_heads,
        "BLOCK": BLOCK_ROWS,
        "BLOCK_D": width,
        "COLUMNS": min(width, _COLUMNS),
        "CAUSAL": options.is_causal,
        "WINDOWED": options.window_size is not None,
        "PACKED": bounds is not None,
        "SOFTCAP": options.softcap is not None,
        "SINKS": options.sinks is not None,
        "TABLE": table is not None,
        "BIAS": has_bias,
        "SAMPLED": index is not None,
        **_LAYOUT,
    }
    sinks_dtype = None if options.sinks is None else options.sinks.dtype
    kind = (query.device, query.dtype, sinks_dtype, *arguments[11:25])
    launch(_fold_kernel, (accumulator.shape[0], heads, 1), kind, arguments, constants, num_warps=4)
