"""One attention call to head statistics: the kernel of `fold`.

Each program owns one slot of the accumulator, (slot, head), and adds to it what it found in every slots-th block of
rows. So there are no atomics, no number depends on the order in which programs run, and a captured graph may replay
the launch.

Bytes: q and k once per query head (a group's k comes from the L2 cache), 16 a row for its statistics; of
a sample, the sampled rows of q once more.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..shared.masks import load_bounds, load_num_sequences
from ..shared.plan import ScorePlan


class SumFields(NamedTuple):
    """The place in the accumulator of each sum over rows."""

    rows: int
    judged_rows: int
    nonfinite_rows: int
    entropy: int
    logit_range: int
    normalized_entropy: int
    max_weight: int
    sink_mass: int
    jacobian_trace_bound: int
    saturated_rows: int
    judged_blocks: int
    normalized_entropy_blocks: int
    max_weight_blocks: int
    sink_mass_blocks: int
    jacobian_trace_bound_blocks: int
    saturated_rows_blocks: int
    sequences: int
    query_square: int
    key_square: int


class MaxFields(NamedTuple):
    """The place in the accumulator of each maximum over rows; all of them lie behind the sums."""

    max_logit: int
    neg_min_logit: int
    logit_range: int
    max_weight: int
    neg_normalized_entropy: int
    neg_max_weight: int
    query_square: int
    key_square: int
    num_keys: int
    score_kind: int


class Layout(NamedTuple):
    """Where the accumulator keeps each number, and which rows are judged and saturated."""

    sums: SumFields
    histogram: int  # place of the first bin, behind the other sums
    bins: int
    maxima: MaxFields
    judged_min_keys: int  # visible keys of a row that is judged
    saturated: float  # normalized entropy below which a row is saturated

    @property
    def num_sums(self) -> int:
        return self.histogram + self.bins

    @property
    def num_fields(self) -> int:
        return self.num_sums + len(self.maxima)


@dataclass(frozen=True, repr=False)
class FoldPlan(ScorePlan):
    """What the fold is compiled for."""

    has_sinks: bool
    has_table: bool  # of `scan_mask`
    is_sampled: bool
    group: int  # query heads of a key head
    head_dim: int
    block: int
    block_d: int
    columns: int  # of q and k, held at a time
    width: int  # a power of two larger than the number of fields
    num_sums: int
    num_fields: int
    layout: Layout


class Sizes(NamedTuple):
    batch: int
    heads: int
    num_queries: int
    num_keys: int
    num_places: int  # rows of a (batch, head) that have statistics: num_queries, or a sample's


class Table(NamedTuple):
    """Visible keys, first visible key and its bias of each row, or None and zeros: see `scan_mask`."""

    ptr: Any
    stride_b: int
    stride_h: int
    stride_part: int


@triton.jit
def _put(values, offs, PLACE: tl.constexpr, number):
    return tl.where(offs == PLACE, number, values)


@triton.jit
def _load_columns(pointers, columns, inside, HEAD_DIM: tl.constexpr):
    """Some columns of the rows at `pointers`, fp32; zeros of rows that are not inside."""
    mask = inside[:, None] & (columns < HEAD_DIM)[None, :]
    return tl.load(pointers[:, None] + columns[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _without_nan(squares):
    return tl.where(squares == squares, squares, 0.0).to(tl.float64)


@triton.jit
def _largest(squares, inside):
    """The maximum over a block. A vector of maxima, kept until the end, would take too many registers."""
    return tl.max(tl.where(inside & (squares == squares), squares, -float("inf")), 0)


@triton.jit
def _squares(x_ptr, x, batch, length, slot, slots, PLAN: tl.constexpr):
    """Squared lengths of this slot's share of the rows of one head of x: their sum and maximum, without NaN."""
    total = tl.full([PLAN.block], 0.0, tl.float64)
    top = -float("inf")
    blocks = tl.cdiv(length, PLAN.block)
    BLOCK_D: tl.constexpr = PLAN.block_d
    COLUMNS: tl.constexpr = PLAN.columns
    for work in tl.range(slot, batch * blocks, slots):
        row = work % blocks * PLAN.block + tl.arange(0, PLAN.block)
        pointers = x_ptr + (work // blocks).to(tl.int64) * x.stride_b + row.to(tl.int64) * x.stride_m
        squares = tl.full([PLAN.block], 0.0, tl.float32)
        for start in tl.static_range(0, BLOCK_D, COLUMNS):
            values = _load_columns(pointers, start + tl.arange(0, COLUMNS), row < length, PLAN.head_dim)
            squares += tl.sum(values * values, 1)
        total += _without_nan(squares)
        top = tl.maximum(top, _largest(squares, row < length))
    return tl.sum(total, 0), top


@triton.jit
def _of_block(values, judged):
    """Sum over the judged rows of a block, fp64."""
    return tl.sum(tl.where(judged, values, 0.0).to(tl.float64), 0)


@triton.jit
def _add_block(total, spread, values, judged, share):
    """The sum over judged rows, and the sum of (sum over a block)^2 / rows of the block, with one block more."""
    block = _of_block(values, judged)
    return total + block, spread + block * block * share


@triton.jit
def _visible_keys(m, inside, table, table_ptr, sizes, window, bounds_ptr, PLAN: tl.constexpr):
    """How many keys each row sees and which is the first: from positions, or from the scanned mask."""
    if PLAN.has_table:
        entry = table_ptr + m
        visible = tl.load(entry, mask=inside, other=0)
        first = tl.load(entry + table.stride_part, mask=inside, other=0)
    else:
        first = tl.full([PLAN.block], 0, tl.int32)
        last = tl.full([PLAN.block], 0, tl.int32) + (sizes.num_keys - 1)
        if PLAN.is_packed:
            first, last = load_bounds(bounds_ptr, tl.maximum(m, 0), sizes.num_queries)
            last -= 1
        if PLAN.is_windowed:
            first = tl.maximum(m - window + 1, first)
            last = tl.minimum(last, m + window - 1)
        if PLAN.is_causal:
            last = tl.minimum(last, m)
        visible = tl.where(inside, tl.maximum(last - first + 1, 0), 0)
    return visible, first


@triton.jit
def _first_products(q_rows, k_rows, inside, visible, num_keys, PLAN: tl.constexpr):
    """q.k of each row and its first visible key, and the squared lengths of the rows of q."""
    products = tl.full([PLAN.block], 0.0, tl.float32)
    squares = tl.full([PLAN.block], 0.0, tl.float32)
    BLOCK_D: tl.constexpr = PLAN.block_d
    COLUMNS: tl.constexpr = PLAN.columns
    for start in tl.static_range(0, BLOCK_D, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        q = _load_columns(q_rows, columns, inside, PLAN.head_dim)
        if PLAN.has_table or PLAN.hides_both_ends:
            k = _load_columns(k_rows, columns, visible > 0, PLAN.head_dim)
        else:  # k_rows is one pointer: the first key is the same for all rows
            width = tl.where(num_keys > 0, PLAN.head_dim, 0)
            k = tl.load(k_rows + columns, mask=columns < width, other=0.0)
            k = k.to(tl.float32)[None, :]
        products += tl.sum(q * k, 1)
        squares += tl.sum(q * q, 1)
    return products, squares


@triton.jit(do_not_specialize=["window"])
def fold_kernel(
    accumulator_ptr,
    rows,
    q,
    k,
    sink_ptr,
    table,
    index_ptr,
    bounds_ptr,
    sizes,
    scale,
    softcap,
    window,
    PLAN: tl.constexpr,
):
    """Add a call to the accumulator (slots, fields, H). rows: pointers to `Core`. q, k: `Strided`, inner stride 1."""
    slot, head = tl.program_id(0), tl.program_id(1)
    slots = tl.num_programs(0)
    batch, heads, num_queries, num_keys, num_places = sizes
    if slot >= batch * tl.cdiv(tl.maximum(num_queries, num_keys), PLAN.block):
        return
    q_ptr = q.ptr + head.to(tl.int64) * q.stride_h
    k_ptr = k.ptr + (head // PLAN.group).to(tl.int64) * k.stride_h
    infinity = float("inf")
    zeros = tl.full([PLAN.block], 0.0, tl.float64)
    nothing = tl.sum(zeros, 0)
    lows = tl.full([PLAN.block], -infinity, tl.float32)
    none = tl.full([PLAN.block], 0, tl.int32)
    finite_rows, broken_rows = none, none
    entropies, ranges, query_squares = zeros, zeros, zeros
    # Sums over judged rows, which are taken block by block for the spread between blocks.
    judged_rows, ratios, weights = nothing, nothing, nothing
    sinks, traces, saturated_rows = nothing, nothing, nothing
    judged_blocks, ratio_blocks, weight_blocks = nothing, nothing, nothing
    sink_blocks, trace_blocks, saturated_blocks = nothing, nothing, nothing
    top_max, top_min, top_range, top_weight, top_ratio = lows, lows, lows, lows, lows
    top_low_weight, top_query = lows, -infinity
    histogram = tl.full([PLAN.width], 0, tl.int32)
    offs = tl.arange(0, PLAN.block)
    sink = 0.0
    if PLAN.has_sinks:
        sink = tl.load(sink_ptr + head).to(tl.float32)

    # Tokens of no sequence have no part in the norms.
    query_end, key_end, sequences = num_queries, num_keys, batch
    if PLAN.is_packed:
        _, key_end = load_bounds(bounds_ptr, num_keys - 1, num_keys)
        query_end, sequences = key_end, load_num_sequences(bounds_ptr, num_keys)
    blocks = tl.cdiv(num_places, PLAN.block)
    for work in tl.range(slot, batch * blocks, slots):
        b = (work // blocks).to(tl.int64)
        m = work % blocks * PLAN.block + offs
        inside = m < num_places
        row = (b * heads + head) * num_places + m
        lse = tl.load(rows.lse + row, mask=inside, other=0.0)
        entropy = tl.load(rows.entropy + row, mask=inside, other=0.0)
        max_logit = tl.load(rows.max_logit + row, mask=inside, other=0.0)
        min_logit = tl.load(rows.min_logit + row, mask=inside, other=0.0)
        if PLAN.is_sampled:  # the place of a row is not its position; one that holds no row says -1
            m = tl.load(index_ptr + row, mask=inside, other=-1).to(tl.int32)
            inside = m >= 0
        table_ptr = table.ptr
        if PLAN.has_table:
            table_ptr += b * table.stride_b + head.to(tl.int64) * table.stride_h
        visible, first = _visible_keys(m, inside, table, table_ptr, sizes, window, bounds_ptr, PLAN)
        k_rows = k_ptr + b * k.stride_b
        if PLAN.has_table or PLAN.hides_both_ends:
            k_rows += first.to(tl.int64) * k.stride_m
        q_rows = q_ptr + b * q.stride_b + m.to(tl.int64) * q.stride_m
        score, squares = _first_products(q_rows, k_rows, inside, visible, num_keys, PLAN)
        if not PLAN.is_sampled:
            squares = tl.where(m < query_end, squares, 0.0) if PLAN.is_packed else squares
            query_squares += _without_nan(squares)
            top_query = tl.maximum(top_query, _largest(squares, inside))
        score *= scale
        if PLAN.has_softcap:
            # tanh by exp, as in cap_and_mask
            score = softcap * (1.0 - 2.0 / (tl.exp(score * (2.0 / softcap)) + 1.0))
        if PLAN.has_bias:
            bias = tl.load(table_ptr + m + 2 * table.stride_part, mask=inside, other=0)
            score += bias.to(tl.float32, bitcast=True)
        sink_mass = tl.exp(score - lse)
        if PLAN.has_sinks:
            sink_mass += tl.exp(sink - lse)

        # NaN and inf both fail "x - x == 0".
        spread = entropy + max_logit + min_logit
        finite = (visible > 0) & (spread - spread == 0.0)
        judged = finite & (visible >= PLAN.layout.judged_min_keys)
        ratio = entropy / tl.log(tl.maximum(visible, 2).to(tl.float32))
        weight = tl.exp(max_logit - lse)
        logit_range = max_logit - min_logit
        finite_rows += finite.to(tl.int32)
        broken_rows += ((visible > 0) & (finite == 0)).to(tl.int32)
        entropies += tl.where(finite, entropy, 0.0)
        ranges += tl.where(finite, logit_range, 0.0)
        block_rows = _of_block(1.0, judged)
        judged_rows += block_rows
        judged_blocks += tl.where(block_rows > 0.0, 1.0, 0.0)
        share = 1.0 / tl.maximum(block_rows, 1.0)
        ratios, ratio_blocks = _add_block(ratios, ratio_blocks, ratio, judged, share)
        weights, weight_blocks = _add_block(weights, weight_blocks, weight, judged, share)
        sinks, sink_blocks = _add_block(sinks, sink_blocks, sink_mass, judged, share)
        traces, trace_blocks = _add_block(traces, trace_blocks, 1.0 - weight * weight, judged, share)
        saturated = judged & (ratio < PLAN.layout.saturated)
        saturated_rows, saturated_blocks = _add_block(saturated_rows, saturated_blocks, 1.0, saturated, share)
        top_max = tl.maximum(top_max, tl.where(finite, max_logit, -infinity))
        top_min = tl.maximum(top_min, tl.where(finite, -min_logit, -infinity))
        top_range = tl.maximum(top_range, tl.where(finite, logit_range, -infinity))
        top_weight = tl.maximum(top_weight, tl.where(judged, weight, -infinity))
        top_ratio = tl.maximum(top_ratio, tl.where(judged, -ratio, -infinity))
        top_low_weight = tl.maximum(top_low_weight, tl.where(finite, -weight, -infinity))
        # Bins are counted at their place in the accumulator. Rows that are not judged count behind its end.
        bins = tl.where(judged, ratio, 0.0) * PLAN.layout.bins
        bins = tl.minimum(tl.maximum(bins, 0.0), PLAN.layout.bins - 1.0).to(tl.int32)
        places = tl.where(judged, bins + PLAN.layout.histogram, PLAN.width - 1)
        histogram += tl.histogram(places, PLAN.width)

    query_square = tl.sum(query_squares, 0)
    if PLAN.is_sampled:
        query_square, top_query = _squares(q_ptr, q, batch, query_end, slot, slots, PLAN)
    key_square, top_key = _squares(k_ptr, k, batch, key_end, slot, slots, PLAN)

    field = tl.arange(0, PLAN.width)
    sums = histogram.to(tl.float64)
    sums = _put(sums, field, PLAN.layout.sums.rows, tl.sum(finite_rows, 0).to(tl.float64))
    sums = _put(sums, field, PLAN.layout.sums.judged_rows, judged_rows)
    sums = _put(sums, field, PLAN.layout.sums.nonfinite_rows, tl.sum(broken_rows, 0).to(tl.float64))
    sums = _put(sums, field, PLAN.layout.sums.entropy, tl.sum(entropies, 0))
    sums = _put(sums, field, PLAN.layout.sums.logit_range, tl.sum(ranges, 0))
    sums = _put(sums, field, PLAN.layout.sums.normalized_entropy, ratios)
    sums = _put(sums, field, PLAN.layout.sums.max_weight, weights)
    sums = _put(sums, field, PLAN.layout.sums.sink_mass, sinks)
    sums = _put(sums, field, PLAN.layout.sums.jacobian_trace_bound, traces)
    sums = _put(sums, field, PLAN.layout.sums.saturated_rows, saturated_rows)
    sums = _put(sums, field, PLAN.layout.sums.judged_blocks, judged_blocks)
    sums = _put(sums, field, PLAN.layout.sums.normalized_entropy_blocks, ratio_blocks)
    sums = _put(sums, field, PLAN.layout.sums.max_weight_blocks, weight_blocks)
    sums = _put(sums, field, PLAN.layout.sums.sink_mass_blocks, sink_blocks)
    sums = _put(sums, field, PLAN.layout.sums.jacobian_trace_bound_blocks, trace_blocks)
    sums = _put(sums, field, PLAN.layout.sums.saturated_rows_blocks, saturated_blocks)
    counted = tl.where(slot == 0, sequences, 0).to(tl.float64)
    sums = _put(sums, field, PLAN.layout.sums.sequences, counted)
    sums = _put(sums, field, PLAN.layout.sums.query_square, query_square)
    sums = _put(sums, field, PLAN.layout.sums.key_square, key_square)
    tops = tl.full([PLAN.width], -infinity, tl.float32)
    tops = _put(tops, field, PLAN.layout.maxima.max_logit, tl.max(top_max, 0))
    tops = _put(tops, field, PLAN.layout.maxima.neg_min_logit, tl.max(top_min, 0))
    tops = _put(tops, field, PLAN.layout.maxima.logit_range, tl.max(top_range, 0))
    tops = _put(tops, field, PLAN.layout.maxima.max_weight, tl.max(top_weight, 0))
    tops = _put(tops, field, PLAN.layout.maxima.neg_normalized_entropy, tl.max(top_ratio, 0))
    tops = _put(tops, field, PLAN.layout.maxima.neg_max_weight, tl.max(top_low_weight, 0))
    tops = _put(tops, field, PLAN.layout.maxima.query_square, scale * scale * top_query)
    tops = _put(tops, field, PLAN.layout.maxima.key_square, top_key)
    tops = _put(tops, field, PLAN.layout.maxima.num_keys, num_keys * 1.0)
    kind = 2.0 if PLAN.has_softcap or PLAN.has_sinks else 1.0 if PLAN.has_bias else 0.0
    tops = _put(tops, field, PLAN.layout.maxima.score_kind, kind)
    pointers = accumulator_ptr + (slot * PLAN.num_fields + field) * heads + head
    before = tl.load(pointers, mask=field < PLAN.num_fields, other=0.0)
    after = tl.where(field < PLAN.num_sums, before + sums, tl.maximum(before, tops.to(tl.float64)))
    tl.store(pointers, after, mask=field < PLAN.num_fields)
