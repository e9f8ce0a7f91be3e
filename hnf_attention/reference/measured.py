"""What a fold needs of a call beside its row statistics: the specification, in PyTorch's own operations."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..statistics.rows import RowStats
from . import masks
from .attention import compute_dtype, score_rows
from .context import UNKNOWN, Context, shared_places
from .options import Options

PLAIN, BIASED, OTHER = 0, 1, 2  # kinds of scores, see `Measured.score_kind`


class NonFinite(NamedTuple):
    """Which queries (B, H, M), keys and values (B, H, N) and outputs (B, H, M) hold NaN or inf; boolean.

    Queries and keys are judged by their squared lengths, which numbers above 1e19 overflow too.

    H may be 1 for all heads, M is M_s for outputs if the rows are a sample. None where it is not known.
    """

    query: Tensor | None = None
    key: Tensor | None = None
    value: Tensor | None = None
    out: Tensor | None = None


class Measured(NamedTuple):
    """What a fold needs beside the row statistics.

    visible_keys: int64, broadcastable to (B, H, M), -1 in a place of a sample that holds no row. M is M_s in it, in
        sink_mass, rest_entropy and left_out if the rows are a sample.
    sink_mass: (B, H, M), weight on the learned sink and on the sink key: the first visible key or the key that the
        rows of the head share, whichever has more.
    rest_entropy: (B, H, M), nats: entropy of the weights on all other keys, times their sum, 1 - sink_mass.
    query_square (B, H, M), key_square (B, H, N): squared lengths, fp32 (fp64 for fp64 inputs), of all queries, and
        of the keys once per query head. Those that do not count are 0: padding, and what lies past the end of a pack.
    sequences: how many sequences of a pack hold a token, int64 without dimensions; None for the batch.
    scale: of q.k, inf if q.k is not known.
    score_kind: what else is in the scores, 0 for nothing, 1 for an additive mask, 2 for a soft-cap or a
        learned sink.
    left_out: boolean, broadcastable to (B, H, M): rows that are not judged; None for none.
    first_new_key: the keys before it were in the call before.
    nonfinite: where NaN or inf is.
    """

    visible_keys: Tensor
    sink_mass: Tensor
    rest_entropy: Tensor
    query_square: Tensor
    key_square: Tensor
    sequences: Tensor | int | None = None
    scale: float = 1.0
    score_kind: int = PLAIN
    left_out: Tensor | None = None
    first_new_key: int = 0
    nonfinite: NonFinite = NonFinite()


@torch.no_grad()
def measure(
    query: Tensor, key: Tensor, rows: RowStats, options: Options, context: Context = UNKNOWN
) -> Measured:
    """What the fold of a call needs beside its rows, from q, k, the positions and the context.

    query (B, H, M, D), key (B, H_kv, N, D), rows of (B, H, M) or a sample, (B, H, M_s).
    """
    batch, heads, num_queries, _ = query.shape
    num_keys, index, device = key.shape[2], rows.row_index, query.device
    count, first = masks.visible_keys(num_queries, num_keys, options, device)
    left_out, hidden, sequences = context.left_out, context.hidden_keys, None
    position = torch.arange(max(num_queries, num_keys), device=device)
    if options.seqlens is not None:
        sequences = masks.num_sequences(options.seqlens, num_keys)
        past = (position >= masks.sequence_edges(options.seqlens, num_keys)[-1]).expand(batch, -1)
        left_out = past[:, :num_queries] if left_out is None else left_out | past[:, :num_queries]
        hidden = past[:, :num_keys] if hidden is None else hidden | past[:, :num_keys]
    group = max(1, heads // max(1, key.shape[1]))
    query_square, key_square = (_squares(x, out, rows) for x, out in ((query, left_out), (key, hidden)))
    nonfinite = NonFinite(
        ~_squares(query, None, rows).isfinite(),
        (~_squares(key, None, rows).isfinite()).repeat_interleave(group, 1),
        _not_finite(context.value_size, group),
        _not_finite(context.out_size),
    )
    rows_left_out = None if left_out is None else left_out[:, None]
    if index is not None:
        count, first = (masks.take_rows(x.expand(query.shape[:3]), index) for x in (count, first))
        count = torch.where(index >= 0, count, -1)
        if rows_left_out is not None:
            rows_left_out = masks.take_rows(rows_left_out.expand(query.shape[:3]), index)
        if nonfinite.out is not None:
            nonfinite = nonfinite._replace(out=masks.take_rows(nonfinite.out.expand(query.shape[:3]), index))
    sink_mass, rest = sink_weights(query, key, rows, count, first, options, context.shared_key)
    return Measured(
        count,
        sink_mass,
        rest,
        query_square,
        key_square.repeat_interleave(group, 1),
        0 if context.continues else sequences,
        options.scale,
        _score_kind(options),
        rows_left_out,
        max(0, num_keys - num_queries) if context.continues else 0,
        nonfinite,
    )


def _squares(x: Tensor, left_out: Tensor | None, rows: RowStats) -> Tensor:
    squares = x.to(rows.lse.dtype).square().sum(-1)
    return squares if left_out is None else torch.where(left_out[:, None], 0.0, squares)


def _not_finite(size: Tensor | None, group: int = 1) -> Tensor | None:
    return None if size is None else (~size.isfinite()).repeat_interleave(group, 1)


def _score_kind(options: Options) -> int:
    if options.softcap is not None or options.sinks is not None:
        return OTHER
    additive = options.attn_mask is not None and options.attn_mask.dtype != torch.bool
    return BIASED if additive else PLAIN


@torch.no_grad()
def shared_key(
    query: Tensor, key: Tensor, rows: RowStats, options: Options, left_out: Tensor | None
) -> Tensor:
    """The key with the most weight over SHARED_ROWS rows of a head, int64 (B, H); -1 where none counts.

    There is at least one row and one key.
    """
    return heaviest(column_weights(query, key, *rows_asked(query, rows, left_out), options))


def column_weights(query: Tensor, key: Tensor, index: Tensor, lse: Tensor, options: Options) -> Tensor:
    """Weight of each key, (B, H, N), summed over some rows: index, int64 (B, H, R), -1 for none, and their lse."""
    batch, heads = query.shape[:2]
    weights = query.new_zeros(batch, heads, key.shape[2], dtype=lse.dtype)
    wide = key.to(compute_dtype(query))
    for chunk in masks.row_chunks(index.shape[2], key.shape[2], batch * heads):
        part = score_rows(query, wide, index[:, :, chunk], options)
        weights += torch.where(part.seen, (part.scores - lse[:, :, chunk, None]).exp(), 0.0).sum(2)
    return weights


def rows_asked(query: Tensor, rows: RowStats, left_out: Tensor | None) -> tuple[Tensor, Tensor]:
    """Numbers of the rows that are asked which key they share, int64 (B, H, R), -1 for none, and their lse."""
    places = shared_places(rows.lse.shape, rows.row_index, left_out, query.device)
    places = places.expand(-1, query.shape[1], -1)
    lse = rows.lse.gather(2, places.clamp(min=0))
    index = places
    if rows.row_index is not None:
        index = torch.where(places >= 0, rows.row_index.gather(2, places.clamp(min=0)), -1)
    return index, lse


def heaviest(weights: Tensor) -> Tensor:
    """The key with the largest of the weights (B, H, N), int64 (B, H); -1 where no weight is above 0."""
    most, place = weights.max(2)
    return torch.where(most > 0, place, -1)


def sink_weights(
    query: Tensor,
    key: Tensor,
    rows: RowStats,
    count: Tensor,
    first: Tensor,
    options: Options,
    shared: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(sink_mass, rest_entropy) of `Measured`, (B, H, M) each; 0 for an empty row.

    count, first: visible keys and the first of them, as `masks.visible_keys` says. shared: of `shared_key`.
    """
    lse = rows.lse
    if lse.numel() == 0 or key.shape[2] == 0:
        return torch.zeros_like(lse), torch.zeros_like(lse)
    row = torch.arange(query.shape[2], device=query.device).expand(lse.shape[:2] + query.shape[2:3])
    if rows.row_index is not None:
        query, row = masks.take_rows(query, rows.row_index), rows.row_index
    weight = _weight_on(query, key, row, first.expand(lse.shape), lse, options)
    if shared is not None:
        place = shared[..., None].expand(lse.shape)
        other = _weight_on(query, key, row, place.clamp(min=0), lse, options)
        weight = torch.maximum(weight, torch.where(place >= 0, other, 0.0))
    learned = torch.zeros_like(lse)
    if options.sinks is not None:
        learned = (options.sinks.to(lse.dtype)[:, None] - lse).exp()
    return sink_and_rest(weight, learned, rows.entropy, count)


def sink_and_rest(weight: Tensor, learned: Tensor, entropy: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """(sink_mass, rest_entropy) from the weights on the sink key and the learned sink, and the row's entropy.

    By the grouping property of entropy: H = (1 - w) H_rest - sum_i w_i log w_i - (1 - w) log(1 - w), with
    w = sum_i w_i over the sink key and the learned sink.
    """
    mass = weight + learned
    rest = entropy + sum(torch.special.xlogy(w, w) for w in (weight, learned, (1.0 - mass).clamp(min=0.0)))
    return torch.where(count > 0, mass, 0.0), torch.where(count > 0, rest.clamp(min=0.0), 0.0)


def _weight_on(
    query: Tensor, key: Tensor, row: Tensor, place: Tensor, lse: Tensor, options: Options
) -> Tensor:
    """Weight of each row on the key at `place`; 0 where the row does not see it. All (B, H, M), M rows of query."""
    scores, seen = scores_at(query, keys_at(key, place), row, place, key.shape[2], options)
    return torch.where(seen, (scores - lse).exp(), 0.0)


def keys_at(key: Tensor, place: Tensor) -> Tensor:
    """The keys (B, H, R, D) at some places of key (B, H_kv, N, D): int64 (B, H, R), none of them negative."""
    batch, heads, num_places = place.shape
    grouped = place.reshape(batch, key.shape[1], -1, 1).expand(-1, -1, -1, key.shape[3])
    return key.gather(2, grouped).reshape(batch, heads, num_places, key.shape[3])


def scores_at(
    query: Tensor, chosen: Tensor, row: Tensor, place: Tensor, num_keys: int, options: Options
) -> tuple[Tensor, Tensor]:
    """Scores of one key for each row, nats, and whether the row sees it; (B, H, R) each.

    query (B, H, R, D): the rows. chosen (B, H, R or 1, D): the keys. row, place: int64 (B, H, R), the positions of
    both among the queries and the `num_keys` keys of the call.
    """
    dtype = compute_dtype(query)
    return from_products((query.to(dtype) * chosen.to(dtype)).sum(-1), row, place, num_keys, options)


def from_products(
    products: Tensor, row: Tensor, place: Tensor, num_keys: int, options: Options
) -> tuple[Tensor, Tensor]:
    """Scores, nats, and which of them are seen, from some products q.k: (B, H, R) or (B, H, R, C).

    row, place: int64, positions of query and key, of a shape that broadcasts to the products'.
    """
    scores = products * options.scale
    if options.softcap is not None:
        scores = options.softcap * (scores / options.softcap).tanh()
    seen = masks.sees(row, place, num_keys, options)
    mask = options.attn_mask
    if mask is not None:
        batch, heads, others = *products.shape[:2], (1,) * (products.dim() - 2)
        b = torch.arange(batch, device=place.device).reshape(-1, 1, *others)
        h = torch.arange(heads, device=place.device).reshape(-1, *others)
        # One number per row, instead of the whole mask. A mask with one row has it for all queries.
        full = mask.expand(batch, heads, mask.shape[2], num_keys)
        row = row.clamp(min=0) if mask.shape[2] > 1 else torch.zeros_like(row)
        part = full[b, h, row, place]
        if mask.dtype == torch.bool:
            seen = seen & part
        else:
            seen, scores = seen & (part != -torch.inf), scores + part.to(scores.dtype)
    return scores, seen
