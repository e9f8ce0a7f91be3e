"""Rows whose keys come in blocks, as a ring passes them: their exact statistics, and what a fold needs beside them.

No block has to be kept: beside statistics of the rows, a few keys of it are, among them the sink that rows share.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..reference import masks
from ..reference.context import hidden_keys, largest, shared_places
from ..reference.measured import (
    BIASED,
    OTHER,
    PLAIN,
    Measured,
    NonFinite,
    from_products,
    heaviest,
    keys_at,
    scores_at,
    sink_and_rest,
)
from ..reference.options import Options
from ..statistics.rows import RowStats
from . import api, fold
from .call import check

#: So many keys of a block may turn out to be the sink that rows share. All weights of a block are at least what they
#: are among all keys, so a key with more than 1 / (KEPT_KEYS + 1) of the weight of the rows is always among these.
KEPT_KEYS = 64
#: What a row without a visible key has.
_EMPTY = {
    "lse": -torch.inf,
    "entropy": 0.0,
    "max_logit": -torch.inf,
    "min_logit": torch.inf,
    "log_denominator": 0.0,
}


class _Meeting(NamedTuple):
    """Some rows, first..end, that met a block of keys. asked: those of them that are asked for sinks, int64 (B, H, R),
    counted from `first`, -1 for none.
    """

    first: int
    end: int
    options: Options
    asked: Tensor


class _Block:
    """What is kept of a block of keys (B, H_kv, N, D), which different rows may meet.

    square: squared lengths, (B, H_kv, N). value_size: (B, H_kv, N), None if it is not known. hidden: boolean (B, N),
    keys that no query has seen, None for none. places, keys: the keys that may be the sink which rows share, int64
    (B, H, C) and (B, H, C, D).
    """

    def __init__(self, key: Tensor, value: Tensor | None, hidden: Tensor | None, dtype: torch.dtype):
        self.square = key.to(dtype).square().sum(-1)
        self.value_size = None if value is None else largest(value)
        self.hidden = hidden
        self.places: list[Tensor] = []
        self.keys: list[Tensor] = []
        self.meetings: list[_Meeting] = []

    def meet(self, hidden: Tensor | None) -> None:
        """Other queries see the keys, but for `hidden` ones."""
        self.hidden = None if hidden is None or self.hidden is None else self.hidden & hidden

    @property
    def visible_square(self) -> Tensor:
        """Squared lengths of the keys that some query sees, 0 for the others."""
        return self.square if self.hidden is None else self.square.masked_fill(self.hidden[:, None], 0.0)

    def weights(self, query: Tensor, lse: Tensor) -> Tensor:
        """Weight of each kept key, (B, H, C), summed over the rows that are asked. query, lse: of all rows."""
        keys, places = torch.cat(self.keys, 2).to(lse.dtype), torch.cat(self.places, 2)
        total = torch.zeros_like(places, dtype=lse.dtype)
        for first, end, options, index in self.meetings:
            asked = masks.take_rows(query[:, :, first:end], index).to(lse.dtype)
            products, row, place = asked @ keys.transpose(2, 3), index[..., None], places[:, :, None]
            scores, seen = from_products(products, row, place, self.square.shape[2], options)
            there = lse[:, :, first:end].gather(2, index.clamp(min=0))[..., None]
            total += torch.where(seen, (scores - there).exp(), 0.0).sum(2)
        return total


class BlockRows:
    """The rows of queries (B, H, M, D), merged over blocks of keys.

    scale, softcap, sinks: as `attention` takes them. left_out: boolean (B, M), rows that are not judged; None for none.
    """

    def __init__(
        self,
        query: Tensor,
        *,
        scale: float | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
        left_out: Tensor | None = None,
    ):
        batch, heads, num_queries, _ = query.shape
        self._query, self._sinks, self._left_out = query.detach(), sinks, left_out
        self._scale, self._softcap = scale, softcap
        places = shared_places((batch, heads, num_queries), None, left_out, query.device)
        self._asked = places.expand(batch, heads, -1)
        self._rows: RowStats | None = None
        self._count = torch.zeros(1, 1, num_queries, dtype=torch.int64, device=query.device)
        # The first visible key of each row: where it is in the sequence, and its score.
        self._first = torch.full_like(self._count, torch.iinfo(torch.int64).max)
        self._first_score: Tensor | None = None
        self._blocks: dict[int, _Block] = {}
        self._scale_used = 1.0
        self._kind = PLAIN if softcap is None and sinks is None else OTHER

    @property
    def begun(self) -> bool:
        """Whether there was a block."""
        return self._rows is not None

    @torch.no_grad()
    def add(
        self,
        key: Tensor,
        value: Tensor | None = None,
        *,
        start: int = 0,
        queries: slice = slice(None),
        is_causal: bool = False,
        attn_mask: Tensor | None = None,
        rows: RowStats | None = None,
    ) -> None:
        """Merge a block of keys (B, H_kv, N, D) into rows of queries.

        value: (B, H_kv, N, D_v), looked at for NaN and inf. start: the position of its first key in the sequence.
        Blocks of the same start hold the same keys. queries: the rows that meet the block. is_causal, attn_mask: as
        `attention` takes them, of these rows and this block alone. rows: their statistics, (B, H, rows), if known.

        Raises ValueError or TypeError as `attention` does.
        """
        first, end, _ = queries.indices(self._query.shape[2])
        query = self._query[:, :, first:end]
        options = check(
            query,
            key,
            value,
            attn_mask=attn_mask,
            is_causal=is_causal,
            scale=self._scale,
            window_size=None,
            softcap=self._softcap,
            sinks=None,
        )
        batch, _, num_rows, _ = query.shape
        num_keys = key.shape[2]
        self._scale_used = options.scale
        hidden = hidden_keys(options, batch, num_rows, num_keys)
        if rows is None:
            rows = api.attend(query, key, None, options, extended=True, detached=True)[1]
        if start in self._blocks:
            self._blocks[start].meet(hidden)
        else:
            self._blocks[start] = _Block(key, value, hidden, rows.lse.dtype)
        if attn_mask is not None and attn_mask.dtype != torch.bool:
            self._kind = max(self._kind, BIASED)
        if query.numel() and num_keys:
            self._look_for_sinks(query, key, rows, options, (first, end), start)
        self._merge(rows, first, self._query.shape[2] - end)

    def _merge(self, rows: RowStats, before: int, after: int) -> None:
        """Merge statistics of some rows; those before and after them meet no key."""

        def padded(name: str) -> Any:
            x = getattr(rows, name)
            return None if x is None else pad(x, (before, after), value=_EMPTY[name])

        mine = RowStats(**{name: padded(name) for name in _EMPTY})
        self._rows = mine if self._rows is None else self._rows.merge(mine)

    def _look_for_sinks(
        self,
        query: Tensor,
        key: Tensor,
        rows: RowStats,
        options: Options,
        edges: tuple[int, int],
        start: int,
    ) -> None:
        """Note the first key that each row sees, and the keys of the block that have the most weight."""
        first, end = edges
        around = (first, self._query.shape[2] - end)
        shape, num_keys = query.shape[:3], key.shape[2]
        count, place = masks.visible_keys(shape[2], num_keys, options, query.device)
        count, place = (x.expand(*(1,) * (3 - x.dim()), *x.shape) for x in (count, place))
        place = place.expand(shape)
        scores = _scores(query, key, place, place, num_keys, options)[0]
        position = pad(torch.where(count > 0, place + start, torch.iinfo(torch.int64).max), around, value=0)
        sees_some = pad(count, around)
        sooner = (sees_some > 0) & (position < self._first)
        self._first = torch.where(sooner, position, self._first)
        padded = pad(scores, around)
        known = torch.full_like(padded, -torch.inf) if self._first_score is None else self._first_score
        self._first_score = torch.where(sooner, padded, known)
        self._count = self._count + sees_some

        inside = (self._asked >= first) & (self._asked < end)
        asked = torch.where(inside, self._asked - first, -1)
        lse = rows.lse.gather(2, asked.clamp(min=0))
        weights = fold.column_weights(query, key, asked, lse, options)
        top = weights.topk(min(KEPT_KEYS, num_keys), 2).indices
        block = self._blocks[start]
        block.places.append(top)
        block.keys.append(keys_at(key, top))
        block.meetings.append(_Meeting(first, end, options, asked))

    @torch.no_grad()
    def result(self, output: Tensor | None = None) -> tuple[RowStats, Measured]:
        """Statistics of all rows, (B, H, M), and what a fold needs beside them. output: (B, H or 1, M, any).

        Raises ValueError before the first block.
        """
        if self._rows is None:
            raise ValueError("expected at least one block of keys, got none")
        query, rows = self._query, self._rows
        blocks, dtype = list(self._blocks.values()), rows.lse.dtype
        group = query.shape[1] // blocks[0].square.shape[1]
        learned = torch.zeros_like(rows.lse)
        if self._sinks is not None:
            rows = rows.merge(sinks=self._sinks)
            learned = (self._sinks.to(dtype)[:, None] - rows.lse).exp()
        weight = self._shared_weight(rows.lse)
        if self._first_score is not None:
            on_first = (self._first_score - rows.lse).exp()
            weight = torch.maximum(weight, torch.where(self._first_score > -torch.inf, on_first, 0.0))
        count = self._count.expand(rows.lse.shape)
        sink_mass, rest = sink_and_rest(weight, learned, rows.entropy, count)
        squares = query.to(dtype).square().sum(-1)
        counted = squares if self._left_out is None else squares.masked_fill(self._left_out[:, None], 0.0)
        key_bad = torch.cat([~x.square.isfinite() for x in blocks], 2).repeat_interleave(group, 1)
        sizes = [x.value_size for x in blocks if x.value_size is not None]
        value_bad = None
        if len(sizes) == len(blocks):
            value_bad = ~torch.cat(sizes, 2).isfinite().repeat_interleave(group, 1)
        out_bad = None if output is None else ~largest(output).isfinite()
        beside = Measured(
            count,
            sink_mass,
            rest,
            counted,
            torch.cat([x.visible_square for x in blocks], 2).repeat_interleave(group, 1),
            scale=self._scale_used,
            score_kind=self._kind,
            left_out=None if self._left_out is None else self._left_out[:, None],
            nonfinite=NonFinite(~squares.isfinite(), key_bad, value_bad, out_bad),
        )
        return rows, beside

    def _shared_weight(self, lse: Tensor) -> Tensor:
        """Weight of each row on the key that has the most weight over the rows that are asked, (B, H, M)."""
        weight, blocks = torch.zeros_like(lse), [block for block in self._blocks.values() if block.meetings]
        if not blocks:
            return weight
        weights = [block.weights(self._query, lse) for block in blocks]
        winner = heaviest(torch.cat(weights, 2))[..., None]
        chosen, before = winner.clamp(min=0), 0
        places = torch.cat([x for block in blocks for x in block.places], 2).gather(2, chosen)
        keys = torch.cat([x for block in blocks for x in block.keys], 2)
        key = keys.gather(2, chosen[..., None].expand(-1, -1, -1, keys.shape[3]))
        for block, of_block in zip(blocks, weights):
            after = before + of_block.shape[2]
            mine = (winner >= before) & (winner < after)
            for first, end, options, _ in block.meetings:
                part = slice(first, end)
                place = torch.where(mine, places, 0).expand(-1, -1, end - first)
                at, num_keys = torch.zeros_like(place), block.square.shape[2]
                score, seen = _scores(self._query[:, :, part], key, at, place, num_keys, options)
                on_key = torch.where(seen & mine, (score - lse[:, :, part]).exp(), 0.0)
                weight[:, :, part] = torch.maximum(weight[:, :, part], on_key)
            before = after
        return weight


def _scores(
    query: Tensor, key: Tensor, at: Tensor, place: Tensor, num_keys: int, options: Options
) -> tuple[Tensor, Tensor]:
    """`scores_at` of all rows of a block, a bounded number at a time. key: (B, H_kv, any, D), at: which of these."""
    batch, heads, num_rows = place.shape
    parts = []
    for rows in masks.row_chunks(num_rows, query.shape[3], batch * heads):
        row = torch.arange(rows.start, rows.stop, device=query.device).expand(batch, heads, -1)
        chosen = keys_at(key, at[:, :, rows])
        parts.append(scores_at(query[:, :, rows], chosen, row, place[:, :, rows], num_keys, options))
    scores, seen = zip(*parts)
    return torch.cat(scores, 2), torch.cat(seen, 2)
