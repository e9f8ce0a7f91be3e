"""Row statistics taken from scores, in plain PyTorch: of calls that no option of `attention` describes."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..reference import attention as reference
from ..reference import masks, sampling
from ..reference.context import largest, shared_places
from ..reference.measured import OTHER, Measured, NonFinite, heaviest, sink_and_rest
from ..reference.options import Options
from ..statistics.rows import RowStats
from .call import AttentionCall, Unmeasurable
from .measurement import Measurement

# Models hide a key with -inf, -1e9 or the smallest number of a dtype. No score comes near.
NEVER_A_SCORE = -5e8
MOST_SCORES = 1 << 34  # of a call whose scores are modified: about a second of a large GPU's memory traffic


Part = Callable[[slice | Tensor], tuple[Tensor, Tensor]]
"""Some rows' scores (B, H, rows, N), fp32 or fp64 with anything in hidden places, and which keys they see, boolean.

The rows are a slice, or numbers, int64 (B, H, rows), none of them negative.
"""


def given(
    layer: str,
    part: Part,
    shape: Sequence[int],
    head_dim: int,
    dtype: torch.dtype,
    *,
    own_keys: bool,
    device: torch.device,
    result: Tensor | None = None,
) -> Measurement:
    """The measurement of scores whose queries and keys are not known.

    shape: (B, H, M, N) of the scores. dtype: of the model's scores. own_keys: key i is of the same token as query i.
    result: the model's softmax of the scores, to look for NaN in.
    """
    rows = _rows(part, shape, None, own_keys, device)
    unknown = torch.full((), math.nan, device=rows.visible_keys.device).expand(*shape[:2], shape[3])
    bad = NonFinite() if result is None else NonFinite(out=~largest(result).isfinite())
    beside = Measured(
        rows.visible_keys,
        rows.sink_mass,
        rows.rest_entropy,
        unknown[..., :1],
        unknown,
        scale=math.inf,
        score_kind=OTHER,
        left_out=rows.left_out,
        nonfinite=bad,
    )
    return Measurement(layer, RowStats(*rows.core), head_dim, dtype, beside=beside)


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

    def part(places: slice | Tensor) -> tuple[Tensor, Tensor]:
        chunk = masks.take_rows(index, places)
        plain = reference.score_rows(query, wide, chunk, options)
        scores, seen = modify(plain.scores, chunk.clamp(min=0))
        return scores, seen & plain.seen

    own_keys = period == 1 and num_queries == key.shape[2]
    rows = _rows(part, (*index.shape, key.shape[2]), index, own_keys, query.device)
    lse, entropy, most, least = rows.core
    statistics = RowStats(lse, entropy, most, least, row_index=None if period == 1 else index)
    group = heads // key.shape[1]
    query_square, key_square = (
        x.to(dtype).square().sum(-1) for x in (query, key.repeat_interleave(group, 1))
    )
    # How large q and k make the scores is not known, so no bound of their rounding is told.
    beside = Measured(
        rows.visible_keys,
        rows.sink_mass,
        rows.rest_entropy,
        query_square,
        key_square,
        scale=math.inf,
        score_kind=OTHER,
        left_out=rows.left_out,
    )
    return Measurement(layer, statistics, head_dim, call.dtype, period, beside=beside)


class _Rows(NamedTuple):
    """Of the rows of some scores: their statistics, and what `Measured` needs."""

    core: tuple[Tensor, ...]  # lse, entropy, max_logit, min_logit
    visible_keys: Tensor
    sink_mass: Tensor
    rest_entropy: Tensor
    left_out: Tensor | None


def _rows(
    part: Part,
    shape: Sequence[int],
    index: Tensor | None,
    own_keys: bool,
    device: torch.device,
) -> _Rows:
    """index: int64 (B, H, M_s), -1 for a place of a sample without a row; None for all rows."""
    batch, heads, num_rows, num_keys = shape
    chunks = list(masks.row_chunks(num_rows, num_keys, batch * heads))
    left_out = None
    if own_keys:
        left_out = ~functools.reduce(operator.or_, (part(rows)[1].flatten(1, 2).any(1) for rows in chunks))
    places = shared_places((batch, heads, num_rows), None, left_out, device).expand(-1, heads, -1)
    scores, seen = part(places.clamp(min=0))
    chosen = seen & (places >= 0)[..., None]
    weights = torch.where(chosen, torch.where(seen, scores, -torch.inf).softmax(-1), 0.0)
    shared = heaviest(weights.sum(2))
    columns = [torch.cat(column, 2) for column in zip(*(_of_rows(*part(rows), shared) for rows in chunks))]
    *core, count, weight = columns
    if index is not None:
        count = torch.where(index >= 0, count, -1)
    sink_mass, rest = sink_and_rest(weight, torch.zeros_like(weight), core[1], count)
    return _Rows(tuple(core), count, sink_mass, rest, None if left_out is None else left_out[:, None])


def _of_rows(scores: Tensor, seen: Tensor, shared: Tensor) -> tuple[Tensor, ...]:
    """(lse, entropy, max_logit, min_logit, visible keys, weight on the sink key), (B, H, rows) each.

    shared: int64 (B, H), the key that the rows of a head share, -1 for none.
    """
    core = reference.of_scores(torch.where(seen, scores, 0.0), seen)
    first = seen.to(torch.uint8).argmax(3, keepdim=True)
    other = shared[..., None, None].expand_as(first)
    weight = torch.zeros_like(core[0])
    for place in (first, other):
        there = seen.gather(3, place.clamp(min=0)) & (place >= 0)
        on_place = (scores.gather(3, place.clamp(min=0))[..., 0] - core[0]).exp()
        weight = torch.maximum(weight, torch.where(there[..., 0], on_place, 0.0))
    return *core, seen.sum(3), weight
