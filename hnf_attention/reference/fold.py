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
    NUM_FOLDED,
    NUM_SUMS,
    SATURATED_ENTROPY,
    SUM_FIELDS,
)
from ..statistics.rows import RowStats
from .measured import Measured
from .sampling import BLOCK_ROWS


def wide(device: torch.device | str) -> torch.dtype:
    """The dtype of sums on a device: fp64, fp32 on Macs, which have no other."""
    return torch.float32 if torch.device(device).type == "mps" else torch.float64


def new_accumulator(num_heads: int, device: torch.device | str) -> Tensor:
    """An empty fold, (NUM_FOLDED, H) of dtype `wide`: NUM_SUMS sums at 0, then the maxima at -inf."""
    accumulator = torch.zeros(NUM_FOLDED, num_heads, dtype=wide(device), device=device)
    accumulator[NUM_SUMS:] = -torch.inf
    return accumulator


def fold_rows(accumulator: Tensor, stats: RowStats, measured: Measured) -> None:
    """Add one call's rows to `accumulator` (NUM_FOLDED, H) in place.

    Rows that are left out, empty or not finite are counted, and nothing else of them. A call without rows
    changes nothing. Of a call whose scale is inf, no bound of q.k is known. The host does not wait for the device.
    """
    if stats.lse.numel() == 0:
        return
    visible = measured.visible_keys.to(stats.lse.device).expand(stats.lse.shape)
    real, left_out = visible >= 0, torch.zeros_like(visible, dtype=torch.bool)
    if measured.left_out is not None:
        left_out = measured.left_out & real
    occupied = (visible > 0) & ~left_out
    finite = occupied & stats.entropy.isfinite() & stats.max_logit.isfinite() & stats.min_logit.isfinite()
    judged = finite & (visible >= JUDGED_MIN_KEYS)
    dtype = accumulator.dtype
    ratio = stats.entropy.to(dtype) / visible.clamp(min=2).to(dtype).log()
    rows = _Rows(left_out, real & ~left_out & ~occupied, occupied, finite, judged, ratio)
    sums = _sums(rows, stats, measured)
    accumulator[: len(SUM_FIELDS)] += torch.stack([sums[name] for name in SUM_FIELDS])
    accumulator[len(SUM_FIELDS) : NUM_SUMS] += _histogram(rows)
    maxima = _maxima(rows, stats, measured)
    stacked = torch.stack([maxima[name] for name in MAX_FIELDS])
    torch.maximum(accumulator[NUM_SUMS:], stacked, out=accumulator[NUM_SUMS:])


class _Rows(NamedTuple):
    """Which rows count for what, and their normalized entropy, in the accumulator's dtype; (B, H, M) each."""

    left_out: Tensor
    empty: Tensor
    occupied: Tensor
    finite: Tensor
    judged: Tensor
    ratio: Tensor


def _sums(rows: _Rows, stats: RowStats, measured: Measured) -> dict[str, Tensor]:
    """SUM_FIELDS of one call by name, (H,) each."""
    dtype = rows.ratio.dtype
    max_weight, one = stats.max_weight.to(dtype), torch.ones_like(rows.ratio)
    saturated = (rows.ratio < SATURATED_ENTROPY).to(dtype)
    visible = measured.visible_keys.expand(stats.lse.shape)
    new_keys = measured.key_square[..., measured.first_new_key :].to(dtype)
    block_rows = _of_blocks(one, rows.judged)
    sequences = stats.lse.shape[0] if measured.sequences is None else measured.sequences
    sums = {
        "rows": _total(one, rows.finite),
        "judged_rows": _total(one, rows.judged),
        "left_out_rows": _total(one, rows.left_out),
        "empty_rows": _total(one, rows.empty),
        "nonfinite_rows": _total(one, rows.occupied & ~rows.finite),
        "entropy": _total(stats.entropy.to(dtype), rows.finite),
        "logit_range": _total(stats.logit_range.to(dtype), rows.finite),
        "judged_blocks": (block_rows > 0).sum(1).to(dtype),
        "sequences": torch.ones_like(one[0, :, 0]) * sequences,
        "query_square": _total(measured.query_square.to(dtype), ~measured.query_square.isnan()),
        "key_square": _total(new_keys, ~new_keys.isnan()),
        "rest_entropy": _total(measured.rest_entropy.to(dtype) / _log_others(visible, dtype), rows.judged),
        "stray_rows": _total(saturated, rows.judged & (measured.sink_mass < 0.5)),
        **_nonfinite(measured, visible, dtype),
    }
    judged_values = {
        "normalized_entropy": rows.ratio,
        "max_weight": max_weight,
        "sink_mass": measured.sink_mass,
        "jacobian_trace_bound": 1.0 - max_weight.square(),
        "saturated_rows": saturated,
    }
    for name, values in judged_values.items():
        sums[name] = _total(values, rows.judged)
        squares = _of_blocks(values, rows.judged).square()
        sums[f"{name}_blocks"] = (squares / block_rows.clamp(min=1.0)).sum(1)
    return sums


def _log_others(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """Largest entropy of the keys of a row but one."""
    return (visible - 1).clamp(min=2).to(dtype).log()


def _nonfinite(measured: Measured, visible: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """How many queries, keys, values and outputs hold NaN or inf, (H,) each."""
    query, key, value, out = measured.nonfinite
    heads = visible.shape[1]

    def count(bad: Tensor | None) -> Tensor:
        if bad is None:
            return torch.zeros(heads, dtype=dtype, device=visible.device)
        return bad.expand(-1, heads, -1).sum((0, 2), dtype=dtype)

    seen_out = None if out is None else out & (visible >= 0)
    return {
        "nonfinite_query": count(query),
        "nonfinite_key": count(key),
        "nonfinite_value": count(value),
        "nonfinite_out": count(seen_out),
        "nonfinite_empty": count(None if seen_out is None else seen_out & (visible == 0)),
    }


def _maxima(rows: _Rows, stats: RowStats, measured: Measured) -> dict[str, Tensor]:
    """MAX_FIELDS of one call by name, (H,) each; -inf where no row has one."""
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
    """Judged rows by normalized entropy, (HISTOGRAM_BINS, H)."""
    bins = (rows.ratio * HISTOGRAM_BINS).nan_to_num().clamp(0, HISTOGRAM_BINS - 1).long()
    num_heads, device = rows.ratio.shape[1], rows.ratio.device
    heads = torch.arange(num_heads, device=device)[:, None]
    dtype = rows.ratio.dtype
    counts = torch.zeros(HISTOGRAM_BINS, num_heads, dtype=dtype, device=device)
    return counts.index_put_((bins, heads.expand(bins.shape)), rows.judged.to(dtype), accumulate=True)


def _total(values: Tensor, rows: Tensor) -> Tensor:
    return torch.where(rows, values, 0.0).sum((0, 2), dtype=wide(values.device))


def _largest(values: Tensor, rows: Tensor) -> Tensor:
    return torch.where(rows, values.to(wide(values.device)), -torch.inf).amax((0, 2))


def _of_blocks(values: Tensor, judged: Tensor) -> Tensor:
    """Sums over the judged rows of each block, (H, blocks); each batch element starts a new block."""
    chosen = torch.where(judged, values.to(wide(values.device)), 0.0)
    padded = torch.nn.functional.pad(chosen, (0, -chosen.shape[2] % BLOCK_ROWS))
    return padded.unflatten(2, (-1, BLOCK_ROWS)).sum(3).transpose(0, 1).flatten(1)
