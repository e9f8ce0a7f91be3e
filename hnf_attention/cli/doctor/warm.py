"""Compile, before a run, what its calls will need: by making such calls once."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...engine import graphed
from ...engine.api import attention
from ...engine.call import check as checked
from ...engine.card import card_of, current_device
from ...errors import InputError
from ...monitoring.monitor import AttentionStabilityMonitor
from ...reference.extremes import new_result

_SAMPLE = 16  # of the sampled monitor: 1/16 of the rows
_HEADS, _HEAD_DIMS, _DTYPES, _LENGTHS = 16, (64, 128), ("bfloat16",), (1024, 1000)  # without options


@dataclass(frozen=True)
class Shape:
    """The calls of one kind: queries (1, heads, length, head_dim), keys and values (1, kv_heads, length, head_dim)."""

    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    length: int
    is_causal: bool

    def __str__(self) -> str:
        heads = (
            f"{self.heads} heads" if self.heads == self.kv_heads else f"{self.heads}/{self.kv_heads} heads"
        )
        name = str(self.dtype).removeprefix("torch.")
        mask = "causal" if self.is_causal else "full"
        return f"{name}, {heads} of {self.head_dim}, {self.length} tokens, {mask}"


class _Attention(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.options: dict[str, Any] = {"is_causal": shape.is_causal}
        if shape.heads != shape.kv_heads:
            self.options["enable_gqa"] = True

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, **self.options)


class _Model(nn.Module):
    """One layer, as a monitor meets it."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.attention = _Attention(shape)

    def forward(self, *tensors: Tensor) -> Tensor:
        return self.attention(*tensors)


def check(options: argparse.Namespace) -> None:
    """Raise InputError for options that belong to --warm if it is not given, and for shapes that fit no call."""
    given = [name for name in ("heads", "kv_heads", "head_dim", "dtype", "length") if getattr(options, name)]
    if given and not options.warm:
        raise InputError(f"--{given[0].replace('_', '-')} is an option of --warm, which was not given")
    if not options.warm:
        return
    if card_of(current_device()).triton is None:
        raise InputError("--warm needs a CUDA card and Triton: nothing is compiled for this machine")
    heads = options.heads or _HEADS
    if heads % (options.kv_heads or heads):
        raise InputError(
            f"expected --heads to be a multiple of --kv-heads, got {heads} and {options.kv_heads}"
        )


def shapes(options: argparse.Namespace) -> Iterator[Shape]:
    """The kinds of calls to make. Lengths that 16 divides and others need kernels of their own."""
    heads = options.heads or _HEADS
    for dtype in options.dtype or _DTYPES:
        for head_dim in options.head_dim or _HEAD_DIMS:
            for is_causal in (True, False):
                for length in options.length or _LENGTHS:
                    kv_heads = options.kv_heads or heads
                    yield Shape(heads, kv_heads, head_dim, getattr(torch, dtype), length, is_causal)


def warm(shape: Shape, device: torch.device) -> float:
    """Make each call of a training step once: `attention`, a layer under every kind of monitor. Seconds taken."""
    begin = time.perf_counter()
    sizes = shape.heads, shape.kv_heads, shape.kv_heads
    tensors = [
        torch.randn(1, heads, shape.length, shape.head_dim, device=device, dtype=shape.dtype)
        for heads in sizes
    ]
    _step(lambda *inputs: attention(*inputs, is_causal=shape.is_causal)[0], tensors)
    for keywords in ({"mode": "probe"}, {"mode": "fused"}, {"mode": "probe", "sample": _SAMPLE}):
        model = _Model(shape)
        # Of the first step extremes are taken, and the second one is a log step.
        with AttentionStabilityMonitor(model, log_every=2, ranks=None, **keywords) as monitor:
            for _ in range(2):
                _step(model, tensors)
                monitor.on_step()
    _graphed(shape, tensors)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin


@torch.no_grad()
def _graphed(shape: Shape, tensors: list[Tensor]) -> None:
    """What the graph of a compiled model launches beside a call."""
    query, key, value = tensors
    out = F.scaled_dot_product_attention(query, key, value, **_Attention(shape).options)
    options = checked(
        query,
        key,
        value,
        attn_mask=None,
        is_causal=shape.is_causal,
        scale=None,
        window_size=None,
        softcap=None,
        sinks=None,
    )
    control = torch.tensor([1 | graphed.EXTREMES | graphed.STATISTICS], device=query.device)
    state = graphed.new_state(shape.heads, control, new_result(shape.heads, query.device))
    call = query, key, value, out
    graphed.GraphedCall(call, options, 0).run(state, call)


def _step(call: Callable[..., Tensor], tensors: list[Tensor]) -> None:
    """A forward and a backward."""
    leaves = [x.clone().requires_grad_() for x in tensors]
    out = call(*leaves)
    torch.autograd.grad(out, leaves, torch.randn_like(out))


def cache_folder() -> Path:
    """Where Triton keeps what it compiled for later processes: TRITON_CACHE_DIR, or its default."""
    from triton import knobs

    return Path(knobs.cache.dir)
