"""Calls of FlashAttention's functions as calls of `hnf_attention.attention`.

The package has several versions (`flash_attn`, `flash_attn_interface`, `flash_attn.cute`, builds of the `kernels` hub),
whose functions share the names of their parameters. A call is described by these names. One with an argument that is
not known here, at another value than its default, is listed.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..statistics.checks import FLOAT_DTYPES
from ..statistics.eight_bit import is_eight_bit, scaled, widened
from . import packs
from .call import EIGHT_BIT, AttentionCall, Unmeasurable, require_plain, why_not_fused
from .positions import Positions, place

KEEPS = "flash_attn's kernel is left as it is"
#: Arguments that change no score and no output.
_SILENT = {
    "deterministic", "num_splits", "pack_gqa", "sm_margin", "scheduler_metadata", "min_seqlen_k", "score_mod_bwd",
    "block_sparse_tensors_bwd", "rotary_interleaved", "disable_scheduler_metadata", "seqlen_k_per_split", "fa_version",
}  # fmt: skip
_RETURNS = ("return_attn_probs", "return_softmax_lse", "return_lse")


class Arguments:
    """The arguments of one call, by the names of the function's parameters."""

    def __init__(self, signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]):
        bound = signature.bind(*args, **kwargs)
        self._given: dict[str, Any] = {}
        for name, value in bound.arguments.items():
            kind = signature.parameters[name].kind
            self._given |= value if kind is inspect.Parameter.VAR_KEYWORD else {name: value}
        self._defaults = {name: parameter.default for name, parameter in signature.parameters.items()}

    def take(self, *names: str, default: Any = None) -> Any:
        """The argument with one of these names, which the description then knows."""
        found = [self._given.pop(name) for name in names if name in self._given]
        return next((value for value in found if value is not None), default)

    def refuse_others(self) -> None:
        """Raise Unmeasurable for an argument that nobody took, unless it is the default."""
        for name, value in self._given.items():
            default = self._defaults.get(name)
            alike = value is default or (not isinstance(value, Tensor) and value == default)
            if not alike and value is not None and name not in _SILENT:
                raise Unmeasurable(f"its argument {name} is not described")


def described(library: str, signature: inspect.Signature, *args: Any, **kwargs: Any) -> AttentionCall:
    """The description of one call of a function with this signature, from its arguments.

    Raises Unmeasurable for a call that cannot be measured.
    """
    given = Arguments(signature, args, kwargs)
    query, key, value = _tensors(given)
    require_plain(query=query, key=key, value=value)
    dtype = query.dtype
    descales = [given.take(f"{x}_descale") for x in "qkv"]  # without meaning beside other dtypes
    eight_bit = is_eight_bit(query)
    if any(is_eight_bit(x) != eight_bit for x in (key, value)):
        raise Unmeasurable("its 8-bit inputs come beside others")
    if dtype not in FLOAT_DTYPES and not eight_bit:
        raise Unmeasurable(f"its queries are of dtype {str(dtype).removeprefix('torch.')}")
    softcap, dropout = given.take("softcap", default=0.0), given.take("dropout_p", default=0.0)
    asked = [bool(given.take(name)) for name in _RETURNS]
    writes, deterministic = given.take("out") is not None, bool(given.take("deterministic"))
    not_fused = why_not_fused(dropout) or _why_not_fused(asked, writes, deterministic, signature)
    qv, scale, sinks = given.take("qv"), given.take("softmax_scale"), given.take("learnable_sink", "s_aux")
    left, right = _window(given)
    slopes, whole_cache = given.take("alibi_slopes"), "k_cache" in signature.parameters
    if qv is not None:
        if eight_bit:
            raise Unmeasurable("its argument qv comes with 8-bit queries")
        if key is value:
            raise Unmeasurable("its argument qv comes with keys that are the values")
        query = torch.cat((query, qv), -1)
    part = packs.part_of(given.take, query, key, value, whole_cache)
    given.refuse_others()
    copied = part.copied
    if eight_bit:
        not_fused, copied = not_fused or EIGHT_BIT, EIGHT_BIT
        _widen(part, descales)
    if qv is not None:  # scores are q.k + qv.v
        part.key = torch.cat((part.key, part.value), -1)
        copied = copied or "its argument qv lengthens queries and keys"
    pairs = "return_lse" in signature.parameters  # this version always returns its lse, or None in its place

    def from_output(out: Tensor) -> Any:
        mine = part.of_output(out)
        return (mine, None) if pairs else mine

    call = AttentionCall(
        query=part.query,
        key=part.key,
        value=part.value,
        attn_mask=None,
        is_causal=False,
        scale=scale,
        softcap=softcap or None,
        sinks=sinks,
        seqlens=part.seqlens,
        interceptor=library,
        from_output=from_output,
        not_fused=not_fused or part.not_fused,
        probe_preferred=KEEPS,
        output_of=lambda result: part.from_output(_first(result)),
        # With a causal mask the kernels add slope * key in place of slope * distance, which shifts a row's lse.
        lse_of=None
        if qv is not None or (slopes is not None and right == 0)
        else functools.partial(_lse, part),
        casts=False,
        copied=copied,
        stored=dtype if eight_bit else None,
    )
    place(call, Positions(left, right, *part.lengths, slopes))
    if call.modify is not None:
        call.not_fused = call.not_fused or "its mask is too large to be written out"
    return call


@torch.no_grad()  # the model's own attention computes the output
def _widen(part: packs.Part, descales: list[Tensor | None]) -> None:
    """8-bit tensors of a part in bf16, or with their scales in fp32."""
    tensors = part.query, part.key, part.value
    if all(descale is None for descale in descales):
        part.query, part.key, part.value = map(widened, tensors)
    else:
        pairs = zip(tensors, descales, strict=True)
        part.query, part.key, part.value = (scaled(x, descale, part.seqlens) for x, descale in pairs)


def _tensors(given: Arguments) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, (..., heads, head dimension) each."""
    qkv, kv = given.take("qkv"), given.take("kv")
    if qkv is not None:
        num_heads = given.take("num_heads_q")
        if num_heads is None:
            return qkv.unbind(-3)
        others = (qkv.shape[-2] - num_heads) // 2
        return qkv.split([num_heads, others, others], -2)
    query = given.take("q")
    if kv is not None:
        return query, *kv.unbind(-3)
    cache = given.take("k_cache"), given.take("v_cache")
    if cache[0] is not None:
        return query, *cache
    return query, given.take("k"), given.take("v")


def _window(given: Arguments) -> tuple[int | None, int | None]:
    """The bounds of `Positions` that a causal mask and a window of this call give."""
    bounds = given.take("window_size") or (-1, -1)
    left, right = (None if bound is None or bound < 0 else int(bound) for bound in bounds)
    return left, 0 if given.take("causal") else right


def _why_not_fused(
    asked: list[bool], writes: bool, deterministic: bool, signature: inspect.Signature
) -> str | None:
    if any(asked):
        return "its lse is asked for"
    if writes:
        return "it writes to an output that it is given"
    if not set(_RETURNS) & set(signature.parameters):
        return "whether it returns its lse is not known"
    return "a deterministic backward is asked for" if deterministic else None


def _first(result: Any) -> Any:
    return result[0] if isinstance(result, tuple | list) and result else result


def _lse(part: packs.Part, result: Any) -> Tensor | None:
    """The lse in what a function returned, (B, H, M), nats; None if there is none."""
    second = result[1] if isinstance(result, tuple | list) and len(result) > 1 else None
    return part.from_lse(second) if isinstance(second, Tensor) and second.is_floating_point() else None


def describes(function: Any) -> bool:
    """Whether the signature of a function is one that is described here."""
    try:
        names = set(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return False
    return {"qkv"} <= names or {"q", "kv"} <= names or {"q", "k", "v"} <= names


def describer(library: str, function: Callable[..., Any]) -> Callable[..., AttentionCall]:
    """What describes the calls of this function."""
    return functools.partial(described, library, inspect.signature(function))
