"""Where the blocks of queries of a pack lie, for the sm_90 forward.

Blocks begin where sequences begin, and so do the tiles of keys. A pack then costs what its sequences cost one by one:
a causal block has one masked tile. Sequences that lie within the same BLOCK_M positions share a block.

Positions behind the last sequence have blocks of their own: such rows see no key.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ..shared.launch import launch
from ..shared.packing import BLOCK, LARGEST, clamp, count_at_most, new_bounds, search_width, store_bounds
from ..shared.plan import ScorePlan
from ..shared.tiles import ceil_div
from .plan import BLOCK_M
from .records import table_plan
from .spans import span_of_place

CHUNK = 64  # blocks that are sorted together; a head's keys of so many fit the L2 cache
HEADER = 2  # numbers before the places: how many there are, and a counter of those that are taken
FIELDS = 4  # of a place
_MOST_SORTERS = 32
_HEADER, _FIELDS, _CHUNK = tl.constexpr(HEADER), tl.constexpr(FIELDS), tl.constexpr(CHUNK)
_ROWS = tl.constexpr(BLOCK_M)
_BLOCK = tl.constexpr(BLOCK)


class Place(NamedTuple):
    """Of one block of queries; all its rows and keys are counted from `origin`."""

    origin: Any  # position in the pack of the first key of the block's first row
    start: Any  # its first row
    length: Any  # where its rows and keys end
    mixed: Any  # 1 if its rows are of several sequences, or of none: they need bounds


@triton.jit
def load_place(places_ptr, index):
    pointer = places_ptr + _HEADER + index * _FIELDS
    return Place(tl.load(pointer), tl.load(pointer + 1), tl.load(pointer + 2), tl.load(pointer + 3))


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def _edge(seqlens_ptr, index, num_sequences, length):
    """Where sequence `index` begins. The positions behind the last one count as a sequence."""
    inner = (index > 0) & (index <= num_sequences)
    edge = clamp(tl.load(seqlens_ptr + index, mask=inner, other=0), length)
    return tl.where(index > num_sequences, length, edge)


@triton.jit
def _count_blocks(begins_ptr, firsts_ptr, seqlens_ptr, num_sequences, length):
    """Store where each sequence begins and which block is its first; returns how many blocks there are.

    Edges that decrease count as those before them, so that every position is in one sequence.
    """
    inner = tl.arange(0, _BLOCK)
    blocks = 0
    top = 0
    latest = -1
    for start in tl.range(0, num_sequences + 1, _BLOCK):
        index = start + inner
        before = _edge(seqlens_ptr, index - 1, num_sequences, length)
        before = tl.maximum(tl.associative_scan(before, 0, _larger), top)
        begin = tl.maximum(before, _edge(seqlens_ptr, index, num_sequences, length))
        end = tl.maximum(begin, _edge(seqlens_ptr, index + 1, num_sequences, length))
        # Where the last sequence before this one begins, of those that hold a position.
        last = tl.maximum(tl.associative_scan(tl.where(before < begin, before, -1), 0, _larger), latest)
        window = begin // _ROWS * _ROWS
        shared = end <= window + _ROWS
        count = tl.where(shared, (last < window).to(tl.int32), (end - begin + _ROWS - 1) // _ROWS)
        count = tl.where((begin < end) & (index <= num_sequences), count, 0)
        tl.store(begins_ptr + index, begin, mask=index <= num_sequences)
        tl.store(firsts_ptr + index, blocks + tl.cumsum(count, 0) - count, mask=index <= num_sequences)
        blocks += tl.sum(count, 0)
        top = tl.max(begin, 0)
        latest = tl.max(last, 0)
    tl.store(begins_ptr + num_sequences + 1, length)
    return blocks


@triton.jit
def _place_of(block, begins_ptr, firsts_ptr, num_sequences, width, length):
    """The `Place` of a block, or of several."""
    index = count_at_most(firsts_ptr, num_sequences + 1, block, width) - 1
    begin, end = tl.load(begins_ptr + index), tl.load(begins_ptr + index + 1)
    rows = (block - tl.load(firsts_ptr + index)) * _ROWS
    window = begin // _ROWS * _ROWS
    shared = end <= window + _ROWS
    # Those that share a block end with the last of them.
    last = count_at_most(begins_ptr, num_sequences + 2, window + _ROWS, width) - 1
    until = tl.where(shared, tl.load(begins_ptr + last), end)
    # Rows without a key would walk the tiles before them for nothing.
    lonely = (index == num_sequences) & (shared == 0)
    origin = tl.where(lonely, begin + rows, begin)
    until = tl.where(lonely, tl.minimum(origin + _ROWS, end), until)
    mixed = (until > end) | (index == num_sequences)
    return Place(origin, tl.where(lonely, 0, rows), until - origin, mixed.to(tl.int32))


@triton.jit(do_not_specialize=["num_sequences", "width", "length", "window", "capacity", "sorters"])
def _places_kernel(
    bounds_ptr,
    places_ptr,
    seqlens_ptr,
    num_sequences,
    width,
    length,
    window,
    capacity,
    sorters,
    PLAN: tl.constexpr,
):
    """The first programs store the places, sorted by their tiles in chunks; the others store the bounds of rows.

    Costs rise along every second chunk and fall along the others, so that neighbours cost about the same everywhere.
    Each sorter counts all blocks: programs cannot wait for each other, and all write the same numbers.
    """
    if tl.program_id(0) >= sorters:
        store_bounds(
            bounds_ptr, seqlens_ptr, tl.program_id(0) - sorters, num_sequences, width, length, _BLOCK
        )
    else:
        begins_ptr = places_ptr + _HEADER + capacity * _FIELDS
        firsts_ptr = begins_ptr + num_sequences + 2
        blocks = _count_blocks(begins_ptr, firsts_ptr, seqlens_ptr, num_sequences, length)
        tl.store(places_ptr, blocks)
        tl.store(places_ptr + 1, 0)
        tl.debug_barrier()  # what some threads stored, others read
        inner = tl.arange(0, _CHUNK)
        for begin in tl.range(tl.program_id(0) * _CHUNK, blocks, sorters * _CHUNK):
            block = begin + inner
            inside = block < blocks
            place = _place_of(
                tl.minimum(block, blocks - 1), begins_ptr, firsts_ptr, num_sequences, width, length
            )
            span = span_of_place(place, window, PLAN, PLAN.block_n, _ROWS)
            cost = tl.where(inside, span.hi - span.lo, LARGEST)
            before = (cost[None, :] < cost[:, None]) | (
                (cost[None, :] == cost[:, None]) & (inner[None, :] < inner[:, None])
            )
            rank = tl.sum(before.to(tl.int32), 1)
            if begin // _CHUNK % 2 == 1:
                rank = tl.minimum(blocks - begin, _CHUNK) - 1 - rank
            pointers = places_ptr + _HEADER + (begin + rank) * _FIELDS
            tl.store(pointers, place.origin, mask=inside)
            tl.store(pointers + 1, place.start, mask=inside)
            tl.store(pointers + 2, place.length, mask=inside)
            tl.store(pointers + 3, place.mixed, mask=inside)


def places_of(
    seqlens: torch.Tensor,
    length: int,
    scores: ScorePlan,
    window: int | None,
    block_n: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(places, bounds) of a pack of so many positions, computed on the device in one launch.

    places: int32; how many blocks there are, a counter for the programs of the forward, then a `Place` a block. There
    are at least length / BLOCK_M. bounds: of `packing.sequence_bounds`. scores: of the call.
    block_n: keys of a tile.
    """
    num_sequences = len(seqlens) - 1
    capacity = ceil_div(length, BLOCK_M) + num_sequences + 1
    sorters = min(ceil_div(capacity, CHUNK), _MOST_SORTERS)
    bounds = new_bounds(seqlens, length)
    places = torch.empty(
        HEADER + FIELDS * capacity + 2 * num_sequences + 3, dtype=torch.int32, device=seqlens.device
    )
    launch(
        _places_kernel,
        (sorters + ceil_div(length, BLOCK), 1, 1),
        table_plan(scores, block_n),
        seqlens.device,
        {"bounds_ptr": bounds, "places_ptr": places, "seqlens_ptr": seqlens.contiguous()},
        {
            "num_sequences": num_sequences,
            "width": search_width(num_sequences + 2),
            "length": length,
            "window": window or 0,
            "capacity": capacity,
            "sorters": sorters,
        },
        num_warps=4,
    )
    return places, bounds
