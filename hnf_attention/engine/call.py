"""Every shape, dtype and device error of the attention functions, raised once, before anything runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import NamedTuple

import torch
from torch import Tensor

from ..statistics.heads import RowStats
from ..tracing import readable

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Options(NamedTuple):
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

    @property
    def plain(self) -> bool:
        """Whether nothing but `is_causal` and `scale` shapes the scores."""
        others = self.attn_mask is self.window_size is self.softcap is self.sinks is None
        return others and self.seqlens is None


def _expected(expected: str, got: object, error: type[Exception] = ValueError) -> Exception:
    return error(f"expected {expected}, got {got}")


def _check_dense(name: str, tensor: object, or_none: str = "") -> None:
    if not isinstance(tensor, Tensor):
        raise _expected(f"{name} to be a torch.Tensor{or_none}", type(tensor).__name__, TypeError)
    # Asking a nested tensor for its shape, or a sparse one for its strides, raises errors of its own.
    if tensor.is_nested or tensor.layout != torch.strided:
        kind = "a nested tensor" if tensor.is_nested else f"one of layout {tensor.layout}"
        raise _expected(f"{name} to be a dense tensor", kind, TypeError)


def _check_tensor(name: str, tensor: Tensor, query: Tensor) -> None:
    _check_dense(name, tensor)
    if tensor.dim() != 4:
        raise _expected(f"{name} of shape (batch, heads, length, head_dim)", tuple(tensor.shape))
    if tensor.dtype not in FLOAT_DTYPES:
        raise _expected(f"{name} of a floating dtype", tensor.dtype, TypeError)
    if tensor.dtype != query.dtype:
        raise _expected(f"{name} of the query's dtype {query.dtype}", tensor.dtype, TypeError)
    if tensor.device != query.device:
        raise _expected(f"{name} on the query's device {query.device}", tensor.device)


def _check_mask(attn_mask: Tensor, query: Tensor, num_keys: int) -> Tensor:
    _check_dense("attn_mask", attn_mask, " or None")
    if attn_mask.dtype not in (torch.bool, torch.float32, query.dtype):
        allowed = list(dict.fromkeys((torch.bool, torch.float32, query.dtype)))
        raise _expected(f"attn_mask of dtype in {allowed}", attn_mask.dtype, TypeError)
    if attn_mask.device != query.device:
        raise _expected(f"attn_mask on the query's device {query.device}", attn_mask.device)
    target = (*query.shape[:3], num_keys)
    shape = (1,) * (4 - attn_mask.dim()) + tuple(attn_mask.shape)
    if len(shape) != 4 or not all(size in (1, full) for size, full in zip(shape, target, strict=True)):
        raise _expected(f"attn_mask that broadcasts to (B, H, M, N) = {target}", tuple(attn_mask.shape))
    return attn_mask if attn_mask.dim() == 4 else attn_mask.reshape(shape)


def _check_number(name: str, number: object, *, positive: bool) -> float:
    if not isinstance(number, (float, int, Real)) or isinstance(number, bool):
        raise _expected(f"{name} to be a number", number, TypeError)
    if not math.isfinite(number) or (positive and number <= 0):
        raise _expected(f"{name} {'> 0' if positive else 'finite'}", number)
    return float(number)


def _check_sinks(sinks: Tensor, rows: Tensor) -> None:
    """`rows` is any (batch, heads, ...) tensor that the sinks belong to."""
    _check_dense("sinks", sinks, " or None")
    heads = rows.shape[1]
    if sinks.shape != (heads,):
        raise _expected(f"sinks of shape (heads,) = ({heads},)", tuple(sinks.shape))
    if sinks.dtype not in FLOAT_DTYPES:
        raise _expected("sinks of a floating dtype", sinks.dtype, TypeError)
    if sinks.device != rows.device:
        raise _expected(f"sinks on the query's device {rows.device}", sinks.device)


def _check_seqlens(seqlens: Tensor, query: Tensor, num_keys: int) -> Tensor:
    _check_dense("seqlens", seqlens, " or None")
    if seqlens.dtype not in (torch.int32, torch.int64):
        raise _expected("seqlens of dtype torch.int32 or torch.int64", seqlens.dtype, TypeError)
    if seqlens.dim() != 1 or len(seqlens) == 0:
        raise _expected("seqlens of shape (sequences + 1,)", tuple(seqlens.shape))
    if seqlens.device != query.device and seqlens.device.type != "cpu":
        raise _expected(f"seqlens on the query's device {query.device} or the CPU", seqlens.device)
    batch, _, num_queries, _ = query.shape
    if batch != 1:
        raise _expected("a batch of 1 with seqlens (sequences end to end in one row)", f"a batch of {batch}")
    if num_queries != num_keys:
        got = f"{num_keys} keys and {num_queries} queries"
        raise _expected("as many keys as queries with seqlens", got)
    if readable(seqlens):
        edges = seqlens.tolist()
        if edges[0] != 0:
            raise _expected("seqlens to start at 0", edges[0])
        for edge, following in zip(edges, edges[1:]):
            if following < edge:
                raise _expected("seqlens that never decrease", f"{following} after {edge}")
        if edges[-1] > num_keys:
            raise _expected(f"seqlens to end within the {num_keys} keys", edges[-1])
    return seqlens if seqlens.device == query.device else seqlens.to(query.device, non_blocking=True)


def check_sample(sample: object) -> tuple[int, int]:
    """Raise TypeError or ValueError for what is no (period, phase); return it."""
    pair = isinstance(sample, tuple) and len(sample) == 2
    if not pair or any(not isinstance(x, int) or isinstance(x, bool) for x in sample):
        raise _expected("sample to be None or a tuple of two ints (period, phase)", sample, TypeError)
    if sample[0] < 1 or sample[1] < 0:
        raise _expected("a sample period >= 1 and phase >= 0", sample)
    return sample


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
    seqlens: Tensor | None = None,
) -> Options:
    """Raise ValueError or TypeError for input the attention functions do not take; return `Options`.

    query (B, H, M, D), key (B, H_kv, N, D), value (B, H_kv, N, D_v), H a multiple of H_kv.
    """
    # Every measured call comes through here: no text is made, and no shape is read twice, before an error.
    _check_tensor("query", query, query)
    _check_tensor("key", key, query)
    batch, heads, num_queries, head_dim = query.shape
    key_batch, kv_heads, num_keys, key_dim = key.shape
    if key_batch != batch:
        raise _expected(f"key of the query's batch size {batch}", key_batch)
    if head_dim == 0:
        raise _expected("a head dimension of at least 1", head_dim)
    if key_dim != head_dim:
        raise _expected(f"key of the query's head dimension {head_dim}", key_dim)
    if heads != kv_heads and (kv_heads == 0 or heads % kv_heads):
        raise _expected(f"query heads to be a multiple of the {kv_heads} key heads", f"{heads} query heads")
    if value is not None:
        _check_tensor("value", value, query)
        *leading, value_dim = value.shape
        expected = [batch, kv_heads, num_keys]
        if leading != expected:
            raise _expected(f"value of shape {tuple(expected)} + (D_v,)", tuple(value.shape))
        if value_dim == 0:
            raise _expected("a value head dimension of at least 1", value_dim)
    if not isinstance(is_causal, bool):
        raise _expected("is_causal to be a bool", is_causal, TypeError)
    if window_size is not None:
        if not isinstance(window_size, (int, Integral)) or isinstance(window_size, bool):
            raise _expected("window_size to be an int or None", window_size, TypeError)
        if window_size < 1:
            raise _expected("window_size >= 1 (1 is the query's own position)", window_size)
        # Beyond this a window hides nothing; "no window" sentinels near 2**31 would overflow positions.
        window_size = max(1, min(int(window_size), num_queries + num_keys))
    if softcap is not None:
        softcap = _check_number("softcap", softcap, positive=True)
    if sinks is not None:
        _check_sinks(sinks, query)
    return Options(
        None if attn_mask is None else _check_mask(attn_mask, query, num_keys),
        is_causal,
        head_dim**-0.5 if scale is None else _check_number("scale", scale, positive=False),
        window_size,
        softcap,
        sinks,
        None if seqlens is None else _check_seqlens(seqlens, query, num_keys),
    )


def check_merge(blocks: Sequence[RowStats], outs: Sequence[Tensor], sinks: Tensor | None) -> None:
    """Raise ValueError or TypeError for row statistics (and partial outputs) that cannot be merged.

    `outs` has one output per block, or none at all. Which rows a sample took is compared on the CPU only:
    on a GPU that would wait for the device.
    """
    if not blocks:
        raise _expected("at least one key block to merge", "none")
    for block in blocks:
        if not isinstance(block, RowStats):
            raise _expected("blocks to be RowStats", type(block).__name__, TypeError)
    first, index = blocks[0].lse, blocks[0].row_index
    if first.dim() != 3:
        raise _expected("blocks of shape (batch, heads, length)", tuple(first.shape))
    for block in blocks:
        for tensor in (block.lse, block.entropy, block.max_logit, block.min_logit):
            if tensor.shape != first.shape:
                raise _expected(f"blocks of shape {tuple(first.shape)}", tuple(tensor.shape))
            if tensor.dtype != first.dtype:
                raise _expected(f"blocks of dtype {first.dtype}", tensor.dtype, TypeError)
            if tensor.device != first.device:
                raise _expected(f"blocks on {first.device}", tensor.device)
        if not _same_rows(block.row_index, index):
            raise _expected("blocks of the same rows", "different samples")
    for out in outs:
        _check_dense("outputs", out)
        expected = (*first.shape, *outs[0].shape[-1:])
        if out.shape != expected:
            raise _expected(f"outputs of shape {expected}", tuple(out.shape))
        if out.device != first.device:
            raise _expected(f"outputs on {first.device}", out.device)
    if sinks is not None:
        _check_sinks(sinks, first)


def _same_rows(index: Tensor | None, other: Tensor | None) -> bool:
    if index is None or other is None:
        return index is other
    return not readable(index) or torch.equal(index, other)
