"""One attention call to head statistics: the kernel of `fold`.

Each program owns one slot of the accumulator, (slot, head), and adds to it what it found in every slots-th block of
rows. So there are no atomics, no number depends on the order in which programs run, and a captured graph may replay
the launch.

Bytes: q and k once per query head (a group's k comes from the L2 cache), 16 a row for its statistics; of
a sample, the sampled rows of q once more.
"""

import triton
import triton.language as tl

from ..shared.gate import EVALUATION, STATISTICS, is_off
from ..shared.masks import cap_and_mask, load_bounds, load_num_sequences, mask_of_head
from .lengths import broken_values, is_broken, largest, lengths, load_columns, without_nan


@triton.jit
def _put(values, offs, PLACE: tl.constexpr, number):
    return tl.where(offs == PLACE, number, values)


@triton.jit
def _log_of(weight):
    """weight * log(weight), 0 for a weight of 0."""
    # A constant below fp32's normal numbers would turn all of this into fp64.
    return tl.where(weight > 0.0, weight * tl.log(tl.maximum(weight, 1e-37)), 0.0)


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
def _visible_keys(m, inside, table, table_ptr, call, window, PLAN: tl.constexpr):
    """How many keys each row sees and which is the first: from positions, or from the scanned mask."""
    if PLAN.has_table:
        entry = table_ptr + m
        visible = tl.load(entry, mask=inside, other=0)
        first = tl.load(entry + table.stride_part, mask=inside, other=0)
    else:
        first = tl.full([PLAN.block], 0, tl.int32)
        last = tl.full([PLAN.block], 0, tl.int32) + (call.num_keys - 1)
        if PLAN.is_packed:
            first, last = load_bounds(call.bounds_ptr, tl.maximum(m, 0), call.num_queries)
            last -= 1
        if PLAN.is_windowed:
            first = tl.maximum(m - window + 1, first)
            last = tl.minimum(last, m + window - 1)
        if PLAN.is_causal:
            last = tl.minimum(last, m)
        visible = tl.where(inside, tl.maximum(last - first + 1, 0), 0)
    return visible, first


@triton.jit
def _products(q_rows, first_rows, shared_row, inside, visible, num_keys, PLAN: tl.constexpr):
    """q.k of each row with its first visible key and with the shared key, and squared lengths of the rows of q."""
    on_first = tl.full([PLAN.block], 0.0, tl.float32)
    on_shared = tl.full([PLAN.block], 0.0, tl.float32)
    squares = tl.full([PLAN.block], 0.0, tl.float32)
    BLOCK_D: tl.constexpr = PLAN.block_d
    COLUMNS: tl.constexpr = PLAN.columns
    width = tl.where(num_keys > 0, PLAN.head_dim, 0)
    for start in tl.static_range(0, BLOCK_D, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        q = load_columns(q_rows, columns, inside, PLAN.head_dim)
        if PLAN.has_table or PLAN.hides_both_ends:
            k = load_columns(first_rows, columns, visible > 0, PLAN.head_dim)
        else:  # first_rows is one pointer: the first key is the same for all rows
            k = tl.load(first_rows + columns, mask=columns < width, other=0.0).to(tl.float32)[None, :]
        on_first += tl.sum(q * k, 1)
        k = tl.load(shared_row + columns, mask=columns < width, other=0.0).to(tl.float32)[None, :]
        on_shared += tl.sum(q * k, 1)
        squares += tl.sum(q * q, 1)
    return on_first, on_shared, squares


@triton.jit
def _weight_on(products, m, place, lse, call, window, mask_ptr, PLAN: tl.constexpr):
    """Weight of each row on its key at `place`, from q.k; 0 where the row does not see it."""
    score, _, _ = cap_and_mask(products * call.scale, m, place, call, window, mask_ptr, PLAN, True)
    return tl.exp(score - lse)


@triton.jit(do_not_specialize=["num_places", "sequences", "first_new_key", "window"])
def fold_kernel(
    accumulator_ptr,
    rows,
    q,
    k,
    sink_ptr,
    table,
    index_ptr,
    context,
    control_ptr,
    call,
    num_places,
    sequences,
    first_new_key,
    window,
    PLAN: tl.constexpr,
):
    """Add a call to the accumulator (slots, fields, H), or to one of two, as `control` says.

    rows: pointers to `Core`. q, k: `Strided`, inner stride 1.
    num_places: rows of a (batch, head) that have statistics. sequences: how many the call adds, -1 for those of a
    pack. first_new_key: the keys before it were counted with an earlier call.
    """
    slot, head = tl.program_id(0), tl.program_id(1)
    slots, heads = tl.num_programs(0), call.heads
    num_queries, num_keys = call.num_queries, call.num_keys
    if control_ptr is not None:
        if is_off(control_ptr, STATISTICS):
            return
        if not is_off(control_ptr, EVALUATION):
            accumulator_ptr += slots * PLAN.num_fields * heads
    batch = call.num_bh // heads
    if slot >= batch * tl.cdiv(tl.maximum(num_queries, num_keys), PLAN.block):
        return
    q_ptr = q.ptr + head.to(tl.int64) * q.stride_h
    k_ptr = k.ptr + (head // PLAN.group).to(tl.int64) * k.stride_h
    infinity = float("inf")
    zeros = tl.full([PLAN.block], 0.0, tl.float64)
    nothing = tl.sum(zeros, 0)
    lows = tl.full([PLAN.block], -infinity, tl.float32)
    none = tl.full([PLAN.block], 0, tl.int32)
    finite_rows, broken_rows, left_out_rows, empty_rows, stray_rows = none, none, none, none, none
    broken_queries, broken_outs, broken_empty = none, none, none
    entropies, ranges, query_squares, rests = zeros, zeros, zeros, zeros
    # Sums over judged rows, which are taken block by block for the spread between blocks.
    judged_rows, ratios, weights = nothing, nothing, nothing
    sinks, traces, saturated_rows = nothing, nothing, nothing
    judged_blocks, ratio_blocks, weight_blocks = nothing, nothing, nothing
    sink_blocks, trace_blocks, saturated_blocks = nothing, nothing, nothing
    top_max, top_min, top_range, top_weight, top_ratio = lows, lows, lows, lows, lows
    top_low_weight, top_query = lows, -infinity
    histogram = tl.full([PLAN.bins], 0, tl.int32)
    offs = tl.arange(0, PLAN.block)
    sink = -infinity
    if PLAN.has_sinks:
        sink = tl.load(sink_ptr + head).to(tl.float32)

    # Tokens of no sequence have no part in the norms.
    query_end, key_end = num_queries, num_keys
    if PLAN.is_packed:
        _, key_end = load_bounds(call.bounds_ptr, num_keys - 1, num_keys)
        query_end = key_end
        sequences = tl.where(sequences < 0, load_num_sequences(call.bounds_ptr, num_keys), sequences)
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
        visible, first = _visible_keys(m, inside, table, table_ptr, call, window, PLAN)
        left_out = inside & (m >= query_end)
        if PLAN.has_padding:
            left = context.left_out_ptr + b * context.left_out_stride_b + m * context.left_out_stride_m
            left_out = left_out | (tl.load(left, mask=inside, other=0) != 0)
        broken_out = inside & False
        if PLAN.has_outputs:
            out_ptr = context.out_ptr + b * context.out_stride_b + head.to(tl.int64) * context.out_stride_h
            out = tl.load(out_ptr + m.to(tl.int64) * context.out_stride_m, mask=inside, other=0.0)
            broken_out = is_broken(out.to(tl.float32))
        shared = tl.load(context.shared_ptr + b * context.shared_stride_b + head * context.shared_stride_h)
        k_rows = k_ptr + b * k.stride_b
        first_rows = k_rows
        if PLAN.has_table or PLAN.hides_both_ends:
            first_rows += first.to(tl.int64) * k.stride_m
        q_rows = q_ptr + b * q.stride_b + m.to(tl.int64) * q.stride_m
        shared_row = k_rows + tl.maximum(shared, 0) * k.stride_m
        on_first, on_shared, squares = _products(
            q_rows, first_rows, shared_row, inside, visible, num_keys, PLAN
        )
        if not PLAN.is_sampled:
            broken_queries += is_broken(squares).to(tl.int32)
            squares = tl.where(left_out, 0.0, squares)
            query_squares += without_nan(squares)
            top_query = tl.maximum(top_query, largest(squares, inside))
        mask_ptr = mask_of_head(call, b, head, PLAN)
        place = none + tl.maximum(shared, 0).to(tl.int32)
        position = tl.maximum(m, 0)  # of a place without a row, so that no mask is read before its start
        weight_on = _weight_on(on_first, position, first, lse, call, window, mask_ptr, PLAN)
        on_other = _weight_on(on_shared, position, place, lse, call, window, mask_ptr, PLAN)
        weight_on = tl.maximum(weight_on, tl.where(shared >= 0, on_other, 0.0))
        learned = tl.exp(sink - lse)
        sink_mass = weight_on + learned
        rest = entropy + _log_of(weight_on) + _log_of(learned) + _log_of(1.0 - sink_mass)

        occupied = inside & (left_out == 0) & (visible > 0)
        finite = occupied & (is_broken(entropy + max_logit + min_logit) == 0)
        judged = finite & (visible >= PLAN.layout.judged_min_keys)
        ratio = entropy / tl.log(tl.maximum(visible, 2).to(tl.float32))
        weight = tl.exp(max_logit - lse)
        logit_range = max_logit - min_logit
        finite_rows += finite.to(tl.int32)
        broken_rows += (occupied & (finite == 0)).to(tl.int32)
        left_out_rows += (inside & left_out).to(tl.int32)
        empty_rows += (inside & (left_out == 0) & (visible == 0)).to(tl.int32)
        broken_outs += broken_out.to(tl.int32)
        broken_empty += (broken_out & (visible == 0)).to(tl.int32)
        entropies += tl.where(finite, entropy, 0.0)
        ranges += tl.where(finite, logit_range, 0.0)
        others = tl.log(tl.maximum(visible - 1, 2).to(tl.float32))
        rests += tl.where(judged, tl.maximum(rest, 0.0) / others, 0.0)
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
        stray_rows += (saturated & (sink_mass < 0.5)).to(tl.int32)
        top_max = tl.maximum(top_max, tl.where(finite, max_logit, -infinity))
        top_min = tl.maximum(top_min, tl.where(finite, -min_logit, -infinity))
        top_range = tl.maximum(top_range, tl.where(finite, logit_range, -infinity))
        top_weight = tl.maximum(top_weight, tl.where(judged, weight, -infinity))
        top_ratio = tl.maximum(top_ratio, tl.where(judged, -ratio, -infinity))
        top_low_weight = tl.maximum(top_low_weight, tl.where(finite, -weight, -infinity))
        # Rows that are not judged count in the last place, behind the bins.
        bins = tl.where(judged, ratio, 0.0) * PLAN.layout.bins
        bins = tl.minimum(tl.maximum(bins, 0.0), PLAN.layout.bins - 1.0).to(tl.int32)
        histogram += tl.histogram(tl.where(judged, bins, PLAN.bins - 1), PLAN.bins)

    query_square = tl.sum(query_squares, 0)
    broken_query = tl.sum(broken_queries, 0)
    if PLAN.is_sampled:
        query_square, top_query, broken_query = lengths(
            q_ptr,
            q,
            context.left_out_ptr,
            context.left_out_stride_b,
            context.left_out_stride_m,
            batch,
            num_queries,
            0,
            query_end,
            slot,
            slots,
            PLAN,
        )
    key_square, top_key, broken_key = lengths(
        k_ptr,
        k,
        context.hidden_ptr,
        context.hidden_stride_b,
        context.hidden_stride_n,
        batch,
        num_keys,
        first_new_key,
        key_end,
        slot,
        slots,
        PLAN,
    )
    broken_value = 0.0
    if PLAN.has_values:
        value_ptr = context.value_ptr + (head // PLAN.group).to(tl.int64) * context.value_stride_h
        broken_value += broken_values(
            value_ptr, context.value_stride_b, context.value_stride_n, batch, num_keys, slot, slots, PLAN
        )

    field = tl.arange(0, PLAN.width)
    sums = tl.full([PLAN.width], 0.0, tl.float64)
    sums = _put(sums, field, PLAN.layout.sums.rows, tl.sum(finite_rows, 0).to(tl.float64))
    sums = _put(sums, field, PLAN.layout.sums.judged_rows, judged_rows)
    sums = _put(sums, field, PLAN.layout.sums.left_out_rows, tl.sum(left_out_rows, 0).to(tl.float64))
    sums = _put(sums, field, PLAN.layout.sums.empty_rows, tl.sum(empty_rows, 0).to(tl.float64))
    sums = _put(sums, field, PLAN.layout.sums.nonfinite_rows, tl.sum(broken_rows, 0).to(tl.float64))
    sums = _put(sums, field, PLAN.layout.sums.entropy, tl.sum(entropies, 0))
    sums = _put(sums, field, PLAN.layout.sums.logit_range, tl.sum(ranges, 0))
    sums = _put(sums, field, PLAN.layout.sums.normalized_entropy, ratios)
    sums = _put(sums, field, PLAN.layout.sums.max_weight, weights)
    sums = _put(sums, field, PLAN.layout.sums.sink_mass, sinks)
    sums = _put(sums, field, PLAN.layout.sums.rest_entropy, tl.sum(rests, 0))
    sums = _put(sums, field, PLAN.layout.sums.jacobian_trace_bound, traces)
    sums = _put(sums, field, PLAN.layout.sums.saturated_rows, saturated_rows)
    sums = _put(sums, field, PLAN.layout.sums.stray_rows, tl.sum(stray_rows, 0).to(tl.float64))
    sums = _put(sums, field, PLAN.layout.sums.judged_blocks, judged_blocks)
    sums = _put(sums, field, PLAN.layout.sums.normalized_entropy_blocks, ratio_blocks)
    sums = _put(sums, field, PLAN.layout.sums.max_weight_blocks, weight_blocks)
    sums = _put(sums, field, PLAN.layout.sums.sink_mass_blocks, sink_blocks)
    sums = _put(sums, field, PLAN.layout.sums.jacobian_trace_bound_blocks, trace_blocks)
    sums = _put(sums, field, PLAN.layout.sums.saturated_rows_blocks, saturated_blocks)
    begun = tl.where(slot == 0, sequences, 0).to(tl.float64)
    sums = _put(sums, field, PLAN.layout.sums.sequences, begun)
    sums = _put(sums, field, PLAN.layout.sums.query_square, query_square)
    sums = _put(sums, field, PLAN.layout.sums.key_square, key_square)
    sums = _put(sums, field, PLAN.layout.sums.nonfinite_query, broken_query.to(tl.float64))
    sums = _put(sums, field, PLAN.layout.sums.nonfinite_key, broken_key.to(tl.float64))
    sums = _put(sums, field, PLAN.layout.sums.nonfinite_value, broken_value)
    sums = _put(sums, field, PLAN.layout.sums.nonfinite_out, tl.sum(broken_outs, 0).to(tl.float64))
    sums = _put(sums, field, PLAN.layout.sums.nonfinite_empty, tl.sum(broken_empty, 0).to(tl.float64))
    tops = tl.full([PLAN.width], -infinity, tl.float32)
    tops = _put(tops, field, PLAN.layout.maxima.max_logit, tl.max(top_max, 0))
    tops = _put(tops, field, PLAN.layout.maxima.neg_min_logit, tl.max(top_min, 0))
    tops = _put(tops, field, PLAN.layout.maxima.logit_range, tl.max(top_range, 0))
    tops = _put(tops, field, PLAN.layout.maxima.max_weight, tl.max(top_weight, 0))
    tops = _put(tops, field, PLAN.layout.maxima.neg_normalized_entropy, tl.max(top_ratio, 0))
    tops = _put(tops, field, PLAN.layout.maxima.neg_max_weight, tl.max(top_low_weight, 0))
    tops = _put(tops, field, PLAN.layout.maxima.query_square, call.scale * call.scale * top_query)
    tops = _put(tops, field, PLAN.layout.maxima.key_square, top_key)
    tops = _put(tops, field, PLAN.layout.maxima.num_keys, num_keys * 1.0)
    kind = 2.0 if PLAN.has_softcap or PLAN.has_sinks else 1.0 if PLAN.has_bias else 0.0
    tops = _put(tops, field, PLAN.layout.maxima.score_kind, kind)
    pointers = accumulator_ptr + (slot * PLAN.num_fields + field) * heads + head
    before = tl.load(pointers, mask=field < PLAN.num_fields, other=0.0)
    after = tl.where(field < PLAN.num_sums, before + sums, tl.maximum(before, tops.to(tl.float64)))
    counted = (field >= PLAN.layout.histogram) & (field < PLAN.num_sums)
    tl.store(pointers, after, mask=(field < PLAN.num_fields) & (counted == 0))
    bins = tl.arange(0, PLAN.bins)
    pointers = accumulator_ptr + (slot * PLAN.num_fields + PLAN.layout.histogram + bins) * heads + head
    before = tl.load(pointers, mask=bins < PLAN.layout.bins, other=0.0)
    tl.store(pointers, before + histogram.to(tl.float64), mask=bins < PLAN.layout.bins)
