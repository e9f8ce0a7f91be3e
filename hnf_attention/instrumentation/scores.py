"""Row statistics taken from scores, in plain PyTorch: of calls that no option of `attention` describes."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from ..engine.fold import Measured
from ..reference import attention as reference
from ..reference import masks, sampling
from ..reference.options import Options
from ..statistics.rows import RowStats
from .call import AttentionCall, Unmeasurable
from .measurement import Measurement

# Models hide a key with -inf, -1e9 or the smallest number of a dtype. No score comes near.
NEVER_A_SCORE = -5e8
MOST_SCORES = 1 << 34  # of a call whose scores are modified: about a second of a large GPU's memory traffic


def given(
    layer: str, parts: Iterable[tuple[Tensor, Tensor]], num_keys: int, head_dim: int, dtype: torch.dtype
) -> Measurement:
    """The measurement of scores whose queries and keys are not known.

    parts: (scores, seen) of chunks of rows, as for `_of_rows`. dtype: of the model's scores.
    """
    lse, entropy, max_logit, min_logit, visible, sink_mass = _together(parts)
    unknown = torch.full((), math.nan, device=visible.device).expand(*visible.shape[:2], num_keys)
    beside = Measured(visible, sink_mass, unknown[..., :1], unknown, scale=math.inf, score_kind=2)
    rows = RowStats(lse, entropy, max_logit, min_logit)
    return Measurement(layer, rows, head_dim, dtype, beside=beside)


def modified(
    layer: str, call: AttentionCall, options: Options, period: int = 1, phase: int = 0
) -> Measurement:
    """The measurement of a call with a function over its scores, `call.modify`.

    (period, phase): the sample of its rows, as `attention_stats` takes it. Memory is that of some tensors of
    masks.CHUNK_ELEMENTS. Raises Unmeasurable if more than MOST_SCORES scores would be computed, or if the call has
    no function over its scores.
    """
    query, key, modify = call.query, call.key, call.modify
    if modify is None:
        raise Unmeasurable("no function over its scores is known")
    batch, heads, num_queries, head_dim = query.shape
    if period == 1:
        index = torch.arange(num_queries, device=query.device).expand(batch, heads, -1)
    else:
        index = sampling.row_index(batch, heads, num_queries, period, phase % period, query.device)
    num_scores = index.numel() * key.shape[2]
    if not 0 < num_scores <= MOST_SCORES:
        raise Unmeasurable(
            f"its {num_scores:,} scores pass through functions of flex_attention's: up to {MOST_SCORES:,} are computed"
        )
    dtype = reference.compute_dtype(query)
    wide = key.to(dtype)

    def of_chunk(rows: Tensor) -> tuple[Tensor, Tensor]:
        plain = reference.score_rows(query, wide, rows, options)
        scores, seen = modify(plain.scores, rows.clamp(min=0))
        return scores, seen & plain.seen

    chunks = masks.row_chunks(index.shape[2], key.shape[2], batch * heads)
    parts = (of_chunk(index[:, :, chunk]) for chunk in chunks)
    lse, entropy, max_logit, min_logit, visible, sink_mass = _together(parts)
    rows = RowStats(lse, entropy, max_logit, min_logit, row_index=None if period == 1 else index)
    group = heads // key.shape[1]
    query_square, key_square = (
        x.to(dtype).square().sum(-1) for x in (query, key.repeat_interleave(group, 1))
    )
    # How large q and k make the scores is not known, so no bound of their rounding is told.
    beside = Measured(visible, sink_mass, query_square, key_square, scale=math.inf, score_kind=2)
    return Measurement(layer, rows, head_dim, query.dtype, period, beside=beside)


def _together(parts: Iterable[tuple[Tensor, Tensor]]) -> list[Tensor]:
    return [torch.cat(column, 2) for column in zip(*(_of_rows(*part) for part in parts))]


def _of_rows(scores: Tensor, seen: Tensor) -> tuple[Tensor, ...]:
    """(lse, entropy, max_logit, min_logit, visible keys, weight on the first visible key), (B, H, rows) each.

    scores (B, H, rows, N): fp32 or fp64, with anything in hidden places. seen: boolean, of that shape.
    """
    core = reference.of_scores(torch.where(seen, scores, 0.0), seen)
    first = scores.gather(3, seen.to(torch.uint8).argmax(3, keepdim=True))[..., 0]
    count = seen.sum(3)
    return *core, count, torch.where(count > 0, (first - core[0]).exp(), 0.0)
