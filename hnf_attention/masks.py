"""Which keys a query may see: the one place in PyTorch code that knows packed sequences, causal, window
and user masks.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Rows are taken in chunks so that a materialised mask never exceeds this many elements.
CHUNK_ELEMENTS = 1 << 24


def row_chunks(num_queries: int, num_keys: int, leading: int = 1):
    """Slices of query rows such that leading * rows * num_keys stays near CHUNK_ELEMENTS."""
    rows = max(1, CHUNK_ELEMENTS // max(1, leading * num_keys))
    for start in range(0, num_queries, rows):
        yield slice(start, min(start + rows, num_queries))


def mask_rows(attn_mask: Tensor, rows: slice) -> Tensor:
    """The part of a broadcastable mask that belongs to these query rows."""
    return attn_mask if attn_mask.shape[-2] == 1 else attn_mask[..., rows, :]


def sequence_bounds(seqlens: Tensor, rows: slice, num_keys: int) -> Tensor:
    """First key and one past the last key that each row's sequence holds, (rows, 2) int32.

    Rows past the last sequence get an empty range at its end. The bounds stay within 0..num_keys
    whatever `seqlens` holds: on a GPU its values are never read back to be checked.
    """
    edges = seqlens.clamp(0, num_keys).to(torch.int32)
    positions = torch.arange(rows.start, rows.stop, dtype=torch.int32, device=seqlens.device)
    # The number of sequences that end at or before a position is the index of the one that holds it.
    sequence = torch.searchsorted(edges[1:], positions, right=True)
    return torch.cat([edges, edges[-1:]]).unfold(0, 2, 1)[sequence]


def visible(
    rows: slice,
    num_keys: int,
    *,
    attn_mask: Tensor | None,
    is_causal: bool,
    window_size: int | None,
    seqlens: Tensor | None,
    device: torch.device,
) -> Tensor:
    """Boolean, broadcastable to (B, H, rows, N): True where the query may attend to the key.

    Causal masks are aligned to the top left (query i sees keys 0..i), as in PyTorch's SDPA; a window
    W leaves keys with |i - j| < W; packed sequences leave each query the keys of its own. A boolean
    mask is True where attention is allowed; an additive mask hides a key with -inf.
    """
    i = torch.arange(rows.start, rows.stop, device=device)[:, None]
    j = torch.arange(num_keys, device=device)[None, :]
    seen = torch.ones(rows.stop - rows.start, num_keys, dtype=torch.bool, device=device)
    if is_causal:
        seen &= j <= i
    if window_size is not None:
        seen &= (i - j).abs() < window_size
    if seqlens is not None:
        first, end = sequence_bounds(seqlens, rows, num_keys)[..., None].unbind(1)
        seen &= (j >= first) & (j < end)
    if attn_mask is not None:
        part = mask_rows(attn_mask, rows)
        seen = seen & (part if part.dtype == torch.bool else part != -torch.inf)
    return seen


def visible_keys(
    num_queries: int,
    num_keys: int,
    *,
    attn_mask: Tensor | None,
    is_causal: bool,
    window_size: int | None,
    seqlens: Tensor | None,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Number of visible keys, and the index of the first one (0 where there is none), per query.

    Two int64 tensors broadcastable to (B, H, M). Without a user mask both follow from positions.
    """
    if attn_mask is None:
        i = torch.arange(num_queries, device=device)
        width = num_queries + num_keys if window_size is None else window_size
        first_key, end_key = 0, num_keys
        if seqlens is not None:
            first_key, end_key = sequence_bounds(seqlens, slice(0, num_queries), num_keys).long().unbind(1)
        first = (i - width + 1).clamp(min=first_key)
        last = i if is_causal else i + width - 1
        count = (last.clamp(max=end_key - 1) - first + 1).clamp(min=0)
        return count, torch.where(count > 0, first, 0)
    leading = attn_mask.shape[:-2].numel()
    counts, firsts = [], []
    for rows in row_chunks(num_queries, num_keys, leading):
        seen = visible(
            rows,
            num_keys,
            attn_mask=attn_mask,
            is_causal=is_causal,
            window_size=window_size,
            seqlens=seqlens,
            device=device,
        )
        counts.append(seen.sum(-1))
        firsts.append(seen.to(torch.uint8).argmax(-1) if num_keys else torch.zeros_like(counts[-1]))
    if not counts:
        empty = torch.zeros(*attn_mask.shape[:-2], 0, dtype=torch.int64, device=device)
        return empty, empty
    return torch.cat(counts, -1), torch.cat(firsts, -1)
