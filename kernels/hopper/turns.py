"""What a program of the sm_90 forward computes in one turn: a block of queries, and the tiles of keys it walks.

The producer knows it, from a formula (`schedule`) or, for the blocks of a pack, whose costs differ too much for one,
from a counter that all programs share. It tells the consumers by a slot in shared memory, written before the turn's
first keys are announced. The ring of SLOTS is longer than that of the keys, so no slot is written before it was read:
when the producer comes to a turn, consumers have left all turns but the last `Plan.stages`.
"""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from . import places, records, spans
from .channel import place_in_ring
from .names import barrier
from .places import Place
from .plan import HALF_ROWS
from .records import Record
from .schedule import block_at, turns_of_program
from .schedule import block_of_turn as place_of_turn
from .spans import Span

SLOTS = gl.constexpr(8)
num_turns = gluon.jit(turns_of_program.fn)
_load_record = gluon.jit(records.load_record.fn)
_load_place = gluon.jit(places.load_place.fn)
_block_of_turn = gluon.jit(place_of_turn.fn)
_block_at = gluon.jit(block_at.fn)
_row_bounds = gluon.jit(spans.row_bounds.fn)
_span_of_rows = gluon.jit(spans.span_of_rows.fn)
_span_of_place = gluon.jit(spans.span_of_place.fn)
_FIELDS = gl.constexpr(records.FIELDS)
_SLOT = gl.constexpr(10)  # numbers of a slot, at most


class Block(NamedTuple):
    """A block of queries. Its rows and keys are counted from the origin of `extent_of`."""

    batch: Any  # below 0 in the slot behind the last turn
    head: Any
    start: Any  # its first row
    record: Any  # what a table tells about it: a `Place`, a `Record`, or ()


@gluon.jit
def extent_of(block, sizes, PLAN: gl.constexpr):
    """Where a block's rows and keys are counted from, and how many of both there are."""
    if PLAN.is_pack:
        return block.record.origin, block.record.length, block.record.length
    else:
        return 0, sizes[2], sizes[3]


@gluon.jit
def new_slots(unit):
    """The slots, and behind them the unit of the call (see `Plan.shared_unit`)."""
    slots = gl.allocate_shared_memory(
        gl.int32, [SLOTS * _SLOT + 1, 1], gl.SwizzledSharedLayout(1, 1, 1, order=[0])
    )
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    slots.index(SLOTS * _SLOT).store(gl.full([1], unit, gl.float32, LAYOUT).to(gl.int32, bitcast=True))
    return slots


@gluon.jit
def _write_number(slots, turn, FIELD: gl.constexpr, number):
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    slots.index(place_in_ring(turn, SLOTS) * _SLOT + FIELD).store(gl.full([1], 0, gl.int32, LAYOUT) + number)


@gluon.jit
def write_slot(slots, turn, block, PLAN: gl.constexpr):
    """Tell the consumers what a turn computes, before the barrier is told that they wait at."""
    _write_number(slots, turn, 0, block.batch)
    _write_number(slots, turn, 1, block.head)
    _write_number(slots, turn, 2, block.start)
    record = block.record
    if PLAN.is_pack:
        _write_number(slots, turn, 3, record.origin)
        _write_number(slots, turn, 4, record.length)
        _write_number(slots, turn, 5, record.mixed)
    elif PLAN.is_masked:
        for field in gl.static_range(4):
            _write_number(slots, turn, 3 + field, record.span[field])
        _write_number(slots, turn, 7, record.refused)
        _write_number(slots, turn, 8, record.row)
        _write_number(slots, turn, 9, record.part)
    barrier()


@gluon.jit
def write_end(slots, turn):
    """Tell the consumers that there is no such turn."""
    _write_number(slots, turn, 0, -1)
    barrier()


@gluon.jit
def _read(slots, place):
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    return gl.max(slots.index(place).load(LAYOUT), 0)


@gluon.jit
def _read_number(slots, turn, FIELD: gl.constexpr):
    return _read(slots, place_in_ring(turn, SLOTS) * _SLOT + FIELD)


@gluon.jit
def read_unit(slots):
    """Score units to log2 units."""
    return _read(slots, SLOTS * _SLOT).to(gl.float32, bitcast=True)


@gluon.jit
def read_slot(slots, turn, PLAN: gl.constexpr):
    """The `Block` of a turn."""
    batch = _read_number(slots, turn, 0)
    head = _read_number(slots, turn, 1)
    start = _read_number(slots, turn, 2)
    record = ()
    if PLAN.is_pack:
        origin = _read_number(slots, turn, 3)
        length = _read_number(slots, turn, 4)
        record = Place(origin, start, length, _read_number(slots, turn, 5))
    elif PLAN.is_masked:
        lo = _read_number(slots, turn, 3)
        full_lo = _read_number(slots, turn, 4)
        full_hi = _read_number(slots, turn, 5)
        span = Span(lo, full_lo, full_hi, _read_number(slots, turn, 6))
        refused = _read_number(slots, turn, 7)
        row = _read_number(slots, turn, 8)
        record = Record(start, span, refused, row, _read_number(slots, turn, 9))
    return Block(batch, head, start, record)


@gluon.jit
def next_place(table_ptr):
    """The next place in the line that no program has taken."""
    return gl.num_programs(0) + gl.atomic_add(table_ptr + 1, 1, sem="relaxed")


@gluon.jit
def block_at_place(number, sizes, table_ptr):
    """The `Block` of a pack at a place in the line, which may lie behind its end."""
    order = sizes[5]
    places_in_line = order.num_heads * order.num_blocks
    head, index = _block_at(gl.minimum(number, places_in_line - 1), order)
    place = _load_place(table_ptr, index)
    return Block(gl.where(number < places_in_line, 0, -1), head, place.start, place)


@gluon.jit
def span_of_block(block, sizes, PLAN: gl.constexpr):
    """The tiles of keys of a block of queries."""
    window = sizes[4]
    _origin, num_queries, num_keys = extent_of(block, sizes, PLAN)
    if PLAN.intervals:
        if PLAN.is_masked:
            lo, full_lo, full_hi, hi = block.record.span
        elif PLAN.is_pack:
            lo, full_lo, full_hi, hi = _span_of_place(block.record, window, PLAN, PLAN.block_n, 2 * HALF_ROWS)
        else:
            last = gl.minimum(block.start + 2 * HALF_ROWS, num_queries) - 1
            every = (0, num_keys)
            lo, full_lo, full_hi, hi = _span_of_rows(
                block.start, last, every, every, num_keys, window, PLAN, PLAN.block_n
            )
        return Span(lo, full_lo, full_hi, hi)
    else:
        end = num_keys
        if PLAN.is_causal:
            end = gl.minimum(end, block.start + 2 * HALF_ROWS)
        hi = gl.cdiv(end, PLAN.block_n)
        return Span(0, 0, hi - 1, hi)


@gluon.jit
def block_of_turn(turn, sizes, table_ptr, PLAN: gl.constexpr):
    """The `Block` that this program computes in one turn, by the formula."""
    heads, order = sizes[0], sizes[5]
    bh, index = _block_of_turn(turn, order)
    start = index * (2 * HALF_ROWS)
    record = ()
    if PLAN.is_masked:
        record = _load_record(table_ptr + (index + bh * order.num_blocks) * _FIELDS)
        start = record.block * (2 * HALF_ROWS)
    return Block(bh // heads, bh % heads, start, record)


@gluon.jit
def bounds_of(offs_m, sizes, bounds_ptr, block, PLAN: gl.constexpr):
    """The first key that each row sees, and how many keys it sees."""
    window = sizes[4]
    record = block.record
    origin, num_queries, num_keys = extent_of(block, sizes, PLAN)
    first = gl.full([HALF_ROWS], 0, gl.int32, offs_m.type.layout)
    end = first + num_keys
    if PLAN.table:
        rows = gl.minimum(offs_m, num_queries - 1)
        if PLAN.is_pack:
            if record.mixed > 0:
                pointers = bounds_ptr + origin + rows
                first = gl.load(pointers) - origin
                end = gl.load(pointers + sizes[3]) - origin
        else:
            pointers = bounds_ptr + record.row + rows
            first = gl.load(pointers)
            end = gl.load(pointers + record.part)
    first, end = _row_bounds(offs_m, first, end, window, PLAN)
    return first, gl.maximum(end - first, 0)
