"""Catches the functions of xformers' `memory_efficient_attention`, which newer versions take from `mslk`.

Masks are objects there. Those of packs with common borders and causal ones are described by positions. The others are
written out by their own `materialize`, up to MASK_BYTES.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ... import compat
from ..call import WRITTEN_MASK, AttentionCall, Unmeasurable, hide, require_plain
from ..patches import Patch, hidden, original_of
from ..positions import MASK_BYTES
from .functions import interceptor

KEEPS = "xformers keeps its own output"
_MODULES = "xformers.ops", "xformers.ops.fmha", "mslk.attention.fmha"
_NAMES = (
    "memory_efficient_attention",
    "memory_efficient_attention_forward",
    "memory_efficient_attention_forward_requires_grad",
    "memory_efficient_attention_partial",
)
#: Masks of packs, by name: whether they are causal.
_PACKS = {
    "BlockDiagonalMask": False,
    "BlockDiagonalCausalMask": True,
    "BlockDiagonalCausalFromBottomRightMask": True,
    "BlockDiagonalCausalLocalAttentionMask": True,
    "BlockDiagonalCausalLocalAttentionFromBottomRightMask": True,
}


def install(modules: Collection[nn.Module]) -> list[Patch]:
    """Replace the functions, wherever they are held, until the patches are released."""
    replacements = {
        function: functools.partial(interceptor, f"xformers {name}", functools.partial(_described, name))
        for function, name in _functions().items()
    }
    return Patch.of_functions(replacements, modules)


def unreachable(modules: Mapping[str, nn.Module]) -> dict[str, str]:
    """Why modules that hold such a function out of reach are not measured, by their names."""
    return hidden(modules, list(_functions()))


def _functions() -> dict[Callable[..., Any], str]:
    libraries = [sys.modules[name] for name in _MODULES if name in sys.modules]
    return {original_of(vars(x)[name]): name for x in libraries for name in _NAMES if name in vars(x)}


@torch.no_grad()
def _described(
    name: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Any = None,
    p: float = 0.0,
    scale: float | None = None,
    **_: Any,
) -> AttentionCall:
    """What one call computes. The other arguments choose a kernel and the output's dtype."""
    require_plain(query=query, key=key, value=value)
    dims = query.dim()
    query, key, value = _by_heads(query, False), _by_heads(key, True), _by_heads(value, True)
    if query.shape[1] % key.shape[1] or value.shape[1] != key.shape[1]:
        raise Unmeasurable(f"its heads are {query.shape[1]}, {key.shape[1]} and {value.shape[1]}")
    call = AttentionCall(
        query=query,
        key=key,
        value=value,
        attn_mask=None,
        is_causal=False,
        scale=scale,
        softcap=None,
        sinks=None,
        interceptor=f"xformers {name}",
        from_output=lambda out: out,  # never asked for
        not_fused=KEEPS,
        probe_preferred=KEEPS,
        output_of=lambda result: _by_heads(result[0] if isinstance(result, tuple) else result, False),
        lse_of=lambda result: result[1].flatten(1, -2) if isinstance(result, tuple) and dims != 3 else None,
        casts=False,
    )
    _add_bias(call, attn_bias)
    return call


def _by_heads(x: Tensor, grouped: bool) -> Tensor:
    """(B, M, K), (B, M, H, K) or (B, M, G, H, K) as (B, heads, M, K). grouped: a group may be one head, repeated."""
    if x.dim() == 3:
        x = x[:, :, None]
    if x.dim() == 5:
        repeated = grouped and (x.shape[3] == 1 or x.stride(3) == 0)
        x = x[:, :, :, 0] if repeated else x.flatten(2, 3)
    return x.transpose(1, 2)


def _add_bias(call: AttentionCall, bias: Any) -> None:
    if bias is None:
        return
    num_queries, num_keys = call.query.shape[2], call.key.shape[2]
    kind = type(bias).__name__
    if kind == "LowerTriangularMask":  # in some versions a subclass of Tensor
        call.is_causal = True
        return
    if isinstance(bias, Tensor) and not hasattr(bias, "materialize"):
        require_plain(attn_bias=bias)
        bias = bias[:, None] if bias.dim() == 3 and call.query.shape[1] == 1 else bias
        bias = bias.flatten(1, 2) if bias.dim() == 5 else bias
        call.attn_mask = hide(bias.detach(), call.query.dtype)
        return
    if kind.startswith("Paged"):
        raise Unmeasurable(f"its attn_bias is a {kind}: keys in pages")
    if kind in _PACKS and call.query.shape[0] == 1:
        queries, keys = bias.q_seqinfo, bias.k_seqinfo
        same = queries.seqstart is keys.seqstart or list(queries.seqstart_py) == list(keys.seqstart_py)
        if same and num_queries == num_keys:
            call.seqlens, call.is_causal = queries.seqstart, _PACKS[kind]
            call.window_size = compat.local_window(bias)
            return
    if num_queries * num_keys * 4 > MASK_BYTES:
        raise Unmeasurable(
            f"its attn_bias is a {kind} over {num_queries} x {num_keys} places, too many to write out"
        )
    made = bias.materialize((num_queries, num_keys), dtype=torch.float32, device=call.query.device)
    call.copied = WRITTEN_MASK
    call.attn_mask = made[:, None] if made.dim() == 3 and made.shape[0] == call.query.shape[0] else made
