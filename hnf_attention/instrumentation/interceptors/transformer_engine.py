"""Catches `DotProductAttention` of Transformer Engine, at its forward, whichever kernel it chooses.

Megatron-Core's TEDotProductAttention is a subclass of it. With `qk_clip` or `log_max_attention_logit` it asks for the
largest score of each head, which is compared with ours.
"""

from __future__ import annotations

import functools
import inspect
import re
import sys
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import packs
from ..call import AttentionCall, Unmeasurable, require_plain
from ..flash_call import Arguments
from ..patches import Patch
from ..positions import Positions, place
from .functions import interceptor

NAME = "Transformer Engine"
KEEPS = "Transformer Engine keeps its own output"
_KERNELS = "unfused_attention", "flash_attention", "fused_attention"  # each of them is told the scale
_SILENT = (
    "checkpoint_core_attention", "fast_zero_fill", "fp8_output", "bf16_backward", "num_splits", "score_mod_bprop",
    "score_mod_tensors", "score_mod_bprop_tensors", "pad_between_seqs",
)  # fmt: skip


def install(modules: Collection[nn.Module]) -> list[Patch]:
    """Replace the forward of the class until the patches are released."""
    cls = getattr(sys.modules.get("transformer_engine.pytorch"), "DotProductAttention", None)
    if cls is None:
        return []

    def replacement(original: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(original)
        return interceptor(NAME, functools.partial(_described, signature), original)

    return Patch.everywhere(cls, "forward", replacement, ())


class _Mask(NamedTuple):
    """What the words of an `attn_mask_type` say. bottom: aligned to the bottom right; None where they do not say."""

    causal: bool
    padding: bool
    arbitrary: bool
    bottom: bool | None


def _mask_of(kind: str) -> _Mask:
    words = set(re.split("[,_]", kind))
    causal = "causal" in words
    return _Mask(causal, "padding" in words, "arbitrary" in words, "bottom" in words if causal else None)


@torch.no_grad()
def _described(signature: inspect.Signature, *args: Any, **kwargs: Any) -> AttentionCall:
    given = Arguments(signature, args, kwargs)
    for name in _SILENT:
        given.take(name)
    module = given.take("self")
    layout = given.take("qkv_format", default=module.qkv_format)
    mask = _mask_of(given.take("attn_mask_type", default=module.attn_mask_type))
    query, key, value = _tensors(given)
    require_plain(query=query, key=key, value=value)
    if _is_split(getattr(module, "cp_group", None)):
        raise Unmeasurable("context parallelism: keys of other processes are not seen")
    part = _part(given, layout, mask, query, key, value)
    shape = _window(given, module, mask)
    bias_type = given.take("core_attention_bias_type", default="no_bias")
    bias, slopes = given.take("core_attention_bias"), given.take("alibi_slopes")
    if bias_type not in ("no_bias", "post_scale_bias", "alibi") or (bias_type == "alibi" and slopes is None):
        raise Unmeasurable(
            f"core_attention_bias_type={bias_type!r}" + " without slopes" * (bias_type == "alibi")
        )
    user_mask = given.take("attention_mask") if mask.arbitrary else None
    given.refuse_others()
    call = AttentionCall(
        query=part.query,
        key=part.key,
        value=part.value,
        attn_mask=None,
        is_causal=False,
        scale=_scale(module),
        softcap=None,
        sinks=None if module.softmax_offset is None else module.softmax_offset.detach().flatten(),
        seqlens=part.seqlens,
        interceptor=NAME,
        from_output=lambda out: out,  # never asked for
        not_fused=KEEPS,
        probe_preferred=KEEPS,
        output_of=functools.partial(_output, layout, part),
        max_logit_of=lambda result: result[1] if isinstance(result, tuple) and len(result) > 1 else None,
        casts=False,
        copied=part.copied,
    )
    _place(call, shape, part, slopes if bias_type == "alibi" else None)
    if user_mask is not None or bias_type == "post_scale_bias":
        if (
            call.attn_mask is not None
            or call.modify is not None
            or (user_mask is not None and bias is not None)
        ):
            raise Unmeasurable("its bias or mask comes with another mask")
        call.attn_mask = bias.detach().float() if user_mask is None else ~user_mask.bool()
    return call


def _tensors(given: Arguments) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values in the layout of the call."""
    query, key, value = (given.take(f"{name}_layer") for name in ("query", "key", "value"))
    qkv, kv, dim = (
        given.take("qkv_layer"),
        given.take("kv_layer"),
        given.take("qkv_interleave_dim", default=-3),
    )
    if qkv is not None:
        return qkv.unbind(dim)
    return (query, *kv.unbind(dim)) if kv is not None else (query, key, value)


def _part(
    given: Arguments, layout: str, mask: _Mask, query: Tensor, key: Tensor, value: Tensor
) -> packs.Part:
    """The tensors by heads, and which of their places hold tokens."""
    borders = [given.take(f"cu_seqlens_{name}") for name in ("q", "kv")]
    padded = [given.take(f"cu_seqlens_{name}_padded") for name in ("q", "kv")]
    longest = [given.take(f"max_seqlen_{name}") for name in ("q", "kv")]
    if layout == "thd":
        words: dict[str, Any] = {"max_seqlen_q": longest[0], "max_seqlen_k": longest[1]}
        for name, starts, apart in zip("qk", borders, padded):
            words[f"cu_seqlens_{name}"] = starts if apart is None else apart
            words[f"seqused_{name}"] = None if apart is None or apart is starts else starts.diff()

        given.take("attention_mask")  # the borders say it

        def take(*names: str, default: Any = None) -> Any:
            return next((words[x] for x in names if words.get(x) is not None), default)

        return packs.part_of(take, query, key, value, False)
    if layout not in ("sbhd", "bshd"):
        raise Unmeasurable(f"qkv_format={layout!r}")
    axes = (1, 2, 0, 3) if layout == "sbhd" else (0, 2, 1, 3)
    part = packs.Part(query.permute(axes), key.permute(axes), value.permute(axes))
    if mask.padding:
        if borders[0] is None or borders[1] is None:
            hidden = given.take("attention_mask")
            both = hidden if isinstance(hidden, tuple) else (hidden, hidden)
            counts = [(~x.bool()).flatten(1).sum(1) for x in both]
        else:
            counts = [x.diff() for x in borders]
        part.lengths = counts[0], counts[1], None
    elif not mask.arbitrary:
        given.take("attention_mask")  # which is not used then
    return part


class _Window(NamedTuple):
    """Bounds of the keys that a query sees, and whether its diagonal ends at the bottom right."""

    left: int | None
    right: int | None
    bottom: bool


def _window(given: Arguments, module: nn.Module, mask: _Mask) -> _Window:
    bounds: Any = given.take("window_size", default=module.window_size) or (-1, -1)
    left, right = (None if bound is None or bound < 0 else int(bound) for bound in bounds)
    asked = given.take("bottom_right_diagonal", default=getattr(module, "bottom_right_diagonal", None))
    bottom = mask.bottom if mask.bottom is not None else asked is None or bool(asked)
    return _Window(left, 0 if mask.causal else right, bottom)


def _place(call: AttentionCall, window: _Window, part: packs.Part, slopes: Tensor | None) -> None:
    """Say which keys the queries see. Ours is aligned to the top left, as the library's without "bottom_right"."""
    left, right, bottom = window
    equal = call.query.shape[2] == call.key.shape[2] and part.lengths[0] is None
    if bottom or equal or left is right is None:
        place(call, Positions(left, right, *part.lengths, slopes))
        return
    if slopes is not None or (right != 0 and left != right):
        raise Unmeasurable("a window or ALiBi at the top left, on one side")
    place(call, Positions(None, None, *part.lengths, None))
    call.is_causal, call.window_size = right == 0, None if left is None else left + 1


def _is_split(group: Any) -> bool:
    """Whether keys lie in several processes: a process group of more than one, or a list of groups."""
    return group is not None and (isinstance(group, list) or group.size() > 1)


def _scale(module: nn.Module) -> float:
    for kernel in _KERNELS:
        scale = getattr(getattr(module, kernel, None), "softmax_scale", None)
        if scale is not None:
            return float(scale)
    raise Unmeasurable("its scale is not known")


def _output(layout: str, part: packs.Part, result: Any) -> Tensor | None:
    """Its output, (B, 1, M, H D_v)."""
    out = result[0] if isinstance(result, tuple) else result
    if layout == "thd":
        return out[None, None] if part.seqlens is not None else None
    return out.transpose(0, 1)[:, None] if layout == "sbhd" else out[:, None]
