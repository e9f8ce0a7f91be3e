"""Which keys the rows of a block see, where those of each row form one interval, and which tiles of keys it walks.

A row sees the keys [first, end). The tiles of a block of queries are walked from the last one to the first one: tiles
that are masked on the right, tiles that every row sees wholly ("bare"), tiles that are masked on the left. Plain
functions of numbers or of tensors: the sm_90 forward, the kernels that fill its tables, and the tests share them.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Span(NamedTuple):
    """Tiles [lo, hi) of one block of queries, lo <= full_lo <= full_hi < hi; those of [full_lo, full_hi) are bare."""

    lo: Any
    full_lo: Any
    full_hi: Any
    hi: Any


@triton.jit
def row_bounds(rows, first, end, window, PLAN: tl.constexpr):
    """The keys [first, end) that rows see, of those that a table leaves them (without one: 0 and all keys)."""
    if PLAN.is_causal:
        end = tl.minimum(end, rows + 1)
    if PLAN.is_windowed:
        first = tl.maximum(first, rows - window + 1)
        if not PLAN.is_causal:
            end = tl.minimum(end, rows + window)
    return first, end


@triton.jit
def span_of(least_first, last_first, least_end, last_end, num_keys, TILE: tl.constexpr):
    """The span of a block, from the smallest and the largest bounds of its rows.

    It has at least one tile, even if no row sees a key. Its last tile is never bare: the kernel starts with a masked
    one.
    """
    lo = tl.minimum(least_first, num_keys - 1) // TILE
    hi = tl.maximum((last_end + TILE - 1) // TILE, lo + 1)
    full_hi = tl.maximum(tl.minimum(least_end // TILE, hi - 1), lo)
    full_lo = tl.minimum(tl.maximum((last_first + TILE - 1) // TILE, lo), full_hi)
    return Span(lo, full_lo, full_hi, hi)


@triton.jit
def span_of_rows(
    start, last, first_bounds, last_bounds, num_keys, window, PLAN: tl.constexpr, TILE: tl.constexpr
):
    """The span of the rows start .. last, whose bounds never decrease from row to row.

    first_bounds, last_bounds: what a table leaves the row `start`, and the row `last`: (first, end).
    """
    least_first, least_end = row_bounds(start, first_bounds[0], first_bounds[1], window, PLAN)
    last_first, last_end = row_bounds(last, last_bounds[0], last_bounds[1], window, PLAN)
    return span_of(least_first, last_first, least_end, last_end, num_keys, TILE)


@triton.jit
def span_of_place(place, window, PLAN: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr):
    """The span of a block of a pack (`places.Place`), ROWS rows long. No tile of a mixed block is bare."""
    every = (0, place.length)
    last = tl.minimum(place.start + ROWS, place.length) - 1
    span = span_of_rows(place.start, last, every, every, place.length, window, PLAN, TILE)
    full_lo = tl.where(place.mixed > 0, span.lo, span.full_lo)
    return Span(span.lo, full_lo, tl.where(place.mixed > 0, span.lo, span.full_hi), span.hi)
