"""Which keys a query sees by its position, in the words of FlashAttention and its like, as options of `attention`.

Their causal masks and windows are aligned to the bottom right: the last query is at the last key. Ours are aligned to
the top left. Where the two differ, positions become a mask of up to MASK_BYTES, or else a function over the scores.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from .call import WRITTEN_MASK, AttentionCall, Unmeasurable
from .shared_masks import once

MASK_BYTES = 1 << 28


class Positions(NamedTuple):
    """How positions shape a call of M queries and N keys.

    left, right: query i sees the keys from i + N - M - left to i + N - M + right; None for no bound.
    num_queries, num_keys: int64 (B,), where a sequence has fewer than the tensors: its M and N. They come first.
    first_key: int64 (B,), keys before it are hidden; N still counts them.
    slopes: (H,) or (B, H): -slope * |i + N - M - j| is added to the scores (ALiBi, arXiv 2108.12409).
    """

    left: int | None = None
    right: int | None = None
    num_queries: Tensor | None = None
    num_keys: Tensor | None = None
    first_key: Tensor | None = None
    slopes: Tensor | None = None


@torch.no_grad()
def place(call: AttentionCall, positions: Positions) -> None:
    """Set the fields of a call without any mask, so that its queries see what their positions say.

    Raises Unmeasurable if no field can say it.
    """
    num_queries, num_keys = call.query.shape[2], call.key.shape[2]
    left, right = positions.left, positions.right
    if left is not None and left >= num_keys - 1:
        left = None  # such a window reaches the first key
    if right is not None and right >= num_queries - 1:
        right = None
    if right == 0 and left == 0 and num_queries == num_keys == 1:
        left = right = None
    positions = positions._replace(left=left, right=right)
    lengths = [x for x in positions[2:5] if x is not None]
    if not lengths and positions.slopes is None:
        if left is right is None:
            return
        if num_queries == num_keys and (right == 0 or right == left):
            call.is_causal = right == 0
            call.window_size = None if left is None else left + 1
            return
    if positions.slopes is not None and positions.slopes.dim() == 2 and call.seqlens is not None:
        raise Unmeasurable("its ALiBi slopes differ by the sequences of a pack")
    batch = call.query.shape[0] if lengths else 1
    size = batch * num_queries * num_keys
    if positions.slopes is not None:
        size *= positions.slopes.shape[-1] * 4
        if positions.slopes.dim() == 2 and not lengths:
            size *= call.query.shape[0]
    sizes = num_queries, num_keys
    if size <= MASK_BYTES:
        make = functools.partial(_mask, positions, sizes, call.query.device)
        tensors = [x for x in (*lengths, positions.slopes) if x is not None]
        if len(tensors) == 1:  # a model gives one table of lengths to all its layers
            what = positions._replace(num_queries=None, num_keys=None, first_key=None, slopes=None)
            which = next(name for name, x in zip(positions._fields, positions) if x is tensors[0])
            call.attn_mask = once(("positions", which, sizes, what), tensors[0], make)
        else:
            call.attn_mask = make()
        if positions.slopes is not None or len(tensors) != 1:
            call.copied = call.copied or WRITTEN_MASK
    elif call.sinks is not None:
        raise Unmeasurable("its learned sinks come with positions whose mask is too large to be written out")
    else:
        call.modify = functools.partial(_modify, positions, sizes)


def _mask(positions: Positions, sizes: tuple[int, int], device: torch.device) -> Tensor:
    """The mask of `positions`: boolean (B or 1, 1, M, N), or with slopes additive (B or 1, H, M, N), fp32."""
    rows = torch.arange(sizes[0], device=device)[None, None]
    bias, seen = _shape(positions, sizes, rows, device)
    return seen if bias is None else torch.where(seen, bias, -torch.inf)


def _modify(
    positions: Positions, sizes: tuple[int, int], scores: Tensor, rows: Tensor
) -> tuple[Tensor, Tensor]:
    """`AttentionCall.modify` of these positions."""
    bias, seen = _shape(positions, sizes, rows, scores.device)
    return scores if bias is None else scores + bias.to(scores.dtype), seen.expand(scores.shape)


def _shape(
    positions: Positions, sizes: tuple[int, int], rows: Tensor, device: torch.device
) -> tuple[Tensor | None, Tensor]:
    """What is added to the scores of these rows, None for nothing, and which keys they see.

    rows: int64, broadcastable to (B, H, R). Both results broadcast to (B, H, R, N).
    """
    left, right, num_queries, num_keys, first_key, slopes = positions
    i, j = rows[..., None], torch.arange(sizes[1], device=device)
    queries = sizes[0] if num_queries is None else num_queries.long()[:, None, None, None]
    keys = sizes[1] if num_keys is None else num_keys.long()[:, None, None, None]
    diagonal = i + (keys - queries)
    seen = (i < queries) & (j < keys)
    if left is not None:
        seen = seen & (j >= diagonal - left)
    if right is not None:
        seen = seen & (j <= diagonal + right)
    if first_key is not None:
        seen = seen & (j >= first_key.long()[:, None, None, None])
    if slopes is None:
        return None, seen
    slopes = slopes.float().view(-1, slopes.shape[-1], 1, 1)
    return -slopes * (diagonal - j).abs(), seen
