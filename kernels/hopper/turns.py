"""What a program of the sm_90 forward computes in one turn: a block of queries, and the tiles of keys it walks."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from . import records, spans
from .plan import HALF_ROWS
from .schedule import block_of_turn, turns_of_program
from .spans import Span

FIELDS = gl.constexpr(records.FIELDS)
load_record = gluon.jit(records.load_record.fn)
num_turns = gluon.jit(turns_of_program.fn)
_block_of_turn = gluon.jit(block_of_turn.fn)
_row_bounds = gluon.jit(spans.row_bounds.fn)
_span_of_rows = gluon.jit(spans.span_of_rows.fn)


@gluon.jit
def span_of_block(start_m, record, sizes, PLAN: gl.constexpr):
    """The tiles of keys of the block of queries that begins at start_m."""
    _heads, _group, num_queries, num_keys, window, _order = sizes
    if PLAN.intervals:
        if PLAN.table:
            lo, full_lo, full_hi, hi = record.span
        else:
            last = gl.minimum(start_m + 2 * HALF_ROWS, num_queries) - 1
            every = (0, num_keys)
            lo, full_lo, full_hi, hi = _span_of_rows(
                start_m, last, every, every, num_keys, window, PLAN, PLAN.block_n
            )
        if not PLAN.many_last:
            # So it is, unless a pack's lengths are wrong. The producer must bring as many tiles as are awaited.
            full_hi = hi - 1
        return Span(lo, full_lo, full_hi, hi)
    else:
        end = num_keys
        if PLAN.is_causal:
            end = gl.minimum(end, start_m + 2 * HALF_ROWS)
        hi = gl.cdiv(end, PLAN.block_n)
        return Span(0, 0, hi - 1, hi)


@gluon.jit
def turn_of(turn, sizes, records_ptr, PLAN: gl.constexpr):
    """What this program computes in one turn: batch, head, key head, first query, `Span` of key tiles; and the place
    of its record and the `Record`, if there are any."""
    heads, group, _num_queries, _num_keys, _window, order = sizes
    bh, block = _block_of_turn(turn, order)
    index = block
    record = ()
    if PLAN.table:
        if PLAN.is_masked:
            index += bh * order.num_blocks
        record = load_record(records_ptr + index * FIELDS)
        block = record.block
    start_m = block * (2 * HALF_ROWS)
    span = span_of_block(start_m, record, sizes, PLAN)
    return bh // heads, bh % heads, bh % heads // group, start_m, span, index, record


@gluon.jit
def bounds_of(offs_m, sizes, bounds_ptr, record, PLAN: gl.constexpr):
    """The first key that each row sees, and how many keys it sees."""
    _heads, _group, num_queries, num_keys, window, _order = sizes
    first = gl.full([HALF_ROWS], 0, gl.int32, offs_m.type.layout)
    end = first + num_keys
    if PLAN.table:
        pointers = bounds_ptr + record.row + gl.minimum(offs_m, num_queries - 1)
        first = gl.load(pointers)
        end = gl.load(pointers + record.part)
    first, end = _row_bounds(offs_m, first, end, window, PLAN)
    return first, gl.maximum(end - first, 0)
