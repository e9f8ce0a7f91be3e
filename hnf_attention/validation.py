"""Every shape, dtype and device error of the attention functions, raised once, before anything runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor

from .stats import RowStats

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Options:
    """What changes the scores, validated and normalised: `attn_mask` is 4-D or None, `scale` a float,
    `seqlens` on the query's device.
    """

    attn_mask: Tensor | None
    is_causal: bool
    scale: float
    window_size: int | None
    softcap: float | None
    sinks: Tensor | None
    seqlens: Tensor | None = None


def _require(condition: bool, expected: str, got: object, error: type[Exception] = ValueError) -> None:
    if not condition:
        raise error(f"expected {expected}, got {got}")


def _check_tensor(name: str, tensor: Tensor, query: Tensor) -> None:
    _require(isinstance(tensor, Tensor), f"{name} to be a torch.Tensor", type(tensor).__name__, TypeError)
    _require(tensor.dim() == 4, f"{name} of shape (batch, heads, length, head_dim)", tuple(tensor.shape))
    _require(tensor.dtype in FLOAT_DTYPES, f"{name} of a floating dtype", tensor.dtype, TypeError)
    _require(
        tensor.dtype == query.dtype, f"{name} of the query's dtype {query.dtype}", tensor.dtype, TypeError
    )
    _require(tensor.device == query.device, f"{name} on the query's device {query.device}", tensor.device)


def _check_mask(attn_mask: Tensor, query: Tensor, num_keys: int) -> Tensor:
    _require(
        isinstance(attn_mask, Tensor), "attn_mask to be a torch.Tensor or None", type(attn_mask), TypeError
    )
    allowed = (torch.bool, torch.float32, query.dtype)
    _require(attn_mask.dtype in allowed, f"attn_mask of dtype in {allowed}", attn_mask.dtype, TypeError)
    _require(
        attn_mask.device == query.device, f"attn_mask on the query's device {query.device}", attn_mask.device
    )
    target = (*query.shape[:3], num_keys)
    shape = (1,) * (4 - attn_mask.dim()) + tuple(attn_mask.shape)
    fits = len(shape) == 4 and all(size in (1, full) for size, full in zip(shape, target, strict=True))
    _require(fits, f"attn_mask that broadcasts to (B, H, M, N) = {target}", tuple(attn_mask.shape))
    return attn_mask.reshape(shape)


def _check_seqlens(seqlens: Tensor, query: Tensor, num_keys: int) -> Tensor:
    _require(isinstance(seqlens, Tensor), "seqlens to be a torch.Tensor or None", type(seqlens), TypeError)
    integers = (torch.int32, torch.int64)
    _require(seqlens.dtype in integers, f"seqlens of dtype in {integers}", seqlens.dtype, TypeError)
    shaped = seqlens.dim() == 1 and seqlens.shape[0] > 0
    _require(shaped, "seqlens of shape (sequences + 1,)", tuple(seqlens.shape))
    near = seqlens.device.type == "cpu" or seqlens.device == query.device
    _require(near, f"seqlens on the CPU or the query's device {query.device}", seqlens.device)
    batch, _, num_queries, _ = query.shape
    _require(batch == 1, "a batch of 1 with seqlens (sequences end to end in one row)", f"a batch of {batch}")
    _require(
        num_queries == num_keys,
        "as many keys as queries with seqlens",
        f"{num_keys} keys and {num_queries} queries",
    )
    # Elsewhere the values are not read: that would wait for the device, or break a compiled graph.
    if seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
        first, last = int(seqlens[0]), int(seqlens[-1])
        _require(first == 0, "seqlens to start at 0", first)
        lengths = seqlens.diff()
        _require(bool((lengths >= 0).all()), "seqlens that never decrease", f"lengths {lengths.tolist()}")
        _require(last <= num_keys, f"seqlens to end within the {num_keys} keys", last)
    return seqlens.to(query.device, non_blocking=True)


def _check_sinks(sinks: Tensor, rows: Tensor) -> None:
    """`rows` is any (batch, heads, ...) tensor that the sinks belong to."""
    heads = rows.shape[1]
    _require(isinstance(sinks, Tensor), "sinks to be a torch.Tensor or None", type(sinks), TypeError)
    _require(sinks.shape == (heads,), f"sinks of shape (heads,) = ({heads},)", tuple(sinks.shape))
    _require(sinks.dtype in FLOAT_DTYPES, "sinks of a floating dtype", sinks.dtype, TypeError)
    _require(sinks.device == rows.device, f"sinks on the query's device {rows.device}", sinks.device)


def _check_number(name: str, number: object, *, positive: bool) -> float:
    _require(
        isinstance(number, Real) and not isinstance(number, bool), f"{name} to be a number", number, TypeError
    )
    finite = math.isfinite(number)
    _require(finite and (number > 0 or not positive), f"{name} {'> 0' if positive else 'finite'}", number)
    return float(number)


def check(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    *,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    window_size: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    seqlens: Tensor | None,
) -> Options:
    """Raise ValueError or TypeError for input the attention functions do not take; return `Options`.

    query (B, H, M, D), key (B, H_kv, N, D), value (B, H_kv, N, D_v), H a multiple of H_kv.
    """
    _check_tensor("query", query, query)
    _check_tensor("key", key, query)
    batch, heads, _, head_dim = query.shape
    kv_heads, num_keys = key.shape[1:3]
    _require(key.shape[0] == batch, f"key of the query's batch size {batch}", key.shape[0])
    _require(head_dim > 0, "a head dimension of at least 1", head_dim)
    _require(key.shape[3] == head_dim, f"key of the query's head dimension {head_dim}", key.shape[3])
    divides = heads == kv_heads or (kv_heads > 0 and heads % kv_heads == 0)
    _require(divides, f"query heads to be a multiple of the {kv_heads} key heads", f"{heads} query heads")
    if value is not None:
        _check_tensor("value", value, query)
        expected = (batch, kv_heads, num_keys)
        _require(value.shape[:3] == expected, f"value of shape {expected} + (D_v,)", tuple(value.shape))
        _require(value.shape[3] > 0, "a value head dimension of at least 1", value.shape[3])
    _require(isinstance(is_causal, bool), "is_causal to be a bool", is_causal, TypeError)
    if window_size is not None:
        whole = isinstance(window_size, int) and not isinstance(window_size, bool)
        _require(whole, "window_size to be an int or None", window_size, TypeError)
        _require(window_size >= 1, "window_size >= 1 (1 is the query's own position)", window_size)
        # Beyond this a window hides nothing; "no window" sentinels near 2**31 would overflow positions.
        window_size = max(1, min(window_size, query.shape[2] + num_keys))
    if softcap is not None:
        softcap = _check_number("softcap", softcap, positive=True)
    if sinks is not None:
        _check_sinks(sinks, query)
    return Options(
        attn_mask=None if attn_mask is None else _check_mask(attn_mask, query, num_keys),
        is_causal=is_causal,
        scale=head_dim**-0.5 if scale is None else _check_number("scale", scale, positive=False),
        window_size=window_size,
        softcap=softcap,
        sinks=sinks,
        seqlens=None if seqlens is None else _check_seqlens(seqlens, query, num_keys),
    )


def check_merge(blocks: Sequence[RowStats], outs: Sequence[Tensor], sinks: Tensor | None) -> None:
    """Raise ValueError or TypeError for row statistics (and partial outputs) that cannot be merged.

    `outs` has one output per block, or none at all.
    """
    _require(len(blocks) > 0, "at least one key block to merge", "none")
    for block in blocks:
        _require(isinstance(block, RowStats), "blocks to be RowStats", type(block).__name__, TypeError)
    first = blocks[0].lse
    for block in blocks:
        for tensor in (block.lse, block.entropy, block.max_logit, block.min_logit):
            _require(
                tensor.shape == first.shape, f"blocks of shape {tuple(first.shape)}", tuple(tensor.shape)
            )
            _require(tensor.dtype == first.dtype, f"blocks of dtype {first.dtype}", tensor.dtype, TypeError)
            _require(tensor.device == first.device, f"blocks on {first.device}", tensor.device)
    for out in outs:
        expected = (*first.shape, outs[0].shape[-1])
        _require(out.shape == expected, f"outputs of shape {tuple(expected)}", tuple(out.shape))
        _require(out.device == first.device, f"outputs on {first.device}", out.device)
    if sinks is not None:
        _check_sinks(sinks, first)
