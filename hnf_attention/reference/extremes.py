"""The specification of the extremes of a call: what one forward shows of it without a look at every row.

A result is int32 (len(FIELDS), H). Every field is a maximum, so that results merge by one maximum, and the order in
which calls come does not matter. Scores are `ordered`: int32 numbers in the order of the fp32 numbers they stand for.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..kernels.shared.sampling import BATCH_STEP, HEAD_STEP
from . import masks
from .attention import compute_dtype, score_rows
from .options import Options

FIELDS = (
    "max_logit",  # largest score of the rows that were taken, nats
    "logit_range",  # largest range of the scores of one of these rows, nats
    "first_query",  # minus the number of the first forward whose queries held NaN or inf
    "first_key",  # likewise for keys
    "first_value",
    "first_out",
)
NONE = -(2**31)  # nothing yet
BLOCK_ROWS = 64


def new_result(num_heads: int, device: torch.device) -> Tensor:
    """The result of no call, int32 (fields, H)."""
    return torch.full((len(FIELDS), num_heads), NONE, dtype=torch.int32, device=device)


def ordered(x: Tensor) -> Tensor:
    """fp32 numbers as int32 in the same order."""
    bits = x.to(torch.float32).view(torch.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def decoded(results: np.ndarray) -> np.ndarray:
    """Results (fields, H) as fp64: scores in nats, minus the numbers of forwards; -inf for nothing yet."""
    scores = results[:2].astype(np.int32)
    bits = scores ^ ((scores >> 31) & 0x7FFFFFFF)
    numbers = np.concatenate([bits.view(np.float32).astype(np.float64), results[2:].astype(np.float64)])
    return np.where(results == NONE, -np.inf, numbers)


def row_index(
    batch: int, heads: int, num_queries: int, phase: int, device: torch.device, rows: int = BLOCK_ROWS
) -> Tensor:
    """The block of rows that each (batch, head) takes in a phase, int64 (B, H, rows), -1 beyond the last row.

    The blocks of a head come in turn, and other heads and sequences begin elsewhere: see `sampling`.
    """
    blocks = -(-num_queries // rows)
    b, h = torch.arange(batch, device=device)[:, None], torch.arange(heads, device=device)
    shift = (b * BATCH_STEP + h * HEAD_STEP) & 0xFFFFFFFF
    first = (phase + (shift * blocks >> 32)) % blocks * rows
    index = first[..., None] + torch.arange(rows, device=device)
    return torch.where(index < num_queries, index, -1)


@torch.no_grad()
def raise_result(
    result: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor | None,
    options: Options,
    left_out: Tensor | None,
    number: int,
    phase: int,
    rows: int = BLOCK_ROWS,
) -> None:
    """Raise a result, int32 (fields, H), by what one call shows. The host does not wait for the device.

    query (B, H, M, D), key (B, H_kv, N, D), value (B, H_kv, N, D_v); M, N >= 1. out: (B, H, M, D_v); None if it is not
    known. left_out: boolean (B, M), queries that do not count. number: of this forward. phase: which block of rows is
    taken, see `row_index`. q, k and v are checked for NaN and inf where the output holds some, or is not known.
    """
    batch, heads, num_queries, _ = query.shape
    index = row_index(batch, heads, num_queries, phase, query.device, rows)
    part = score_rows(query, key.to(compute_dtype(query)), index, options)
    seen = part.seen & (part.scores == part.scores)
    if left_out is not None:
        seen = seen & ~masks.take_rows(left_out[:, None].expand(-1, heads, -1), index)[..., None]
    high = torch.where(seen, part.scores, -torch.inf).amax(-1)
    wide = high - torch.where(seen, part.scores, torch.inf).amin(-1)
    wide = torch.where(high.isinf() & (high > 0), torch.inf, wide)  # inf - inf
    found = torch.stack([high, wide]).amax((1, 3)).to(torch.float32)
    found = torch.where(found == -torch.inf, NONE, ordered(found))
    torch.maximum(result[:2], found, out=result[:2])
    if out is not None and out.device.type == "cpu" and out.isfinite().all():
        return  # here the host knows at no cost that nothing else has to be looked at
    bad = [_broken(x, heads) for x in (query, key, value)]
    if out is not None:
        out_bad = _broken(out, heads)
        bad = [*(x & out_bad for x in bad), out_bad]
    firsts = torch.where(torch.stack(bad), -number, NONE).to(torch.int32)
    firsts = torch.maximum(result[2 : 2 + len(bad)], firsts)
    result[2 : 2 + len(bad)] = firsts


def _broken(x: Tensor, heads: int) -> Tensor:
    """Which query heads, boolean (H,), have NaN or inf in a tensor (B, H or H_kv, L, D)."""
    bad = ~x.isfinite().all(-1).all(-1).all(0)
    return bad.repeat_interleave(heads // x.shape[1])
