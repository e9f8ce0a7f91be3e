"""One attention call, checked: every error of shape, dtype and device is raised here, before anything runs."""

from __future__ import annotations

import functools
from numbers import Integral, Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import compat
from ..reference.options import Options
from ..statistics.checks import FLOAT_DTYPES, check_dense, check_sinks, expected
from ..tracing import readable


class Call(NamedTuple):
    """What the attention functions compute from: checked, in the dtype it is computed in.

    query (B, H, M, D), key (B, H_kv, N, D), value (B, H_kv, N, D_v), or None if only statistics are wanted.
    options: what shapes the scores. extended: whether the extended statistics are wanted.
    """

    query: Tensor
    key: Tensor
    value: Tensor | None
    options: Options
    extended: bool = False

    @property
    def largest_head_dim(self) -> int:
        """The larger one of D and D_v."""
        head_dim = self.query.shape[3]
        return head_dim if self.value is None else max(head_dim, self.value.shape[3])


class BackwardInputs(NamedTuple):
    """What a backward needs beside its call: results of the forward, and their cotangents; a None is 0.

    out (B, H, M, D_v), lse and entropy (B, H, M) in nats; each cotangent has the shape of its result.
    """

    out: Tensor
    lse: Tensor
    entropy: Tensor
    d_out: Tensor | None
    d_lse: Tensor | None
    d_entropy: Tensor | None


# Reasons of engines: asked of every call, so each text is made once.
NOT_PLAIN = "takes no mask, window, soft-cap, sinks or packed sequences"


@functools.cache
def not_half(dtype: torch.dtype) -> str | None:
    """Why a kernel of half precision does not take a dtype; None if it does."""
    half = dtype in (torch.float16, torch.bfloat16)
    return None if half else f"needs fp16 or bf16, got {str(dtype).removeprefix('torch.')}"


@functools.cache
def too_wide(head_dim: int, largest: int) -> str | None:
    """Why a kernel does not take a head dimension; None if it does."""
    return f"head dimension {head_dim} exceeds {largest}" if head_dim > largest else None


def _check_tensor(name: str, tensor: Tensor, query: Tensor) -> None:
    check_dense(name, tensor)
    if tensor.dim() != 4:
        raise expected(f"{name} of shape (batch, heads, length, head_dim)", tuple(tensor.shape))
    if tensor.dtype not in FLOAT_DTYPES:
        raise expected(f"{name} of a floating dtype of 16 to 64 bits", tensor.dtype, TypeError)
    if tensor.dtype != query.dtype:
        raise expected(f"{name} of the query's dtype {query.dtype}", tensor.dtype, TypeError)
    if tensor.device != query.device:
        raise expected(f"{name} on the query's device {query.device}", tensor.device)


def _check_mask(attn_mask: Tensor, query: Tensor, num_keys: int) -> Tensor:
    check_dense("attn_mask", attn_mask, " or None")
    if attn_mask.dtype not in (torch.bool, torch.float32, query.dtype):
        allowed = list(dict.fromkeys((torch.bool, torch.float32, query.dtype)))
        raise expected(f"attn_mask of dtype in {allowed}", attn_mask.dtype, TypeError)
    if attn_mask.device != query.device:
        raise expected(f"attn_mask on the query's device {query.device}", attn_mask.device)
    target = (*query.shape[:3], num_keys)
    shape = (1,) * (4 - attn_mask.dim()) + tuple(attn_mask.shape)
    if len(shape) != 4 or not all(size in (1, full) for size, full in zip(shape, target, strict=True)):
        raise expected(f"attn_mask that broadcasts to (B, H, M, N) = {target}", tuple(attn_mask.shape))
    return attn_mask if attn_mask.dim() == 4 else attn_mask.reshape(shape)


def _check_number(name: str, number: object, *, positive: bool) -> float:
    if not isinstance(number, (float, int, Real)) or isinstance(number, bool):
        raise expected(f"{name} to be a number", number, TypeError)
    # A difference of two infinities is no number. A compiler can trace this for a number that it does not know.
    if number - number != 0 or (positive and number <= 0):
        raise expected(f"{name} {'> 0' if positive else 'finite'}", number)
    return float(number)


def _check_seqlens(seqlens: Tensor, query: Tensor, num_keys: int) -> Tensor:
    check_dense("seqlens", seqlens, " or None")
    if seqlens.dtype not in (torch.int32, torch.int64):
        raise expected("seqlens of dtype torch.int32 or torch.int64", seqlens.dtype, TypeError)
    if seqlens.dim() != 1 or len(seqlens) == 0:
        raise expected("seqlens of shape (sequences + 1,)", tuple(seqlens.shape))
    if seqlens.device != query.device and seqlens.device.type != "cpu":
        raise expected(f"seqlens on the query's device {query.device} or the CPU", seqlens.device)
    batch, _, num_queries, _ = query.shape
    if batch != 1:
        raise expected("a batch of 1 with seqlens (sequences end to end in one row)", f"a batch of {batch}")
    if num_queries != num_keys:
        got = f"{num_keys} keys and {num_queries} queries"
        raise expected("as many keys as queries with seqlens", got)
    if readable(seqlens):
        edges = seqlens.tolist()
        if edges[0] != 0:
            raise expected("seqlens to start at 0", edges[0])
        for edge, following in zip(edges, edges[1:]):
            if following < edge:
                raise expected("seqlens that never decrease", f"{following} after {edge}")
        if edges[-1] > num_keys:
            raise expected(f"seqlens to end within the {num_keys} keys", edges[-1])
    return seqlens if seqlens.device == query.device else seqlens.to(query.device, non_blocking=True)


def check_sample(sample: object) -> tuple[int, int]:
    """`sample`, a (period, phase) of two ints; raises TypeError or ValueError for anything else."""
    match sample:
        case tuple((int() as period, int() as phase)) if bool not in (type(period), type(phase)):
            if period < 1 or phase < 0:
                raise expected("a sample period >= 1 and phase >= 0", sample)
            return period, phase
    raise expected("sample to be None or a tuple of two ints (period, phase)", sample, TypeError)


def prepare(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    *,
    attn_mask: Tensor | None,
    extended: bool,
    **shape: Any,
) -> Call:
    """The arguments of `attention`, cast as autocast wants them and checked; raises as `check` does.

    shape: what else `check` takes.
    """
    query, key, value, attn_mask = autocast(query, key, value, attn_mask)
    return Call(query, key, value, check(query, key, value, attn_mask=attn_mask, **shape), extended)


def autocast(*tensors: Any) -> tuple[Any, ...]:
    """Floating tensors in the dtype that autocast gives SDPA's inputs; fp64 and anything but tensors stay unchanged."""
    first = tensors[0] if isinstance(tensors[0], Tensor) else None
    # This asks all devices but MPS at once, at a tenth of the cost of asking one.
    if first is not None and first.is_cuda and not compat.any_autocast():
        return tensors
    device = "cpu" if first is None else first.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    wanted = (torch.float16, torch.bfloat16, torch.float32)
    return tuple(t.to(dtype) if isinstance(t, Tensor) and t.dtype in wanted else t for t in tensors)


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
    """The options of a call that the attention functions take.

    query (B, H, M, D), key (B, H_kv, N, D), value (B, H_kv, N, D_v), H a multiple of H_kv.
    Raises ValueError or TypeError (expected, got) for any other input.
    """
    # Every measured call comes through here. It makes no text before an error and reads no shape twice.
    _check_tensor("query", query, query)
    _check_tensor("key", key, query)
    batch, heads, num_queries, head_dim = query.shape
    key_batch, kv_heads, num_keys, key_dim = key.shape
    if key_batch != batch:
        raise expected(f"key of the query's batch size {batch}", key_batch)
    if key_dim != head_dim:
        raise expected(f"key of the query's head dimension {head_dim}", key_dim)
    if heads != kv_heads and (kv_heads == 0 or heads % kv_heads):
        raise expected(f"query heads to be a multiple of the {kv_heads} key heads", f"{heads} query heads")
    if value is not None:
        _check_tensor("value", value, query)
        wanted = (batch, kv_heads, num_keys)
        if value.shape[:3] != wanted:
            raise expected(f"value of shape {wanted} + (D_v,)", tuple(value.shape))
    if not isinstance(is_causal, bool):
        raise expected("is_causal to be a bool", is_causal, TypeError)
    if window_size is not None:
        if not isinstance(window_size, (int, Integral)) or isinstance(window_size, bool):
            raise expected("window_size to be an int or None", window_size, TypeError)
        if window_size < 1:
            raise expected("window_size >= 1 (1 is the query's own position)", window_size)
        # Beyond this a window hides nothing; "no window" sentinels near 2**31 would overflow positions.
        window_size = max(1, min(int(window_size), num_queries + num_keys))
    if softcap is not None:
        softcap = _check_number("softcap", softcap, positive=True)
    if scale is None:
        scale = head_dim**-0.5 if head_dim else 1.0  # without a dimension every score is 0, as in SDPA
    else:
        scale = _check_number("scale", scale, positive=False)
    if attn_mask is not None:
        attn_mask = _check_mask(attn_mask, query, num_keys)
    if seqlens is not None:
        seqlens = _check_seqlens(seqlens, query, num_keys)
    if sinks is not None:
        check_sinks(sinks, query)
    return Options(attn_mask, is_causal, scale, window_size, softcap, sinks, seqlens)
