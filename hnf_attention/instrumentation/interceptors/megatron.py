"""Catches `DotProductAttention` of Megatron-Core, its attention without Transformer Engine, at its forward.

Its softmax may be a kernel of its own, which no interceptor of softmax sees.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import nn

from ..call import AttentionCall, Unmeasurable, require_plain
from ..flash_call import Arguments
from ..patches import Patch
from ..positions import Positions, place
from .functions import interceptor

NAME = "Megatron-Core"
KEEPS = "Megatron-Core keeps its own output"
_MODULE = "megatron.core.transformer.dot_product_attention"


def install(modules: Collection[nn.Module]) -> list[Patch]:
    """Replace the forward of the class until the patches are released."""
    cls = getattr(sys.modules.get(_MODULE), "DotProductAttention", None)
    if cls is None:
        return []

    def replacement(original: Callable[..., Any]) -> Callable[..., Any]:
        describe = functools.partial(_described, inspect.signature(original))
        return interceptor(NAME, describe, original)

    return Patch.everywhere(cls, "forward", replacement, ())


@torch.no_grad()
def _described(signature: inspect.Signature, *args: Any, **kwargs: Any) -> AttentionCall:
    """What one call computes: tensors are (rows, B, heads, head dimension), True in a mask hides a key."""
    given = Arguments(signature, args, kwargs)
    module, hidden = given.take("self"), given.take("attention_mask")
    query, key, value = (given.take(name) for name in ("query", "key", "value"))
    given.take("attn_mask_type")  # its forward does not use it
    given.refuse_others()
    require_plain(query=query, key=key, value=value, attention_mask=hidden)
    softmax = module.scale_mask_softmax
    window = getattr(softmax, "window_size", None)  # it replaces every other mask
    causal = window is None and module.attn_mask_type.name == "causal" and query.shape[0] > 1
    if causal and query.shape[0] != key.shape[0]:
        raise Unmeasurable("a causal mask with another number of keys than queries")
    offset = getattr(module, "softmax_offset", None)
    call = AttentionCall(
        query=query.permute(1, 2, 0, 3),
        key=key.permute(1, 2, 0, 3),
        value=value.permute(1, 2, 0, 3),
        attn_mask=None if hidden is None or window is not None else ~hidden.bool(),
        is_causal=causal,
        scale=module.softmax_scale
        * (softmax.scale or 1.0),  # a layer's number divides the one, multiplies the other
        softcap=None,
        sinks=None if offset is None else offset.detach(),
        interceptor=NAME,
        from_output=lambda out: out,  # never asked for
        not_fused=KEEPS,
        probe_preferred=KEEPS,
        output_of=lambda out: out.transpose(0, 1)[:, None],
        casts=False,
    )
    if window is not None:
        left, right = (None if bound < 0 else int(bound) for bound in window)
        place(call, Positions(left, right))
    return call
