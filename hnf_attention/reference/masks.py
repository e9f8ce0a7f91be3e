"""Rows of queries, and which keys they may see: the one place in PyTorch code that knows packed sequences,
causal, window and user masks.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .options import Options

# Rows are taken in chunks, so that a materialised mask never exceeds this many elements.
CHUNK_ELEMENTS = 1 << 24


def row_chunks(num_queries: int, num_keys: int, leading: int = 1) -> Iterator[slice]:
    """Slices of query rows such that leading * rows * num_keys stays near CHUNK_ELEMENTS."""
    rows = max(1, CHUNK_ELEMENTS // max(1, leading * num_keys))
    for start in range(0, num_queries, rows):
        yield slice(start, min(start + rows, num_queries))


def take_rows(x: Tensor, rows: slice | Tensor) -> Tensor:
    """Rows of x, (B, H, M) or (B, H, M, C): a slice, or those of a sample.

    rows: the row numbers of a sample are int64 (B, H, M_s); row 0 stands in for -1.
    """
    if isinstance(rows, slice):
        return x[:, :, rows]
    index = rows.clamp(min=0)
    if x.dim() == 4:
        index = index[..., None].expand(*index.shape, x.shape[3])
    return x.gather(2, index)


def mask_rows(attn_mask: Tensor, rows: slice | Tensor) -> Tensor:
    """The part of a broadcastable mask that belongs to these query rows, given as for `take_rows`."""
    if attn_mask.shape[-2] == 1:
        return attn_mask
    if isinstance(rows, slice):
        return attn_mask[..., rows, :]
    return take_rows(attn_mask.expand(*rows.shape[:2], *attn_mask.shape[2:]), rows)


def sequence_edges(seqlens: Tensor, num_keys: int) -> Tensor:
    """Where packed sequences begin and the last one ends, int64 (S + 1,).

    Edges lie within 0..num_keys whatever `seqlens` holds: on a GPU its numbers are never read back for a check.
    """
    return seqlens.clamp(0, num_keys).long()


def sequence_bounds(seqlens: Tensor, positions: Tensor, num_keys: int) -> tuple[Tensor, Tensor]:
    """First key, and one past the last key, of the sequence that holds each position; int64, of their shape.

    Positions past the last sequence get an empty range at its end.
    """
    edges = sequence_edges(seqlens, num_keys)
    # The number of sequences that end at or before a position is the index of the one that holds it.
    sequence = torch.searchsorted(edges[1:], positions.contiguous(), right=True)
    return edges[sequence], torch.cat([edges[1:], edges[-1:]])[sequence]


def num_sequences(seqlens: Tensor, num_keys: int) -> Tensor:
    """How many packed sequences hold a token; int64 without dimensions."""
    return (sequence_edges(seqlens, num_keys).diff() > 0).sum()


def sees(i: Tensor, j: Tensor, num_keys: int, options: Options) -> Tensor:
    """Whether positions let query i see key j, without the user mask; boolean, of their broadcast shape."""
    seen = (i >= 0) & (j >= 0)
    if options.is_causal:
        seen &= j <= i
    if options.window_size is not None:
        seen &= (i - j).abs() < options.window_size
    if options.seqlens is not None:
        first, end = sequence_bounds(options.seqlens, i, num_keys)
        seen &= (j >= first) & (j < end)
    return seen


def visible(rows: slice | Tensor, num_keys: int, options: Options, device: torch.device) -> Tensor:
    """Boolean, broadcastable to (B, H, rows, N): True where the query may attend to the key.

    rows: a slice, or the row numbers of a sample, (B, H, rows), of which -1 sees nothing.
    Causal masks are aligned to the top left (query i sees keys 0..i), as in PyTorch's SDPA. A window
    W keeps keys with |i - j| < W. A query of a packed sequence sees keys of its own sequence. A boolean
    mask is True where attention is allowed; an additive mask hides a key with -inf.
    """
    i = (torch.arange(rows.start, rows.stop, device=device) if isinstance(rows, slice) else rows)[..., None]
    seen = sees(i, torch.arange(num_keys, device=device), num_keys, options)
    if options.attn_mask is not None:
        part = mask_rows(options.attn_mask, rows)
        seen = seen & (part if part.dtype == torch.bool else part != -torch.inf)
    return seen


def visible_keys(
    num_queries: int, num_keys: int, options: Options, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Number of visible keys, and the index of the first one (0 if there is none), per query.

    Two int64 tensors broadcastable to (B, H, M). Without a user mask both follow from positions.
    """
    attn_mask, window_size = options.attn_mask, options.window_size
    if attn_mask is None:
        i = torch.arange(num_queries, device=device)
        width = num_queries + num_keys if window_size is None else window_size
        first_key: int | Tensor = 0
        end_key: int | Tensor = num_keys
        if options.seqlens is not None:
            first_key, end_key = sequence_bounds(options.seqlens, i, num_keys)
        first = (i - width + 1).clamp(min=first_key)
        last = i if options.is_causal else i + width - 1
        count = (last.clamp(max=end_key - 1) - first + 1).clamp(min=0)
        return count, torch.where(count > 0, first, 0)
    leading = attn_mask.shape[:-2].numel()
    counts, firsts = [], []
    for rows in row_chunks(num_queries, num_keys, leading):
        seen = visible(rows, num_keys, options, device)
        counts.append(seen.sum(-1))
        firsts.append(seen.to(torch.uint8).argmax(-1) if num_keys else torch.zeros_like(counts[-1]))
    if not counts:
        empty = torch.zeros(*attn_mask.shape[:-2], 0, dtype=torch.int64, device=device)
        return empty, empty
    return torch.cat(counts, -1), torch.cat(firsts, -1)
