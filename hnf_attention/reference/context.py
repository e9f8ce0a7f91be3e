"""What is known of an attention call beside its queries, keys and options."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import masks
from .options import Options


class Context(NamedTuple):
    """Which rows and keys of a call count, and what became of it. Each field may be None, or unknown.

    left_out: boolean (B, M), queries that are not judged: padding, or those that a query mask leaves out.
    hidden_keys: boolean (B, N), keys that no query sees: padding.
    shared_key: int64 (B, H), the key with the most weight over the rows of a head, -1 where there is none.
    value_size: (B, H_kv, N), largest |v| of each key; NaN or inf if the value is not finite.
    out_size: broadcastable to (B, H, M), largest |out| of each row, likewise.
    continues: the call continues the call before it, as in decoding with a cache: only its last M keys are new.
    """

    left_out: Tensor | None = None
    hidden_keys: Tensor | None = None
    shared_key: Tensor | None = None
    value_size: Tensor | None = None
    out_size: Tensor | None = None
    continues: bool = False


UNKNOWN = Context()


def hidden_keys(options: Options, batch: int, num_queries: int, num_keys: int) -> Tensor | None:
    """Keys that a user mask hides from every query of every head, boolean (B, N); None without a mask."""
    mask = options.attn_mask
    if mask is None or num_queries == 0:
        return None
    seen = mask if mask.dtype == torch.bool else mask != -torch.inf
    seen = seen.flatten(1, 2).any(1) if mask.shape[2] == 1 else seen.any(2).any(1)
    return ~seen.expand(batch, num_keys)


def largest(x: Tensor) -> Tensor:
    """Largest |x| over the last dimension; NaN or inf if one of the numbers is."""
    if x.shape[-1] == 0:
        return x.new_zeros(x.shape[:-1])
    return torch.linalg.vector_norm(x.detach(), torch.inf, dim=-1)


SHARED_ROWS = 32  # rows of a head that are asked which key they share
LEAST_ROWS = 8  # fewer share no key: of a single row it would be the key with the largest weight


def shared_places(
    rows_per_head: Sequence[int], index: Tensor | None, left_out: Tensor | None, device: torch.device
) -> Tensor:
    """Places of up to SHARED_ROWS rows, evenly spread over those that count; int64 (B, H or 1, R), -1 for none.

    rows_per_head: (B, H, M), or (B, H, M_s) of a sample. index: its rows. left_out: boolean (B, M).
    """
    batch, heads, num_rows = rows_per_head
    steps = torch.arange(SHARED_ROWS, device=device) + 0.5
    if num_rows < LEAST_ROWS:
        return torch.full((batch, 1, SHARED_ROWS), -1, device=device)
    if left_out is None:
        places = (steps * (num_rows / SHARED_ROWS)).long()
        return places.expand(batch, 1, -1)
    counts = ~left_out[:, None]
    if index is not None:
        counts = masks.take_rows(counts.expand(-1, heads, -1), index) & (index >= 0)
    total = counts.sum(-1, keepdim=True)
    wanted = (steps * (total / SHARED_ROWS)).long()
    order = counts.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)
    return torch.where(total >= LEAST_ROWS, order.gather(-1, wanted), -1)
