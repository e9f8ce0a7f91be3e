"""Grids of attention calls with the tolerances of others: those of PyTorch's SDPA tests, and FlashAttention's rule.

PyTorch's (test/test_transformers.py): a result may be off by `factor * max(largest error of a low-precision
reference, a default)`, absolutely and relatively. Its references are the plain kernel in the dtype and in a higher one.
FlashAttention's (tests/test_flash_attn.py): the largest error is at most twice that of plain attention in the same
dtype, and two roundings of the result at 0.3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as sdpa

from hnf_attention import attention
from hnf_attention.nn import row_stats

DEFAULT_ATOL = {torch.float16: 1e-3, torch.bfloat16: 1e-3, torch.float32: 1e-5}
DEFAULT_RTOL = {torch.float16: 1e-3, torch.bfloat16: 1.6e-2, torch.float32: 1.3e-6}
HALF, BRAIN, FLOAT = torch.float16, torch.bfloat16, torch.float32
# Lengths and head dimensions as PyTorch's tests have them. Every head dimension runs in bf16, some in fp16: each pair
# takes its own compilation.
FLASH_QUERIES, FLASH_KEYS = (4, 8, 64, 143, 256, 512, 1024, 2048), (4, 8, 64, 128, 256, 587, 1024, 2048)
FLASH_HEAD_DIMS = (8, 16, 21, 32, 64, 72, 96, 128, 160, 192, 203, 256)
EFFICIENT = (4, 8, 64, 128, 256, 512, 1024, 2048)
MASKED_QUERIES = (4, 8, 64, 128, 256, 312, 512, 1024, 2048)
MASKED_KEYS = (4, 8, 64, 65, 128, 256, 408, 512, 1024, 2048)
# Pairs of lengths from FlashAttention's tests.
PAIRS = (
    (1, 1), (1, 3), (2, 1), (3, 513), (64, 128), (128, 192), (239, 1), (511, 1), (799, 3), (113, 203), (113, 128),
    (128, 217), (113, 211), (108, 256), (256, 256), (256, 512), (307, 256), (384, 256), (512, 256), (640, 128),
    (1023, 1024), (1024, 1023), (1024, 1024), (2048, 2048), (4096, 4096), (4224, 4224),
)  # fmt: skip
PAIR_HEAD_DIMS = (64, 96, 128, 192, 256)


@dataclass(frozen=True)
class Factors:
    """What PyTorch multiplies the tolerance of each result with."""

    out: float
    query: float
    key: float
    value: float
    mask: float = 1.0


@dataclass(frozen=True)
class GridCase:
    """One call: sizes, and the rule that judges it."""

    rule: str
    batch: int
    heads: int
    kv_heads: int
    queries: int
    keys: int
    head_dim: int
    dtype: torch.dtype
    is_causal: bool = False
    scale: float | None = None
    masked: bool = False

    def __str__(self) -> str:
        causal = " causal" if self.is_causal else ""
        sizes = (
            f"B={self.batch} H={self.heads}/{self.kv_heads} M={self.queries} N={self.keys} D={self.head_dim}"
        )
        return f"{self.rule}: {sizes} {str(self.dtype).removeprefix('torch.')}{causal} scale {self.scale}"


class Flash(nn.Module):
    """SDPA's flash kernel. It raises if another than this project's computed the call."""

    def __init__(self, on_card: bool):
        super().__init__()
        self.on_card = on_card
        self._last: object = None

    def forward(self, query, key, value, is_causal=False, scale=None):
        if self.on_card:
            with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                grouped = query.shape[1] != key.shape[1]
                return sdpa(query, key, value, is_causal=is_causal, scale=scale, enable_gqa=grouped)
        operator = torch.ops.aten._scaled_dot_product_flash_attention
        return operator(query, key, value, 0.0, is_causal, False, scale=scale)[0]

    def checked(self, *tensors: Tensor, **keywords) -> Tensor:
        out = self(*tensors, **keywords)
        rows = row_stats(self)
        if rows is None or rows is self._last:
            raise AssertionError("another kernel than this project's computed the call")
        self._last = rows
        return out


def plain(query: Tensor, key: Tensor, value: Tensor, mask=None, is_causal=False, scale=None) -> Tensor:
    """PyTorch's plain kernel."""
    with sdpa_kernel(SDPBackend.MATH):
        grouped = query.shape[1] != key.shape[1]
        return sdpa(query, key, value, attn_mask=mask, is_causal=is_causal, scale=scale, enable_gqa=grouped)


def eager(query: Tensor, key: Tensor, value: Tensor, mask=None, is_causal=False, scale=None) -> Tensor:
    """Attention in three products, each rounded to the dtype of its inputs."""
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores = query @ (key * (query.shape[-1] ** -0.5 if scale is None else scale)).mT
    if is_causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(hidden, -torch.inf)
    return scores.softmax(-1) @ value


def trained(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], d_out: Tensor, dtype=None
) -> list[Tensor]:
    """The output and the gradients of the inputs, taken to a dtype first."""
    leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in inputs]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, d_out.to(out.dtype))]


def _beyond_pytorch(got: Tensor, true: Tensor, low: Tensor, factor: float) -> float:
    """The largest error as a part of what PyTorch's tests allow."""
    deviation = ((true - low) / true).abs().nan_to_num(nan=DEFAULT_RTOL[low.dtype], posinf=torch.inf)
    rtol = factor * max(float(deviation.max()), DEFAULT_RTOL[low.dtype])
    atol = factor * max(float((true - low).abs().max()), DEFAULT_ATOL[low.dtype])
    if rtol > 1e30:
        rtol = DEFAULT_RTOL[low.dtype]
    wanted = true.to(got.dtype)
    return float(((got - wanted).abs().double() / (atol + rtol * wanted.abs().double())).max())


def _beyond_flash_attention(got: Tensor, true: Tensor, low: Tensor, least: float) -> float:
    """The largest error as a part of what FlashAttention's tests allow, and of `least`."""
    wanted = true.to(got.dtype)
    rounding = 2 * float((wanted + 0.3 - 0.3 - wanted).abs().max())
    allowed = 2 * float((low.float() - wanted.float()).abs().max()) + rounding
    return float((got.float() - wanted.float()).abs().max()) / max(allowed, least)


def judged(case: GridCase, device: str, flash: Flash) -> dict[str, float]:
    """By result: its largest error as a part of what its rule allows; above 1 the rule is broken."""
    generator = torch.Generator(device).manual_seed(0)
    draw = torch.randn if case.rule == "FlashAttention" else torch.rand

    def tensor(*shape: int) -> Tensor:
        return draw(shape, device=device, generator=generator).to(case.dtype)

    query = tensor(case.batch, case.heads, case.queries, case.head_dim)
    key, value = (tensor(case.batch, case.kv_heads, case.keys, case.head_dim) for _ in "kv")
    inputs = [query, key, value, *([tensor(case.queries, case.keys)] if case.masked else [])]
    d_out = draw(query.shape, device=device, generator=generator).to(case.dtype)
    shared = {"is_causal": case.is_causal, "scale": case.scale}

    def ours(query, key, value, mask=None):
        if case.rule in ("flash", "FlashAttention"):
            return flash.checked(query, key, value, **shared)
        return attention(query, key, value, attn_mask=mask, **shared)[0]

    found = trained(ours, inputs, d_out)
    high = torch.float64 if case.dtype == FLOAT else FLOAT
    reference, low = (eager, eager) if case.rule == "FlashAttention" else (plain, plain)
    exact = trained(lambda *x: reference(*x, **shared), inputs, d_out, high)
    rounded = trained(lambda *x: low(*x, **shared), inputs, d_out)
    names = ("out", "query", "key", "value", "mask")
    # With one key, the gradient of its score is a difference of two equal sums of products in fp32.
    norms = [float(x.float().norm(dim=-1).max()) for x in (query, key, value, d_out)]
    least = torch.finfo(FLOAT).eps * norms[2] * norms[3] * max(norms[:2])
    result = {}
    for name, got, true, near in zip(names, found, exact, rounded):
        if not bool(got.isfinite().all()):
            result[name] = torch.inf
        elif case.rule == "FlashAttention":
            result[name] = _beyond_flash_attention(got, true, near, least)
        else:
            result[name] = _beyond_pytorch(got, true, near, getattr(_factors(case), name))
    return result


def _factors(case: GridCase) -> Factors:
    """Those of PyTorch since its plain kernel computes half precision in fp32: its own error is a rounding alone."""
    if case.rule == "flash":
        return Factors(4.0, 180.0, 16.0, 4.0)
    if case.masked:
        return Factors(4.0, 160.0, 25.0, 8.0, 45.0)
    return Factors(3.0, 110.0, 8.0, 3.0)  # those of its test of graphs, the least


def repeats(head_dim: int, kv_heads: int, device: str, times: int, length: int) -> int:
    """In how many of `times` forwards and backwards a bit of the output or a gradient differs from the first."""
    flash = Flash(device == "cuda")
    dtype = BRAIN if device == "cuda" else FLOAT
    shapes = [(2, heads, length, head_dim) for heads in (4, kv_heads, kv_heads)]
    inputs = [torch.randn(shape, device=device).to(dtype) for shape in shapes]
    d_out = torch.randn(shapes[0], device=device).to(dtype)

    def once() -> list[Tensor]:
        return trained(lambda *x: flash(*x, is_causal=True), inputs, d_out)

    first = once()
    differ = torch.zeros((), dtype=torch.int64, device=device)
    for _ in range(times):
        differ += torch.stack([(a != b).any() for a, b in zip(first, once())]).any()
    return int(differ)


def grids(tiny: bool) -> Iterator[GridCase]:
    """Every case of the grids; tiny: some of the small ones, for a CPU."""
    batches = (1,) if tiny else (1, 8)
    top = 64 if tiny else 4224
    for head_dim in FLASH_HEAD_DIMS:
        halves = (FLOAT,) if tiny else (BRAIN, HALF) if head_dim in (16, 64, 128, 256) else (BRAIN,)
        for dtype in halves:
            for queries in (m for m in FLASH_QUERIES if m <= top):
                for keys in (n for n in FLASH_KEYS if n <= top):
                    for causal in (False, True) if queries == keys else (False,):
                        for number, batch in enumerate(batches):
                            scale = None if number else 1 / head_dim
                            sizes = (batch, 4, 4, queries, keys, head_dim, dtype)
                            yield GridCase("flash", *sizes, is_causal=causal, scale=scale)
    for head_dim, dtype in ((8, FLOAT), (64, FLOAT), (96, BRAIN), (128, HALF)):
        dtype = FLOAT if tiny else dtype
        for queries in (m for m in EFFICIENT if m <= top):
            for keys in (n for n in EFFICIENT if n <= top):
                for causal in (False, True):
                    yield GridCase("efficient", batches[-1], 4, 4, queries, keys, head_dim, dtype, causal)
        for queries in (m for m in MASKED_QUERIES if m <= top):
            for keys in (n for n in MASKED_KEYS if n <= top):
                yield GridCase("masked", batches[-1], 4, 4, queries, keys, head_dim, dtype, masked=True)
    for head_dim in PAIR_HEAD_DIMS:
        for dtype in (FLOAT,) if tiny else (BRAIN, HALF) if head_dim == 64 else (BRAIN,):
            for queries, keys in (pair for pair in PAIRS if max(pair) <= top):
                for causal in (False, True):
                    for kv_heads in (6, 3) if head_dim in (64, 128) and dtype != HALF else (6,):
                        sizes = (2, 6, kv_heads, queries, keys, head_dim, dtype)
                        if not causal or queries == keys:  # SDPA's flash kernel takes no other causal call
                            yield GridCase("FlashAttention", *sizes, is_causal=causal)
