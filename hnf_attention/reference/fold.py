"""The specification of the fold: from one call's rows to one number per head, in PyTorch's own operations.

`fields.py` lists what an accumulator holds.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..statistics.fields import (
    HISTOGRAM_BINS,
    JUDGED_MIN_KEYS,
    MAX_FIELDS,
    NUM_FIELDS,
    NUM_SUMS,
    SATURATED_ENTROPY,
    SUM_FIELDS,
)
from ..statistics.rows import RowStats
from . import masks
from .options import Options
from .sampling import BLOCK_ROWS

PLAIN, BIASED, OTHER = 0, 1, 2  # kinds of scores, see `Measured.score_kind`


class Measured(NamedTuple):
    """What a fold needs beside the row statistics.

    visible_keys: int64, broadcastable to (B, H, M). sink_mass: (B, H, M), weight on the first visible
        key plus the learned sink's. M is M_s in both if the rows are a sample.
    query_square (B, H, M), key_square (B, H, N): squared lengths, fp32 (fp64 for fp64 inputs), of all
        queries, and of the keys once per query head. In a pack, those past its last token are 0.
    sequences: how many sequences of a pack hold a token, int64 without dimensions; None without a pack.
    scale: of q.k, inf if q.k is not known.
    score_kind: what else is in the scores, 0 for nothing, 1 for an additive mask, 2 for a soft-cap or a
        learned sink.
    """

    visible_keys: Tensor
    sink_mass: Tensor
    query_square: Tensor
    key_square: Tensor
    sequences: Tensor | None = None
    scale: float = 1.0
    score_kind: int = PLAIN


def new_accumulator(num_heads: int, device: torch.device | str) -> Tensor:
    """An empty fold, (NUM_FIELDS, H) fp64: NUM_SUMS sums at 0, then the maxima at -inf."""
    accumulator = torch.zeros(NUM_FIELDS, num_heads, dtype=torch.float64, device=device)
    accumulator[NUM_SUMS:] = -torch.inf
    return accumulator


def fold_rows(accumulator: Tensor, stats: RowStats, measured: Measured) -> None:
    """Add one call's rows to `accumulator` (NUM_FIELDS, H) in place.

    Empty rows count in the squared lengths and `sequences` only. Non-finite rows are counted, and nothing
    else. A call without rows changes nothing. Of a call whose scale is inf, no bound of q.k is known.
    The host does not wait for the device.
    """
    if stats.lse.numel() == 0:
        return
    visible = measured.visible_keys.to(stats.lse.device).expand(stats.lse.shape)
    occupied = visible > 0
    finite = occupied & stats.entropy.isfinite() & stats.max_logit.isfinite() & stats.min_logit.isfinite()
    judged = finite & (visible >= JUDGED_MIN_KEYS)
    ratio = stats.entropy.double() / visible.clamp(min=2).double().log()
    rows = _Rows(occupied, finite, judged, ratio)
    sums = _sums(rows, stats, measured)
    accumulator[: len(SUM_FIELDS)] += torch.stack([sums[name] for name in SUM_FIELDS])
    accumulator[len(SUM_FIELDS) : NUM_SUMS] += _histogram(rows)
    maxima = _maxima(rows, stats, measured)
    stacked = torch.stack([maxima[name] for name in MAX_FIELDS])
    torch.maximum(accumulator[NUM_SUMS:], stacked, out=accumulator[NUM_SUMS:])


class _Rows(NamedTuple):
    """Which rows count for what, and their normalized entropy (fp64); (B, H, M) each."""

    occupied: Tensor
    finite: Tensor
    judged: Tensor
    ratio: Tensor


def _sums(rows: _Rows, stats: RowStats, measured: Measured) -> dict[str, Tensor]:
    """SUM_FIELDS of one call by name, (H,) fp64 each."""
    max_weight, one = stats.max_weight.double(), torch.ones_like(rows.ratio)
    block_rows = _of_blocks(one, rows.judged)
    sequences = stats.lse.shape[0] if measured.sequences is None else measured.sequences
    sums = {
        "rows": _total(one, rows.finite),
        "judged_rows": _total(one, rows.judged),
        "nonfinite_rows": _total(one, rows.occupied & ~rows.finite),
        "entropy": _total(stats.entropy.double(), rows.finite),
        "logit_range": _total(stats.logit_range.double(), rows.finite),
        "judged_blocks": (block_rows > 0).sum(1).double(),
        "sequences": torch.ones_like(one[0, :, 0]) * sequences,
        "query_square": _total(measured.query_square.double(), ~measured.query_square.isnan()),
        "key_square": _total(measured.key_square.double(), ~measured.key_square.isnan()),
    }
    judged_values = {
        "normalized_entropy": rows.ratio,
        "max_weight": max_weight,
        "sink_mass": measured.sink_mass,
        "jacobian_trace_bound": 1.0 - max_weight.square(),
        "saturated_rows": (rows.ratio < SATURATED_ENTROPY).double(),
    }
    for name, values in judged_values.items():
        sums[name] = _total(values, rows.judged)
        squares = _of_blocks(values, rows.judged).square()
        sums[f"{name}_blocks"] = (squares / block_rows.clamp(min=1.0)).sum(1)
    return sums


def _maxima(rows: _Rows, stats: RowStats, measured: Measured) -> dict[str, Tensor]:
    """MAX_FIELDS of one call by name, (H,) fp64 each; -inf where no row has one."""
    query, key = measured.query_square, measured.key_square
    every = torch.ones_like(rows.ratio[0, :, 0])
    query_square = every * torch.inf
    if not math.isinf(measured.scale):
        query_square = measured.scale**2 * _largest(query, ~query.isnan())
    return {
        "max_logit": _largest(stats.max_logit, rows.finite),
        "neg_min_logit": _largest(-stats.min_logit, rows.finite),
        "logit_range": _largest(stats.logit_range, rows.finite),
        "max_weight": _largest(stats.max_weight, rows.judged),
        "neg_normalized_entropy": _largest(-rows.ratio, rows.judged),
        "neg_max_weight": _largest(-stats.max_weight, rows.finite),
        "query_square": query_square,
        "key_square": _largest(key, ~key.isnan()) if key.shape[2] else every * -torch.inf,
        "num_keys": every * key.shape[2],
        "score_kind": every * measured.score_kind,
    }


def _histogram(rows: _Rows) -> Tensor:
    """Judged rows by normalized entropy, (HISTOGRAM_BINS, H) fp64."""
    bins = (rows.ratio * HISTOGRAM_BINS).nan_to_num().clamp(0, HISTOGRAM_BINS - 1).long()
    num_heads, device = rows.ratio.shape[1], rows.ratio.device
    heads = torch.arange(num_heads, device=device)[:, None]
    counts = torch.zeros(HISTOGRAM_BINS, num_heads, dtype=torch.float64, device=device)
    return counts.index_put_((bins, heads.expand(bins.shape)), rows.judged.double(), accumulate=True)


def _total(values: Tensor, rows: Tensor) -> Tensor:
    return torch.where(rows, values, 0.0).sum((0, 2), dtype=torch.float64)


def _largest(values: Tensor, rows: Tensor) -> Tensor:
    return torch.where(rows, values.double(), -torch.inf).amax((0, 2))


def _of_blocks(values: Tensor, judged: Tensor) -> Tensor:
    """Sums over the judged rows of each block, (H, blocks); each batch element starts a new block."""
    chosen = torch.where(judged, values.double(), 0.0)
    padded = torch.nn.functional.pad(chosen, (0, -chosen.shape[2] % BLOCK_ROWS))
    return padded.unflatten(2, (-1, BLOCK_ROWS)).sum(3).transpose(0, 1).flatten(1)


@torch.no_grad()
def measure(query: Tensor, key: Tensor, rows: RowStats, options: Options) -> Measured:
    """What the fold of a call needs beside its rows, from q, k and the positions.

    query (B, H, M, D), key (B, H_kv, N, D), rows of (B, H, M) or a sample, (B, H, M_s).
    """
    num_queries, num_keys = query.shape[2], key.shape[2]
    count, first = masks.visible_keys(num_queries, num_keys, options, query.device)
    index = rows.row_index
    if index is not None:
        count, first = (masks.take_rows(x.expand(query.shape[:3]), index) for x in (count, first))
        count = torch.where(index >= 0, count, 0)
    group = max(1, query.shape[1] // max(1, key.shape[1]))

    sequences = end = None
    if options.seqlens is not None:
        sequences = masks.num_sequences(options.seqlens, num_keys)
        end = masks.sequence_edges(options.seqlens, num_keys)[-1]

    def square(x: Tensor) -> Tensor:
        squares = x.to(rows.lse.dtype).square().sum(-1)
        if end is None:
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
        return OTHER
    additive = options.attn_mask is not None and options.attn_mask.dtype != torch.bool
    return BIASED if additive else PLAIN


def _sink_mass(
    query: Tensor, key: Tensor, rows: RowStats, count: Tensor, first: Tensor, options: Options
) -> Tensor:
    """Weight of each row on its first visible key, plus the learned sink's; 0 for an empty row."""
    lse = rows.lse
    if lse.numel() == 0 or key.shape[2] == 0:
        return torch.zeros_like(lse)
    first = first.expand(lse.shape)
    grouped = first.reshape(lse.shape[0], key.shape[1], -1, 1).expand(-1, -1, -1, key.shape[3])
    first_key = key.gather(2, grouped).reshape(*lse.shape, key.shape[3])
    mask, row = options.attn_mask, torch.arange(query.shape[2], device=query.device)
    if rows.row_index is not None:
        query, row = masks.take_rows(query, rows.row_index), rows.row_index.clamp(min=0)
    scores = (query.to(lse.dtype) * first_key.to(lse.dtype)).sum(-1) * options.scale
    if options.softcap is not None:
        scores = options.softcap * (scores / options.softcap).tanh()
    if mask is not None and mask.dtype != torch.bool:
        batch, heads = (torch.arange(n, device=lse.device) for n in lse.shape[:2])
        # One number per row, instead of the whole mask. A mask with one row has it for all queries.
        full = mask.expand(*lse.shape[:2], mask.shape[2], key.shape[2])
        row = row if mask.shape[2] > 1 else torch.zeros_like(row)
        scores = scores + full[batch[:, None, None], heads[:, None], row, first].to(lse.dtype)
    weight = (scores - lse).exp()
    if options.sinks is not None:
        weight = weight + (options.sinks.to(lse.dtype)[:, None] - lse).exp()
    return torch.where(count > 0, weight, 0.0)
