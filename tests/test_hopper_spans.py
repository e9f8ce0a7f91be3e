"""Which tiles of keys the Hopper forward walks for each block of queries, against the mask of every row and key."""

import random

import pytest
import torch
from cases import Case

pytest.importorskip("triton", reason="Triton kernels need Linux")
import triton
import triton.language as tl

from hnf_attention.kernels.hopper import records
from hnf_attention.kernels.hopper.plan import BLOCK_M, BLOCK_N, WIDE_BLOCK_N
from hnf_attention.kernels.hopper.spans import span_of_rows
from hnf_attention.kernels.shared.plan import score_plan


@triton.jit
def _list_spans(spans_ptr, numbers_ptr, size, PLAN: tl.constexpr, TILE: tl.constexpr, SIZE: tl.constexpr):
    """Row i of spans (size, 4): that of row i of numbers (size, 5): first row, last row, keys, window."""
    index = tl.arange(0, SIZE)
    inside = index < size
    at = numbers_ptr + index * 4
    start, last = tl.load(at, mask=inside, other=0), tl.load(at + 1, mask=inside, other=0)
    num_keys, window = tl.load(at + 2, mask=inside, other=1), tl.load(at + 3, mask=inside, other=1)
    every = (tl.zeros([SIZE], tl.int32), num_keys)
    span = span_of_rows(start, last, every, every, num_keys, window, PLAN, TILE)
    for field in tl.static_range(4):
        tl.store(spans_ptr + index * 4 + field, span[field], mask=inside)


def spans_of(numbers, plan, tile=BLOCK_N):
    """The spans of blocks by the kernel's own functions, all in one launch."""
    spans = torch.zeros(len(numbers), 4, dtype=torch.int32)
    size = triton.next_power_of_2(len(numbers))
    _list_spans[(1,)](spans, torch.tensor(numbers, dtype=torch.int32), len(numbers), plan, tile, size)
    return [tuple(span) for span in spans.tolist()]


def wanted_span(seen, tile):
    """The span of a block of rows that see the keys `seen` (rows, N): tiles with a key, and tiles that are whole.

    Without a visible key: None.
    """
    num_keys = seen.shape[1]
    if not seen.any():
        return None
    padding = -num_keys % tile
    tiles = torch.nn.functional.pad(seen, (0, padding)).unflatten(1, (-1, tile))
    some = tiles.any(2).any(0).nonzero().flatten().tolist()
    whole = tiles.all(2).all(0).nonzero().flatten().tolist()
    lo, hi = some[0], some[-1] + 1
    return lo, [place for place in whole if place < hi - 1], hi  # the last tile is masked in any case


def assert_span(found, seen, tile=BLOCK_N, one_last=False):
    """one_last: whether the kernel takes the last tile alone for one that may be masked on the right."""
    lo, full_lo, full_hi, hi = found
    assert 0 <= lo <= full_lo <= full_hi < hi
    assert full_hi == hi - 1 or tile != BLOCK_N or not one_last
    wanted = wanted_span(seen, tile)
    if wanted is None:
        assert hi == lo + 1
    else:
        assert (lo, list(range(full_lo, full_hi)), hi) == wanted


def rows_seen(first, last, num_keys, is_causal, window):
    rows, keys = torch.arange(first, last + 1)[:, None], torch.arange(num_keys)[None, :]
    seen = torch.ones(len(rows), num_keys, dtype=torch.bool)
    if is_causal:
        seen &= keys <= rows
    if window is not None:
        seen &= (rows - keys < window) & (keys - rows < window)
    return seen


def drawn_window(draw, length):
    return draw.choice([1, 2, 127, 128, 129, 130, 255, 256, 257, draw.randrange(1, length + 1)])


@pytest.mark.parametrize("count", [40, pytest.param(2000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("tile", [BLOCK_N, WIDE_BLOCK_N])
def test_windows_walk_the_tiles_of_their_keys(tile, is_causal, count):
    draw = random.Random(count)
    numbers = []
    for _ in range(count):
        num_queries, num_keys = (
            draw.choice([1, 100, 128, 256, 384, 600, draw.randrange(1, 1500)]) for _ in "qk"
        )
        start = draw.randrange(-(-num_queries // BLOCK_M)) * BLOCK_M
        last = min(start + BLOCK_M, num_queries) - 1
        numbers.append((start, last, num_keys, drawn_window(draw, num_queries + num_keys)))
    plan = score_plan(Case(is_causal=is_causal, window_size=3).options(*Case().tensors()))
    for (start, last, num_keys, window), found in zip(numbers, spans_of(numbers, plan, tile), strict=True):
        assert_span(found, rows_seen(start, last, num_keys, is_causal, window), tile, is_causal)


def interval_mask(draw, batch, heads, rows, num_keys, holes=()):
    """A boolean mask of one interval a row, some of them empty; rows of `holes` have a hole."""
    mask = torch.zeros(batch, heads, rows, num_keys, dtype=torch.bool)
    for row in mask.flatten(0, 2):
        first = draw.randrange(num_keys)
        row[first : first + draw.choice([0, 1, 150, num_keys])] = True
    for row in holes:
        mask[-1, -1, row, :9] = True
        mask[-1, -1, row, 3] = False
    return mask


def check_mask(case, mask, holes, tile):
    tensors = case.tensors()
    q, k = tensors[:2]
    options = case.options(*tensors[:3], mask, None)
    batch, heads, num_queries, num_keys = case.batch, q.shape[1], case.num_queries, case.num_keys
    found, bounds = records.records_of((batch, heads, num_queries, num_keys), options, tile)
    blocks = -(-num_queries // BLOCK_M)
    by_positions = rows_seen(0, num_queries - 1, num_keys, case.is_causal, case.window_size)
    full = mask.expand(batch, heads, num_queries, num_keys) & by_positions
    for place, record in enumerate(found.tolist()):
        block, lo, full_lo, full_hi, hi, refused, row, part = record
        bh = place // blocks
        assert block == place % blocks
        rows = slice(block * BLOCK_M, (block + 1) * BLOCK_M)
        broken = [x for x in holes if rows.start <= x < rows.stop or mask.shape[2] == 1]
        of_holes = (mask.shape[0] == 1 or bh // heads == batch - 1) and (
            mask.shape[1] == 1 or bh % heads == heads - 1
        )
        assert refused == int(bool(broken) and of_holes)
        if refused:
            assert (full_lo, full_hi, hi) == (lo, lo, lo + 1)
            continue
        seen = full[bh // heads, bh % heads, rows]
        assert_span((lo, full_lo, full_hi, hi), seen, tile)
        for number, row_seen in enumerate(mask.expand(full.shape)[bh // heads, bh % heads, rows]):
            first, end = (bounds[row + rows.start + number + far].item() for far in (0, part))
            assert row_seen.nonzero().flatten().tolist() == list(range(first, end))


MASKS = {
    "padding": (Case(2, 1, 2, 140, 300, is_causal=True), (2, 1, 1), ()),
    "window": (Case(1, 1, 1, 20, 260, window_size=100), (1, 1, 20), (7,)),
    "a row of all heads": (Case(2, 1, 2, 130, 200), (2, 1, 1), (0,)),
    "rows": (Case(2, 2, 1, 135, 200, is_causal=True), (2, 1, 135), (130, 131)),
    "heads": (Case(1, 2, 1, 130, 1500), (1, 2, 130), (5,)),
    "window of heads": (Case(2, 2, 1, 130, 150, is_causal=True, window_size=40), (1, 2, 130), (128,)),
}


QUICK, EXHAUSTIVE = ("padding", "window"), ("rows", "window of heads")
MARKS = {name: () if name in QUICK else (pytest.mark.slow,) for name in MASKS}
MARKS |= {name: (pytest.mark.slow, pytest.mark.exhaustive) for name in EXHAUSTIVE}


@pytest.mark.parametrize("name", [pytest.param(name, marks=MARKS[name]) for name in MASKS])
def test_records_of_boolean_masks(name):
    case, shape, holes = MASKS[name]
    tile = WIDE_BLOCK_N if name == "window" else BLOCK_N
    check_mask(case, interval_mask(random.Random(5), *shape, case.num_keys, holes), holes, tile)
