"""Keys and values of earlier tokens, as decoders keep them between forwards."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..statistics.checks import expected


class KeyValueCache(Protocol):
    """What keeps keys and values of a model's layers: transformers' `DynamicCache`, `StaticCache` and their like."""

    def get_seq_length(self, layer_idx: int) -> int | Tensor:
        """How many tokens the layer has had."""

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Take in (B, H_kv, M, D) of new tokens. Returns the keys and values that their queries attend to.

        These are (B, H_kv, N, D). The new tokens come last, or each token has the place of its position. The rest of
        the places is then unused.
        """


class Seen(NamedTuple):
    """What the queries of new tokens see. first: the first key of those that `update` returned that any of them sees.

    The rest is as `attention` takes it, of the keys from `first` on.
    """

    attn_mask: Tensor | None
    is_causal: bool
    window_size: int | None
    first: int = 0


def length(cache: KeyValueCache | None, layer_idx: int) -> int | Tensor:
    """How many tokens the layer has had; 0 without a cache. Raises TypeError for an object that is no cache."""
    if cache is None:
        return 0
    if not (hasattr(cache, "get_seq_length") and hasattr(cache, "update")):
        raise expected(
            "past_key_values with `get_seq_length` and `update`, as a Cache of transformers",
            type(cache).__name__,
            TypeError,
        )
    past = cache.get_seq_length(layer_idx)
    return past.clone() if isinstance(past, Tensor) else past  # `update` counts in place


def seen(past: int | Tensor, sizes: tuple[int, int], device: torch.device, options: Seen) -> Seen:
    """What queries see after `past` earlier tokens.

    sizes: M new tokens, and N keys that `update` returned. options: what the module was asked for, by the positions of
    tokens. Its mask is broadcastable to (B, H, M, N). Raises ValueError or TypeError for one that is not.
    """
    num_queries, num_keys = sizes
    known = not isinstance(past, Tensor)
    if known and past == 0 and num_queries == num_keys:
        return options
    attn_mask, is_causal, window, _ = options
    if attn_mask is not None:
        attn_mask = _checked(attn_mask, sizes)
    end = past + num_queries
    if known and num_queries == 1 and num_keys <= end:  # it is the last one, so nothing lies behind it
        first = 0 if window is None else max(0, num_keys - window)
        mask = attn_mask if attn_mask is None or attn_mask.shape[-1] == 1 else attn_mask[..., first:]
        return Seen(mask, False, None, first)
    query = past + torch.arange(num_queries, device=device)[:, None]
    left: Any = end - num_keys  # keys that the cache has dropped, as those before a window
    key = torch.arange(num_keys, device=device) + (max(0, left) if known else left.clamp(min=0))
    shown = key < end
    if is_causal:
        shown = shown & (key <= query)
    if window is not None:
        shown = shown & ((query - key).abs() < window)
    shown = shown.expand(num_queries, num_keys)
    if attn_mask is None:
        return Seen(shown, False, None)
    if attn_mask.dtype == torch.bool:
        return Seen(attn_mask & shown, False, None)
    return Seen(torch.where(shown, attn_mask, -torch.inf), False, None)


def _checked(attn_mask: Tensor, sizes: tuple[int, int]) -> Tensor:
    """A mask of at least one dimension. What follows would give a wrong one a shape or a dtype that is accepted."""
    if attn_mask.dtype != torch.bool and not attn_mask.is_floating_point():
        raise expected("attn_mask of a boolean or floating dtype", attn_mask.dtype, TypeError)
    shape = (1, 1, *attn_mask.shape)[-2:]
    if not all(size in (1, full) for size, full in zip(shape, sizes, strict=True)):
        target = f"(M, N) = {sizes}, N the keys that the cache returned"
        raise expected(f"attn_mask that broadcasts to {target}", tuple(attn_mask.shape))
    return attn_mask if attn_mask.dim() else attn_mask[None]
