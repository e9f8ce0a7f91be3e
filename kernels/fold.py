"""Row statistics to head statistics on the device: `stats.fold_rows` in one launch, no atomics."""

import triton
import triton.language as tl

from ..sampling import BLOCK_ROWS
from ..stats import (
    DEAD_ENTROPY_RATIO,
    HISTOGRAM_BINS,
    JUDGED_MIN_KEYS,
    MAX_FIELDS,
    NUM_SUMS,
    SUM_FIELDS,
)

_NUM_SUM_FIELDS = tl.constexpr(len(SUM_FIELDS))
_NUM_SUMS = tl.constexpr(NUM_SUMS)
_BINS = tl.constexpr(HISTOGRAM_BINS)
_JUDGED_MIN_KEYS = tl.constexpr(JUDGED_MIN_KEYS)
_DEAD = tl.constexpr(DEAD_ENTROPY_RATIO)
_ROWS = tl.constexpr(BLOCK_ROWS)


@triton.jit
def _add(accumulator_ptr, field, heads, head, values):
    pointer = accumulator_ptr + field * heads + head
    tl.store(pointer, tl.load(pointer) + tl.sum(values, 0))


@triton.jit
def _of_blocks(values, judged, BLOCK: tl.constexpr):
    """Sums over the judged rows of each block of a sample, fp64."""
    return tl.sum(tl.reshape(tl.where(judged, values, 0.0).to(tl.float64), (BLOCK // _ROWS, _ROWS)), 1)


@triton.jit
def _raise(accumulator_ptr, field, heads, head, number):
    pointer = accumulator_ptr + (_NUM_SUMS + field) * heads + head
    tl.store(pointer, tl.maximum(tl.load(pointer), number.to(tl.float64)))


@triton.jit
def _fold_kernel(
    accumulator_ptr,
    lse_ptr,
    entropy_ptr,
    max_ptr,
    min_ptr,
    visible_ptr,
    sink_ptr,
    query_norm_ptr,
    key_norm_ptr,
    stride_visible_b,
    stride_visible_h,
    stride_visible_m,
    batch,
    heads,
    num_queries,
    BLOCK: tl.constexpr,
):
    head = tl.program_id(0)
    infinity = float("inf")
    zeros = tl.zeros([BLOCK], tl.float64)
    lows = tl.full([BLOCK], -infinity, tl.float32)
    rows, judged_rows, broken_rows, entropies, ranges = zeros, zeros, zeros, zeros, zeros
    ratios, weights, sinks, traces, dead_rows = zeros, zeros, zeros, zeros, zeros
    top_max, top_min, top_range, top_weight, top_ratio = lows, lows, lows, lows, lows
    histogram = tl.zeros([2 * _BINS], tl.float64)
    none = tl.zeros([BLOCK // _ROWS], tl.float64)
    judged_blocks, ratio_blocks, weight_blocks, sink_blocks = none, none, none, none
    trace_blocks, dead_blocks = none, none
    for start in tl.range(0, batch * num_queries, BLOCK):
        index = start + tl.arange(0, BLOCK)
        b, m = index // num_queries, index % num_queries
        inside = index < batch * num_queries
        row = (b.to(tl.int64) * heads + head) * num_queries + m
        place = b.to(tl.int64) * stride_visible_b + head * stride_visible_h + m * stride_visible_m
        visible = tl.load(visible_ptr + place, mask=inside, other=0)
        lse = tl.load(lse_ptr + row, mask=inside, other=0.0)
        entropy = tl.load(entropy_ptr + row, mask=inside, other=0.0)
        max_logit = tl.load(max_ptr + row, mask=inside, other=0.0)
        min_logit = tl.load(min_ptr + row, mask=inside, other=0.0)
        sink_mass = tl.load(sink_ptr + row, mask=inside, other=0.0)
        # NaN and inf both fail "x - x == 0".
        spread = entropy + max_logit + min_logit
        finite = (visible > 0) & (spread - spread == 0.0)
        judged = finite & (visible >= _JUDGED_MIN_KEYS)
        ratio = entropy / tl.log(tl.maximum(visible, 2).to(tl.float32))
        weight = tl.exp(max_logit - lse)
        logit_range = max_logit - min_logit
        rows += tl.where(finite, 1.0, 0.0)
        judged_rows += tl.where(judged, 1.0, 0.0)
        broken_rows += tl.where((visible > 0) & (finite == 0), 1.0, 0.0)
        entropies += tl.where(finite, entropy, 0.0)
        ranges += tl.where(finite, logit_range, 0.0)
        ratios += tl.where(judged, ratio, 0.0)
        weights += tl.where(judged, weight, 0.0)
        sinks += tl.where(judged, sink_mass, 0.0)
        traces += tl.where(judged, 1.0 - weight * weight, 0.0)
        dead_rows += tl.where(judged & (ratio < _DEAD), 1.0, 0.0)
        block_rows = _of_blocks(1.0, judged, BLOCK)
        judged_blocks += tl.where(block_rows > 0.0, 1.0, 0.0)
        share = 1.0 / tl.maximum(block_rows, 1.0)
        block = _of_blocks(ratio, judged, BLOCK)
        ratio_blocks += block * block * share
        block = _of_blocks(weight, judged, BLOCK)
        weight_blocks += block * block * share
        block = _of_blocks(sink_mass, judged, BLOCK)
        sink_blocks += block * block * share
        block = _of_blocks(1.0 - weight * weight, judged, BLOCK)
        trace_blocks += block * block * share
        block = _of_blocks(1.0, judged & (ratio < _DEAD), BLOCK)
        dead_blocks += block * block * share
        top_max = tl.maximum(top_max, tl.where(finite, max_logit, -infinity))
        top_min = tl.maximum(top_min, tl.where(finite, -min_logit, -infinity))
        top_range = tl.maximum(top_range, tl.where(finite, logit_range, -infinity))
        top_weight = tl.maximum(top_weight, tl.where(judged, weight, -infinity))
        top_ratio = tl.maximum(top_ratio, tl.where(judged, -ratio, -infinity))
        bins = tl.minimum(tl.maximum(tl.where(judged, ratio, 0.0) * _BINS, 0.0), _BINS - 1.0).to(tl.int32)
        # Rows that are not judged go to the upper half, which nobody reads.
        histogram += tl.histogram(tl.where(judged, bins, 2 * _BINS - 1), 2 * _BINS).to(tl.float64)

    _add(accumulator_ptr, 0, heads, head, rows)
    _add(accumulator_ptr, 1, heads, head, judged_rows)
    _add(accumulator_ptr, 2, heads, head, broken_rows)
    _add(accumulator_ptr, 3, heads, head, entropies)
    _add(accumulator_ptr, 4, heads, head, ranges)
    _add(accumulator_ptr, 5, heads, head, ratios)
    _add(accumulator_ptr, 6, heads, head, weights)
    _add(accumulator_ptr, 7, heads, head, sinks)
    _add(accumulator_ptr, 8, heads, head, traces)
    _add(accumulator_ptr, 9, heads, head, dead_rows)
    _add(accumulator_ptr, 10, heads, head, judged_blocks)
    _add(accumulator_ptr, 11, heads, head, ratio_blocks)
    _add(accumulator_ptr, 12, heads, head, weight_blocks)
    _add(accumulator_ptr, 13, heads, head, sink_blocks)
    _add(accumulator_ptr, 14, heads, head, trace_blocks)
    _add(accumulator_ptr, 15, heads, head, dead_blocks)
    offs = tl.arange(0, 2 * _BINS)
    pointers = accumulator_ptr + (_NUM_SUM_FIELDS + offs) * heads + head
    tl.store(pointers, tl.load(pointers, mask=offs < _BINS, other=0.0) + histogram, mask=offs < _BINS)
    _raise(accumulator_ptr, 0, heads, head, tl.max(top_max, 0))
    _raise(accumulator_ptr, 1, heads, head, tl.max(top_min, 0))
    _raise(accumulator_ptr, 2, heads, head, tl.max(top_range, 0))
    _raise(accumulator_ptr, 3, heads, head, tl.max(top_weight, 0))
    _raise(accumulator_ptr, 4, heads, head, tl.max(top_ratio, 0))
    _raise(accumulator_ptr, 5, heads, head, tl.load(query_norm_ptr + head))
    _raise(accumulator_ptr, 6, heads, head, tl.load(key_norm_ptr + head))


# The stores above follow this order; a field added in one place only must not go unnoticed.
assert (len(SUM_FIELDS), len(MAX_FIELDS)) == (16, 7), "kernels/fold.py does not cover every field of stats.py"


def fold_rows(accumulator, rows, visible_keys, sink_mass, query_norm, key_norm):
    """Add one call's rows to `accumulator` (NUM_FIELDS, H) fp64 in place; see `stats.fold_rows`."""
    batch, heads, num_queries = rows.lse.shape
    fields = (rows.lse, rows.entropy, rows.max_logit, rows.min_logit)
    lse, entropy, max_logit, min_logit = (field.contiguous() for field in fields)
    visible = visible_keys.to(lse.device).expand(lse.shape)
    _fold_kernel[(heads,)](
        accumulator,
        lse,
        entropy,
        max_logit,
        min_logit,
        visible,
        sink_mass.contiguous(),
        query_norm.contiguous(),
        key_norm.contiguous(),
        *visible.stride(),
        batch,
        heads,
        num_queries,
        BLOCK=512,
        num_warps=8,
    )
