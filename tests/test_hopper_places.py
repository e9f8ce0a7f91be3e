"""Where the Hopper forward's blocks of a pack lie: every row in one block, which walks the tiles of its keys."""

import heapq
import random

import pytest
import torch
from cases import Case
from test_hopper_schedule import line_of
from test_hopper_spans import assert_span, drawn_window

from hnf_attention.reference import masks as reference

pytest.importorskip("triton", reason="Triton kernels need Linux")
import triton
import triton.language as tl

from hnf_attention.kernels.hopper.places import CHUNK, FIELDS, HEADER, Place, places_of
from hnf_attention.kernels.hopper.plan import BLOCK_M, BLOCK_N, WIDE_BLOCK_N
from hnf_attention.kernels.hopper.schedule import heads_together
from hnf_attention.kernels.hopper.spans import span_of_place
from hnf_attention.kernels.shared.packing import sequence_bounds
from hnf_attention.kernels.shared.plan import score_plan


@triton.jit
def _list_spans(
    spans_ptr,
    places_ptr,
    size,
    window,
    PLAN: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    SIZE: tl.constexpr,
):
    """Row i of spans (size, 4): that of row i of places (size, 4)."""
    index = tl.arange(0, SIZE)
    inside = index < size
    at = places_ptr + index * 4
    place = Place(
        tl.load(at, mask=inside, other=0),
        tl.load(at + 1, mask=inside, other=0),
        tl.load(at + 2, mask=inside, other=1),
        tl.load(at + 3, mask=inside, other=0),
    )
    span = span_of_place(place, window, PLAN, TILE, ROWS)
    for field in tl.static_range(4):
        tl.store(spans_ptr + index * 4 + field, span[field], mask=inside)


def found_places(seqlens, length, is_causal=True, window=None, tile=BLOCK_N):
    """(places, spans of them, bounds of all rows), by the kernels."""
    whole = Case(1, 1, 1, length, length, 1, 1, is_causal=is_causal, window_size=window, seqlens=(0, length))
    plan = score_plan(whole.options(*whole.tensors()))
    table, bounds = places_of(seqlens, length, plan, window, tile)
    count, taken = table[:HEADER].tolist()
    assert taken == 0
    places = table[HEADER : HEADER + FIELDS * count].view(count, FIELDS).contiguous()
    spans = torch.zeros(count, 4, dtype=torch.int32)
    size = triton.next_power_of_2(count)
    _list_spans[(1,)](spans, places, count, window or 0, plan, tile, BLOCK_M, size)
    return [Place(*place) for place in places.tolist()], spans.tolist(), bounds


def check_pack(case, tile=BLOCK_N, integers=torch.int32):
    length = case.num_keys
    seqlens = torch.tensor(case.seqlens, dtype=integers)
    places, spans, bounds = found_places(seqlens, length, case.is_causal, case.window_size, tile)
    assert torch.equal(bounds, sequence_bounds(seqlens, length))
    rows, keys = torch.arange(length)[:, None], torch.arange(length)[None, :]
    seen = reference.sees(rows, keys, length, case.options(*case.tensors()))
    covered = torch.zeros(length, dtype=torch.int64)
    for place, span in zip(places, spans, strict=True):
        end = min(place.start + BLOCK_M, place.length)
        rows = slice(place.origin + place.start, place.origin + end)
        covered[rows] += 1
        inside = slice(place.origin, place.origin + place.length)
        outside = seen[rows].clone()
        outside[:, inside] = False
        assert not outside.any()
        if not place.mixed:
            assert_span(span, seen[rows, inside], tile, case.is_causal)
            continue
        assert place.start == 0 and place.length <= BLOCK_M
        lo, full_lo, full_hi, hi = span
        assert (lo, hi) == (0, -(-place.length // tile)) or case.window_size is not None
        assert full_lo == full_hi == lo  # every tile is masked
        tiles = seen[rows, inside].any(0).nonzero().flatten() // tile
        assert len(tiles) == 0 or (lo <= tiles.min() and tiles.max() < hi)
    assert torch.equal(covered, torch.ones_like(covered))
    for begin in range(0, len(places), CHUNK):
        costs = [span[3] - span[0] for span in spans[begin : begin + CHUNK]]
        assert costs == sorted(costs, reverse=begin // CHUNK % 2 == 1)


def drawn_pack(draw, length):
    """Edges of sequences in `length` positions; some are empty, and the last positions may belong to none."""
    edges = [0]
    while edges[-1] < length and len(edges) < 40:
        edges.append(
            min(length, edges[-1] + draw.choice([0, 1, 5, 64, 128, 130, 256, draw.randrange(1, 700)]))
        )
    return tuple(edges if draw.random() < 0.5 else (*edges[:-1], length)) if len(edges) > 1 else (0, length)


PACKS = {
    "two sequences in a block, and none": Case(
        1, 1, 1, 700, 700, head_dim=1, value_dim=1, seqlens=(0, 60, 60, 130, 500, 650), is_causal=True
    ),
    "both sides of a window": Case(
        1, 1, 1, 300, 300, head_dim=1, value_dim=1, seqlens=(0, 120, 300), window_size=30
    ),
    "no sequence": Case(1, 1, 1, 150, 150, head_dim=1, value_dim=1, seqlens=(0,)),
}


@pytest.mark.parametrize(("name", "tile"), [*zip(PACKS, (BLOCK_N, WIDE_BLOCK_N, BLOCK_N))])
def test_places_of_packs(name, tile):
    check_pack(PACKS[name], tile, torch.int64 if name == "no sequence" else torch.int32)


@pytest.mark.slow
@pytest.mark.parametrize("count", [5, pytest.param(60, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("is_windowed", [False, True])
@pytest.mark.parametrize("is_causal", [False, True])
def test_places_of_drawn_packs(is_causal, is_windowed, count):
    draw = random.Random(count)
    for _ in range(count):
        length = draw.choice([129, 256, 1000, draw.randrange(1, 2500)])
        window = drawn_window(draw, length) if is_windowed else None
        pack = drawn_pack(draw, length)
        case = Case(
            1,
            1,
            1,
            length,
            length,
            head_dim=1,
            value_dim=1,
            is_causal=is_causal,
            window_size=window,
            seqlens=pack,
        )
        check_pack(case, draw.choice((BLOCK_N, WIDE_BLOCK_N)))


@pytest.mark.slow
def test_many_sequences_take_several_turns_of_the_kernel():
    edges = tuple(range(0, 3001, 5))
    check_pack(Case(1, 1, 1, 3010, 3010, head_dim=1, value_dim=1, seqlens=edges, is_causal=True))


@pytest.mark.parametrize("edges", [(0, 300, 100, 250, 200), (90, 100), (0, -5, 1000), (0, 400, 400, 0)])
def test_wrong_lengths_leave_no_row_out(edges):
    """Lengths on a device are never read by the host. Whatever they are, blocks cover all rows and stay inside."""
    places, spans, _ = found_places(torch.tensor(edges, dtype=torch.int32), 350)
    covered = torch.zeros(350, dtype=torch.int64)
    for place, (lo, _, _, hi) in zip(places, spans, strict=True):
        assert 0 <= place.start < place.length and 0 <= place.origin <= 350 - place.length
        assert 0 <= lo < hi <= 3
        covered[place.origin + place.start : place.origin + min(place.start + BLOCK_M, place.length)] += 1
    assert torch.equal(covered, torch.ones_like(covered))


def greedy(costs, programs):
    """The longest share if each block goes to the program that is free first, in this order."""
    loads = [0] * programs
    for cost in costs:
        heapq.heapreplace(loads, loads[0] + cost)
    return max(loads)


@pytest.mark.slow
@pytest.mark.parametrize("num_heads", [8, 16, 32])
@pytest.mark.parametrize("mean", [500, 2000, 5000])
def test_programs_are_evenly_loaded_by_a_pack(mean, num_heads):
    """The longest share is at most 2% longer than that of a choice that begins with the longest blocks."""
    draw = random.Random(mean)
    edges, length = [0], 32768
    while edges[-1] < length:
        edges.append(min(length, edges[-1] + draw.randrange(64, 2 * mean)))
    _, spans, _ = found_places(torch.tensor(edges, dtype=torch.int32), length)
    costs = [span[3] - span[0] + 2 for span in spans]
    for cached in (4, 8):  # `host._cached_heads` gives no fewer, at D = 256
        together = heads_together(num_heads, length // BLOCK_M, True, cached)
        line = [costs[block] for _, block in line_of(num_heads, len(costs), together)]
        assert greedy(line, 132) <= 1.02 * greedy(sorted(line, reverse=True), 132)
