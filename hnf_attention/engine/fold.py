"""One attention call folded into its heads' statistics, where the call ran: no host synchronisation.

An accumulator is (slots, NUM_FIELDS, H) fp64: on CUDA the programs of the fold kernel own a slot each,
elsewhere there is one. `collect` adds the slots up; every slot obeys the laws of `stats.fold_rows`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..reference import masks, sampling
from ..statistics import heads as stats
from ..statistics.heads import NUM_SUMS, RowStats
from . import engines
from .call import Options


class Measured(NamedTuple):
    """What a fold needs beside the row statistics; the fields of `stats.fold_rows`.

    visible_keys: int64, broadcastable to (B, H, M). sink_mass: (B, H, M), weight on the first visible
    key plus the learned sink's. M is M_s in both where the rows are a sample.
    query_square (B, H, M), key_square (B, H, N): squared lengths, fp32 (fp64 for fp64 inputs), of all
    queries, and of the keys once per query head. sequences: of a pack, how many hold a token, int64 without
    dimensions; tokens past the last one have squared lengths of 0. scale: of q.k, infinite where q.k
    is not known. score_kind: what else is in the scores, 0 for nothing, 1 for an additive mask, 2 for a soft-cap or a
    learned sink.
    """

    visible_keys: Tensor
    sink_mass: Tensor
    query_square: Tensor
    key_square: Tensor
    sequences: Tensor | None = None
    scale: float = 1.0
    score_kind: int = 0


def new_accumulator(num_heads: int, device: torch.device) -> Tensor:
    """An empty fold for calls on `device`."""
    slots = 1
    if device.type == "cuda":
        slots = engines.kernel("measure.fold").SLOTS
    return stats.new_accumulator(num_heads, device).repeat(slots, 1, 1)


@functools.cache
def kernel_layout() -> Any:
    """Where the fold kernel finds each field; a field that only one side knows is a TypeError."""
    kernel = engines.kernel("measure.fold")
    sums = {name: place for place, name in enumerate(stats.SUM_FIELDS)}
    maxima = {name: NUM_SUMS + place for place, name in enumerate(stats.MAX_FIELDS)}
    return kernel.Layout(
        sums=kernel.SumFields(**sums),
        histogram=len(sums),
        bins=stats.HISTOGRAM_BINS,
        maxima=kernel.MaxFields(**maxima),
        judged_min_keys=stats.JUDGED_MIN_KEYS,
        saturated=stats.SATURATED_ENTROPY,
    )


def fold(accumulator: Tensor, query: Tensor, key: Tensor, rows: RowStats, options: Options) -> None:
    """Add one call to its layer's accumulator: by one kernel launch on CUDA (a second one scans a user mask).

    query (B, H, M, D), key (B, H_kv, N, D), rows of (B, H, M) or a sample, (B, H, M_s): a call
    as `attention` takes it, its validated options, and its row statistics. A call without rows changes nothing.
    """
    if rows.lse.numel() == 0:
        return
    if engines.kernels_cover(query, None):
        with engines.on_device(query):
            engines.kernel("measure.fold").fold(accumulator, query, key, rows, options, kernel_layout())
    else:
        fold_measured(accumulator, rows, measure(query, key, rows, options))


@torch.no_grad()
def fold_measured(accumulator: Tensor, rows: RowStats, measured: Measured) -> None:
    """`fold` of a call of which these are known already, on any device, in PyTorch's own operations."""
    stats.fold_rows(accumulator[0], rows, *measured)


def collect(accumulators: Sequence[Tensor]) -> Tensor:
    """The slots of accumulators on one device added up: (NUM_FIELDS, sum of their H), in their order."""
    together = torch.cat(list(accumulators), 2)
    return torch.cat([together[:, :NUM_SUMS].sum(0), together[:, NUM_SUMS:].amax(0)])


@torch.no_grad()
def measure(query: Tensor, key: Tensor, rows: RowStats, options: Options) -> Measured:
    """The specification of what the fold kernel computes from q, k and the positions."""
    num_queries, num_keys = query.shape[2], key.shape[2]
    count, first = masks.visible_keys(
        num_queries,
        num_keys,
        attn_mask=options.attn_mask,
        is_causal=options.is_causal,
        window_size=options.window_size,
        seqlens=options.seqlens,
        device=query.device,
    )
    index = rows.row_index
    if index is not None:
        count, first = (sampling.take_rows(x.expand(query.shape[:3]), index) for x in (count, first))
        count = torch.where(index >= 0, count, 0)
    group = max(1, query.shape[1] // max(1, key.shape[1]))

    sequences = end = None
    if options.seqlens is not None:
        sequences = masks.num_sequences(options.seqlens, num_keys)
        end = masks.sequence_edges(options.seqlens, num_keys)[-1]

    def square(x: Tensor) -> Tensor:
        squares = x.to(rows.lse.dtype).square().sum(-1)
        if sequences is None:
            return squares
        return torch.where(torch.arange(x.shape[2], device=x.device) < end, squares, 0.0)

    return Measured(
        count,
        _sink_mass(query, key, rows, count, first, options),
        square(query),
        square(key).repeat_interleave(group, 1),
        sequences,
        options.scale,
        _score_kind(options),
    )


def _score_kind(options: Options) -> int:
    if options.softcap is not None or options.sinks is not None:
        return 2
    return int(options.attn_mask is not None and options.attn_mask.dtype != torch.bool)


def _sink_mass(
    query: Tensor, key: Tensor, rows: RowStats, count: Tensor, first: Tensor, options: Options
) -> Tensor:
    lse = rows.lse
    if lse.numel() == 0 or key.shape[2] == 0:
        return torch.zeros_like(lse)
    first = first.expand(lse.shape)
    grouped = first.reshape(lse.shape[0], key.shape[1], -1, 1).expand(-1, -1, -1, key.shape[3])
    first_key = key.gather(2, grouped).reshape(*lse.shape, key.shape[3])
    mask, row = options.attn_mask, torch.arange(query.shape[2], device=query.device)
    if rows.row_index is not None:
        query, row = sampling.take_rows(query, rows.row_index), rows.row_index.clamp(min=0)
    scores = (query.to(lse.dtype) * first_key.to(lse.dtype)).sum(-1) * options.scale
    if options.softcap is not None:
        scores = options.softcap * (scores / options.softcap).tanh()
    if mask is not None and mask.dtype != torch.bool:
        batch, heads = (torch.arange(n, device=lse.device) for n in lse.shape[:2])
        # One element of each row; row 0 of a mask that broadcasts over them stands for all.
        full = mask.expand(*lse.shape[:2], mask.shape[2], key.shape[2])
        row = row if mask.shape[2] > 1 else torch.zeros_like(row)
        scores = scores + full[batch[:, None, None], heads[:, None], row, first].to(lse.dtype)
    weight = (scores - lse).exp()
    if options.sinks is not None:
        weight = weight + (options.sinks.to(lse.dtype)[:, None] - lse).exp()
    return torch.where(count > 0, weight, 0.0)
