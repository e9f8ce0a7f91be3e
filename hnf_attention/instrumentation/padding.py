"""Which queries of a call are padding, and which the user leaves out: their rows are not judged.

In self-attention a token whose key is hidden from every query is padding, and so is its query. Cross-attention hides
keys of other tokens. Its queries are those of the self-attention that ran before it in the same block.
"""

from __future__ import annotations

import re
import threading
from typing import NamedTuple

import torch
from torch import Tensor

_CROSS = re.compile("cross|enc_?dec|encoder_?decoder|encoder_attn|multihead_attn|attn2", re.IGNORECASE)


class _SelfAttention(NamedTuple):
    layer: str
    shape: tuple[int, int]  # B, M
    padding: Tensor | None  # boolean (B, M)


class Padding(threading.local):
    """What is known of the queries on this thread.

    query_mask: boolean (B, M), True for queries that are judged; None for all.
    """

    def __init__(self) -> None:
        self.query_mask: Tensor | None = None
        self._last: _SelfAttention | None = None

    def left_out(
        self, layer: str, batch: int, num_queries: int, num_keys: int, hidden_keys: Tensor | None
    ) -> Tensor | None:
        """The queries of a call that are not judged, boolean (B, M); None for none.

        hidden_keys: boolean (B, N), keys that no query sees; None if a mask hides none.
        """
        shape = (batch, num_queries)
        if self.query_mask is not None and tuple(self.query_mask.shape) == shape:
            return ~self.query_mask
        if num_queries == num_keys and not is_cross(layer):
            self._last = _SelfAttention(layer, shape, hidden_keys)
            return hidden_keys
        last = self._last
        if last is not None and last.shape == shape and same_block(last.layer, layer):
            return last.padding
        return None


def is_cross(layer: str) -> bool:
    """Whether the layer's name says that its keys are of other tokens than its queries."""
    return _CROSS.search(layer) is not None


def same_block(one: str, other: str) -> bool:
    """Whether two layers lie in the same numbered block of a model, as `decoder.block.0.layer.1.attention` says."""
    shared = [a for a, b in zip(one.split("."), other.split(".")) if a == b]
    return any(part.isdigit() for part in shared)


def checked_query_mask(mask: Tensor | None) -> Tensor | None:
    """A query mask as boolean. Raises TypeError or ValueError for anything but a (B, M) mask of bool or integers."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor):
        raise TypeError(f"expected query_mask to be a tensor or None, got {type(mask).__name__}")
    if mask.dim() != 2 or mask.is_floating_point() or mask.is_complex():
        raise ValueError(
            f"expected query_mask to be a boolean or integer (B, M), got {mask.dtype} {tuple(mask.shape)}"
        )
    return mask.detach().to(torch.bool)
