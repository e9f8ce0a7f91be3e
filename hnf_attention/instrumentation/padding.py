"""Which queries of a call are padding, and which the user leaves out: their rows are not judged.

In self-attention a token whose key is hidden from every query is padding, and so is its query. Cross-attention hides
keys of other tokens. Its queries are those of the self-attention that ran before it in the same block.
"""

from __future__ import annotations

import itertools
import re
import threading
from typing import NamedTuple

import torch
from torch import Tensor

# Of the last two parts of a layer's name.
_CROSS = re.compile(
    r"cross_?att|cross_mha|(^|_)cross$|enc(oder)?_?dec(oder)?_?att|encoder_attn|src_attn|attn2$",
    re.IGNORECASE,
)


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

    @property
    def known(self) -> bool:
        """Whether some queries may be left out of a call without a mask."""
        return self.query_mask is not None or (self._last is not None and self._last.padding is not None)

    def left_out(
        self,
        layer: str,
        batch: int,
        num_queries: int,
        num_keys: int,
        hidden_keys: Tensor | None,
        device: torch.device,
    ) -> Tensor | None:
        """The queries of a call that are not judged, boolean (B, M) on `device`; None for none.

        hidden_keys: boolean (B, N), keys that no query sees; None if a mask hides none.
        """
        shape = (batch, num_queries)
        if self.query_mask is not None and tuple(self.query_mask.shape) == shape:
            self.query_mask = self.query_mask.to(device, non_blocking=True)  # stays there for the next layers
            return ~self.query_mask
        last = self._last
        if last is not None and last.shape == shape and last.layer != layer and same_block(last.layer, layer):
            # An attention of this block, before this one, has shown which of these tokens are padding.
            return None if last.padding is None else last.padding.to(device, non_blocking=True)
        if num_queries == num_keys and not is_cross(layer):
            self._last = _SelfAttention(layer, shape, hidden_keys)
            return hidden_keys
        return None


def is_cross(layer: str) -> bool:
    """Whether the layer's name says that its keys are of other tokens than its queries."""
    return any(_CROSS.search(part) is not None for part in layer.split(".")[-2:])


def same_block(one: str, other: str) -> bool:
    """Whether two layers lie in the same numbered block of a model, as `decoder.block.0.layer.1.attention` says."""
    pairs = zip(one.split("."), other.split("."))
    shared = itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)
    return any(part.isdigit() for part, _ in shared)


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
