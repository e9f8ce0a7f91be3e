"""Sequences of different lengths: end to end in one row, in a cache, or in pages, as (B, H, rows, D).

If queries and keys have the same borders, they stay end to end, in a batch of 1 with `seqlens`. Otherwise each sequence
becomes one of a batch, and what lies past its end counts as no query and no key.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..statistics.eight_bit import widened
from .call import Unmeasurable
from .shared_masks import once

APART = "its queries and keys lie in sequences of different lengths"
CACHE = "it writes to its cache"


@dataclass(slots=True, eq=False)
class Part:
    """Tensors of a call, and how what the function returns corresponds to them.

    query (B, H, M, D), key (B, H_kv, N, D), value (B, H_kv, N, D_v). seqlens: as `attention` takes it.
    lengths: num_queries, num_keys and first_key of `Positions`.
    index: int64 (B, M), the places of the queries in the function's output, where they lay end to end.
    own: boolean (B, M), which of these places are theirs. not_fused, copied: as in `AttentionCall`.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    seqlens: Tensor | None = None
    lengths: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None)
    index: Tensor | None = None
    own: Tensor | None = None
    not_fused: str | None = None
    copied: str | None = None

    def from_output(self, out: Any) -> Tensor | None:
        """(B, H, M, D_v) of the function's output."""
        if not isinstance(out, Tensor):
            return None
        if self.seqlens is not None:
            return out[None].transpose(1, 2)
        if self.index is None or self.own is None:
            return out.transpose(1, 2) if out.dim() == 4 else None
        return _zeroed(out[self.index], self.own).transpose(1, 2)

    def of_output(self, out: Tensor) -> Tensor:
        """What the function returns, of our output (B, H, M, D_v)."""
        return (out[0].transpose(0, 1) if self.seqlens is not None else out.transpose(1, 2)).contiguous()

    def from_lse(self, lse: Tensor) -> Tensor | None:
        """(B, H, M) of an lse (B, H, M), or (H, all queries) where they lay end to end."""
        if self.seqlens is None and self.index is None:
            return lse
        if lse.dim() != 2 or lse.shape[0] != self.query.shape[1]:
            return None
        return lse[None] if self.index is None else lse[:, self.index].transpose(0, 1)


def part_of(take: Callable[..., Any], query: Tensor, key: Tensor, value: Tensor, whole_cache: bool) -> Part:
    """The tensors of a call, by the arguments that say where its sequences lie.

    take: gives the argument of a name, None if there is none. query: (B, M, H, D), or (all queries, H, D) with
    `cu_seqlens_q`. key, value: likewise, or pages (pages, page, H_kv, D). whole_cache: keys are a cache, which may get
    new ones. Raises Unmeasurable for arguments that do not fit.
    """
    both = take("cu_seqlens")
    starts_q, starts_k = (take(name, default=both) for name in ("cu_seqlens_q", "cu_seqlens_k"))
    most_q, most_k = (take(name, "max_seqlen") for name in ("max_seqlen_q", "max_seqlen_k"))
    most_k = most_q if both is not None else most_k
    used_q, used_k = take("seqused_q"), take("seqused_k", "cache_seqlens")
    pages, chosen, first = take("block_table", "page_table"), take("cache_batch_idx"), take("cache_leftpad")
    apart = (used_q, used_k, pages, chosen, first) == (None,) * 5
    if starts_q is not None and starts_k is not None and apart:
        borders, proven = _common(starts_q, starts_k, most_q, most_k, query.shape[0] == key.shape[0])
        if borders is not None:
            query, key, value = (x[None].transpose(1, 2) for x in (query, key, value))
            return Part(query, key, value, borders, not_fused=None if proven else APART)
    new = (take("k"), take("v")) if whole_cache else (None, None)
    if apart and starts_q is starts_k is new[0] is None:
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        return Part(query, key, value, not_fused=CACHE if whole_cache else None)
    with torch.no_grad():  # the model's own attention computes the output
        return _batched(
            Part(query, key, value, not_fused=CACHE if whole_cache else APART),
            (starts_q, most_q, used_q),
            (starts_k, most_k, used_k),
            pages,
            chosen,
            first,
            new,
        )


def _batched(
    part: Part,
    of_queries: tuple[Tensor | None, Any, Tensor | None],
    of_keys: tuple[Tensor | None, Any, Any],
    pages: Tensor | None,
    chosen: Tensor | None,
    first: Tensor | None,
    new: tuple[Tensor | None, Tensor | None],
) -> Part:
    """The part, its tensors as the function has them, with each sequence as one of a batch.

    of_queries, of_keys: borders, the length of the longest, and how many tokens of each count.
    """
    (starts_q, most_q, num_queries), (starts_k, most_k, used_k) = of_queries, of_keys
    query, key, value = part.query, part.key, part.value
    batch = query.shape[0] if starts_q is None else starts_q.shape[0] - 1
    if starts_q is not None:
        part.index, part.own, num_queries = _places(starts_q, most_q, num_queries, query.shape[0])
        query = _zeroed(query[part.index], part.own)
    num_keys = torch.full((batch,), used_k, device=key.device) if isinstance(used_k, int) else used_k
    if pages is not None:
        key, value = (x[pages.long().clamp(min=0)].flatten(1, 2) for x in (key, value))
    elif starts_k is not None:
        places, there, num_keys = _places(starts_k, most_k, num_keys, key.shape[0])
        key, value = _zeroed(key[places], there), _zeroed(value[places], there)
    elif chosen is not None:
        key, value = key[chosen.long()], value[chosen.long()]
    if new[0] is not None:
        if num_keys is None:
            raise Unmeasurable("it adds keys to its cache without cache_seqlens")
        key, value = (_added(x, fresh, num_keys) for x, fresh in zip((key, value), new))
        num_keys = num_keys + new[0].shape[1]
    if key.dim() != 4 or query.dim() != 4 or key.shape[0] != batch:
        raise Unmeasurable(f"query and key of shapes {tuple(query.shape)} and {tuple(key.shape)} do not fit")
    part.query, part.key, part.value = (x.transpose(1, 2) for x in (query, key, value))
    part.lengths, part.copied = (num_queries, num_keys, first), "its sequences lie apart in memory"
    return part


def _common(
    starts_q: Tensor, starts_k: Tensor, most_q: Any, most_k: Any, as_many: bool
) -> tuple[Tensor | None, bool]:
    """The borders of queries and of keys, if they are the same, and whether that is proven; None if they differ.

    as_many: there are as many keys as queries. On a GPU the borders are not read. Where they are equal by all that is
    known, and differ after all, every row counts as empty: such a call may be probed, but not computed.
    """
    if not as_many or starts_q.shape != starts_k.shape:
        return None, False
    if starts_q is starts_k or starts_q.data_ptr() == starts_k.data_ptr():
        return starts_q, True
    if starts_q.device.type == "cpu":
        return (starts_q, True) if torch.equal(starts_q, starts_k) else (None, False)
    if most_q is not most_k and (
        isinstance(most_q, Tensor) or isinstance(most_k, Tensor) or most_q != most_k
    ):
        return None, False
    equal = (starts_q == starts_k).all()
    return once(("common", starts_k.data_ptr()), starts_q, lambda: torch.where(equal, starts_q, 0)), False


def _places(starts: Tensor, most: Any, used: Tensor | None, total: int) -> tuple[Tensor, Tensor, Tensor]:
    """Where the tokens of each sequence lie, int64 (S, most), which places are theirs, and how many they are (S,).

    most: the number of tokens of the longest, None to read it. used: how many of a sequence's tokens count.
    """
    lengths = starts.diff().long()
    count = lengths if used is None else torch.minimum(lengths, used.long())
    longest = int(lengths.max()) if most is None else int(most)
    column = torch.arange(longest, device=starts.device)
    return (starts[:-1, None] + column).clamp(max=max(0, total - 1)).long(), column < count[:, None], count


def _zeroed(x: Tensor, own: Tensor) -> Tensor:
    """x (S, rows, H, D), 0 where a place is no token's."""
    return widened(x).masked_fill(~own[..., None, None], 0)


def _added(cache: Tensor, fresh: Any, count: Tensor) -> Tensor:
    """A copy of a cache (B, N, H_kv, D) with new tokens (B, new, H_kv, D) after the first `count` (B,) of each row."""
    place = count.long()[:, None] + torch.arange(fresh.shape[1], device=cache.device)
    row = torch.arange(cache.shape[0], device=cache.device)[:, None]
    return widened(cache).index_put((row, place), widened(fresh.to(cache.dtype)))
