"""One attention call folded into its heads' statistics, where the call ran: no host synchronisation.

An accumulator is (slots, NUM_FOLDED, H) fp64: on CUDA the programs of the fold kernel own a slot each,
elsewhere there is one. `collect` merges the slots; every slot obeys the laws of `reference.fold.fold_rows`.
Where a device has no fp64, two slots of fp32 hold one sum: the sum, and what its rounding lost.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..reference import fold as reference
from ..reference import measured
from ..reference.context import LEAST_ROWS, SHARED_ROWS, UNKNOWN, Context, largest
from ..reference.measured import Measured
from ..reference.options import Options
from ..statistics import fields
from ..statistics.fields import NUM_SUMS
from ..statistics.rows import RowStats
from . import engines
from .card import card_of


def new_accumulator(num_heads: int, device: torch.device) -> Tensor:
    """An empty fold for calls on `device`."""
    slots = 1
    if card_of(device).triton is not None:
        slots = engines.kernel("measure.fold").SLOTS
    accumulator = reference.new_accumulator(num_heads, device)
    if accumulator.dtype == torch.float32:
        slots = 2
    return accumulator.repeat(slots, 1, 1)


@functools.cache
def kernel_layout() -> Any:
    """Where the fold kernel finds each field; a field that only one side knows is a TypeError."""
    kernel = engines.kernel("measure.fold")
    sums = {name: place for place, name in enumerate(fields.SUM_FIELDS)}
    maxima = {name: NUM_SUMS + place for place, name in enumerate(fields.MAX_FIELDS)}
    return kernel.Layout(
        sums=kernel.SumFields(**sums),
        histogram=len(sums),
        bins=fields.HISTOGRAM_BINS,
        maxima=kernel.MaxFields(**maxima),
        judged_min_keys=fields.JUDGED_MIN_KEYS,
        saturated=fields.SATURATED_ENTROPY,
    )


def fold(
    accumulator: Tensor,
    query: Tensor,
    key: Tensor,
    rows: RowStats,
    options: Options,
    context: Context = UNKNOWN,
) -> None:
    """Add one call to its layer's accumulator: by one kernel launch on CUDA (a second one scans a user mask).

    query (B, H, M, D), key (B, H_kv, N, D), rows of (B, H, M) or a sample, (B, H, M_s): a call
    as `attention` takes it, its validated options, row statistics and context. Without rows nothing changes.
    """
    if rows.lse.numel() == 0:
        return
    if engines.kernels_cover(query, None):
        with engines.on_device(query):
            engines.kernel("measure.fold").fold(
                accumulator, query, key, rows, options, context, kernel_layout()
            )
    else:
        fold_measured(accumulator, rows, measured.measure(query, key, rows, options, context))


@torch.no_grad()
def shared_key(
    query: Tensor, key: Tensor, rows: RowStats, options: Options, left_out: Tensor | None
) -> Tensor:
    """The key with the most weight over some rows of a head, int64 (B, H); -1 where none counts.

    query (B, H, M, D), key (B, H_kv, N, D), rows: as for `fold`. left_out: boolean (B, M), None for none.
    """
    if min(rows.lse.numel(), key.shape[2]) == 0 or rows.lse.shape[2] < LEAST_ROWS:
        return torch.full(query.shape[:2], -1, dtype=torch.int64, device=query.device)
    if not engines.kernels_cover(query, None):
        return measured.shared_key(query, key, rows, options, left_out)
    lse, index = rows.lse, None
    if left_out is not None or rows.row_index is not None:
        index, lse = measured.rows_asked(query, rows, left_out)
    return measured.heaviest(column_weights(query, key, index, lse, options))


def column_weights(query: Tensor, key: Tensor, index: Tensor | None, lse: Tensor, options: Options) -> Tensor:
    """Weight of each key, (B, H, N), summed over SHARED_ROWS rows of a head.

    query (B, H, M, D), key (B, H_kv, N, D), neither of them empty. index: these rows, int64 (B, H, SHARED_ROWS), -1
    for none, and `lse` is theirs; None for rows that are evenly spread, and `lse` is (B, H, M).
    """
    if index is not None and not engines.kernels_cover(query, None):
        return measured.column_weights(query, key, index, lse, options)
    with engines.on_device(query):
        return engines.kernel("measure.columns").column_weights(query, key, lse, options, SHARED_ROWS, index)


def beside(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor | None,
    rows: RowStats,
    options: Options,
    left_out: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(shared_key, value_size, out_size) of a call's `Context`.

    query (B, H, M, D), key (B, H_kv, N, D), value (B, H_kv, N, D_v), output (B, H or 1, M, any), None if it is not
    known; rows, left_out: as for `shared_key`. Values with another number of heads than the keys have no sizes.
    """
    grouped = value.shape[1] == key.shape[1]
    fits = output is None or (output.shape[1] == query.shape[1] and output.shape[3] == value.shape[3])
    whole = rows.row_index is None and rows.lse.numel() > 0 and value.numel() > 0
    if grouped and fits and whole and engines.kernels_cover(query, value):
        with engines.on_device(query):
            return beside_by_kernels(query, key, value, output, rows, options, left_out)
    sizes = largest(value) if grouped else None, None if output is None else largest(output)
    return shared_key(query, key, rows, options, left_out), *sizes


@torch.no_grad()
def beside_by_kernels(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor | None,
    rows: RowStats,
    options: Options,
    left_out: Tensor | None,
    control: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`beside` of all rows, where the kernels cover the call. control: as for `engine.graphed`."""
    columns, kernel = engines.kernel("measure.columns"), engines.kernel("measure.beside")
    index, lse = None, rows.lse
    if left_out is not None:
        places = engines.kernel("measure.rows_asked")
        index, lse = places.rows_asked(rows.lse, left_out, SHARED_ROWS, LEAST_ROWS, control)
    weights = columns.column_weights(query, key, lse, options, SHARED_ROWS, index, control)
    return kernel.beside(weights, value, output, query.shape[2], LEAST_ROWS, control)


@torch.no_grad()
def fold_measured(accumulator: Tensor, rows: RowStats, beside: Measured) -> None:
    """`fold` of a call whose measured numbers are known already, on any device, in PyTorch's own operations."""
    if accumulator.dtype == torch.float64:
        reference.fold_rows(accumulator[0], rows, beside)
        return
    part = reference.new_accumulator(accumulator.shape[2], accumulator.device)
    reference.fold_rows(part, rows, beside)
    total, lost = accumulator[:, :NUM_SUMS]
    # Knuth, The Art of Computer Programming, volume 2, section 4.2.2, theorem B: the exact rounding error of a sum.
    added, before = part[:NUM_SUMS], total.clone()
    total += added
    share = total - before
    lost += (before - (total - share)) + (added - share)
    torch.maximum(accumulator[0, NUM_SUMS:], part[NUM_SUMS:], out=accumulator[0, NUM_SUMS:])


def collect(accumulators: Sequence[Tensor]) -> Tensor:
    """Merge the slots of accumulators on one device: (NUM_FOLDED, sum of their H), heads in their order."""
    together = torch.cat(list(accumulators), 2)
    if together.dtype == torch.float32:
        together = together.cpu().double()
    return torch.cat([together[:, :NUM_SUMS].sum(0), together[:, NUM_SUMS:].amax(0)])
