"""PyTorch's SDPA tests of one call each, as far as they apply to this project's attention: layouts, masks, errors.

A rule is a function of a `Bench`; it raises if the rule does not hold. Sizes and tolerances are those of
test/test_transformers.py. Calls without a mask go through SDPA's flash kernel, others through `attention`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from sdpa_grids import BRAIN, FLOAT, HALF, Flash, plain, trained
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right, causal_upper_left
from torch.nn.functional import scaled_dot_product_attention as sdpa

from hnf_attention import attention

RULES: dict[str, Callable[[Bench], None]] = {}
ON_CARD: set[str] = set()  # rules that need a card


@dataclass(frozen=True)
class Bench:
    """Where the rules run; on a CPU, large sizes are cut down."""

    device: str

    @property
    def on_card(self) -> bool:
        return self.device == "cuda"

    def size(self, full: int, small: int) -> int:
        return full if self.on_card else small

    def flash(self, *tensors: Tensor, **keywords) -> Tensor:
        return Flash(self.on_card).checked(*tensors, **keywords)

    def rand(self, *shape: int, dtype: torch.dtype = HALF) -> Tensor:
        return torch.rand(shape, device=self.device).to(dtype)

    def randn(self, *shape: int, dtype: torch.dtype = HALF) -> Tensor:
        return torch.randn(shape, device=self.device).to(dtype)


def rule(function: Callable[[Bench], None]) -> Callable[[Bench], None]:
    RULES[function.__name__] = function
    return function


def card_rule(function: Callable[[Bench], None]) -> Callable[[Bench], None]:
    ON_CARD.add(function.__name__)
    return rule(function)


def same(got: Tensor, wanted: Tensor, atol: float | None = None, rtol: float | None = None) -> None:
    torch.testing.assert_close(got, wanted.to(got.dtype), atol=atol, rtol=rtol)


def raises(error: type[Exception], function: Callable[[], object]) -> None:
    try:
        function()
    except error:
        return
    raise AssertionError(f"expected {error.__name__}")


def ours(*tensors: Tensor, **keywords) -> Tensor:
    return attention(*tensors, **keywords)[0]


def packed_heads(bench: Bench, batch: int, length: int, heads: int, width: int, dtype=HALF) -> list[Tensor]:
    """q, k, v (B, H, L, D) as parts of one projection (B, L, 3 H D)."""
    whole = bench.randn(batch, length, 3 * heads * width, dtype=dtype)
    return [x.view(batch, -1, heads, width).transpose(1, 2) for x in whole.chunk(3, dim=-1)]


@rule
def parts_of_one_projection(bench: Bench) -> None:
    for contiguous in (False, True):
        q, k, v = packed_heads(bench, bench.size(32, 2), 64, bench.size(16, 2), 64)
        q, k, v = (x.contiguous() if contiguous else x for x in (q, k, v))
        same(bench.flash(q, k, v), plain(q, k, v), 2e-3, 1e-2)


@rule
def fp16_beside_fp32(bench: Bench) -> None:
    q, k, v = (6 * bench.rand(16, 4, 8, 64, dtype=FLOAT) - 3 for _ in "qkv")
    same(bench.flash(*(x.to(HALF) for x in (q, k, v))).float(), plain(q, k, v), 7e-3, 7e-3)


@rule
def gradients_beside_fp64(bench: Bench) -> None:
    halves = (HALF, BRAIN) if bench.on_card else (HALF,)
    for causal, contiguous in itertools.product((False, True), repeat=2):
        exact = packed_heads(bench, 4, 4, 2, 16, torch.float64)
        exact = [x.contiguous() if contiguous else x for x in exact]
        d_out = bench.rand(4, 2, 4, 16, dtype=torch.float64)
        wanted = trained(partial(plain, is_causal=causal), exact, d_out)
        for dtype, tolerance in ((FLOAT, 1e-5), *((x, 7e-4 if x == HALF else 7e-3) for x in halves)):
            function = ours if dtype == FLOAT else bench.flash
            got = trained(partial(function, is_causal=causal), exact, d_out, dtype)
            for mine, theirs in zip(got[1:], wanted[1:]):
                same(mine.double(), theirs, tolerance, tolerance)


@rule
def gradients_by_finite_differences(bench: Bench) -> None:
    inputs = [x.requires_grad_() for x in packed_heads(bench, bench.size(4, 1), 4, 2, 16, torch.float64)]
    assert torch.autograd.gradcheck(ours, inputs)


@rule
def huge_numbers_give_no_nan(bench: Bench) -> None:
    x = torch.full((1, 1, 1, 64), 133120.0, device=bench.device).to(BRAIN)
    assert not bench.flash(x, x, x).isnan().any()


@rule
def one_number_of_any_stride(bench: Bench) -> None:
    query = torch.tensor([[[[1, 2]]]], dtype=HALF, device=bench.device).transpose(-1, -2)
    one = torch.ones(1, 1, 1, 1, dtype=HALF, device=bench.device)
    same(bench.flash(query, one, one), torch.ones_like(query))


@rule
def one_query_and_one_key(bench: Bench) -> None:
    q, k, v = (bench.randn(2, 4, 1, 64) for _ in "qkv")
    got = trained(bench.flash, (q, k, v), v)
    same(got[0], v)
    same(got[3], v)
    for gradient in got[1:3]:
        same(gradient, torch.zeros_like(v))


@card_rule
def batches_beyond_the_grid(bench: Bench) -> None:
    q, k, v = (bench.randn(2**16, 2, 8, 8) for _ in "qkv")
    got = trained(bench.flash, (q, k, v), v)
    for part in (slice(0, 2), slice(-2, None)):
        wanted = trained(plain, [x[part].float() for x in (q, k, v)], v[part])
        for mine, theirs in zip(got, wanted):
            same(mine[part], theirs, 5e-3, 5e-3)


@card_rule
def autocast(bench: Bench) -> None:
    q, k, v = (bench.rand(16, 16, 32, 32, dtype=FLOAT) for _ in "qkv")
    for dtype in (HALF, BRAIN):
        with torch.autocast("cuda", dtype=dtype):
            assert bench.flash(q, k, v).dtype == dtype


@rule
def negative_scale(bench: Bench) -> None:
    x = bench.randn(1, 3, 64, 64, dtype=FLOAT)
    same(attention(x, x, x, scale=-1.0 / 0.0001)[0], (x @ x.mT / -0.0001).softmax(-1) @ x)


@rule
def masks_of_one_to_four_dimensions(bench: Bench) -> None:
    shape = (bench.size(8, 2), bench.size(8, 2), bench.size(64, 9), bench.size(32, 7))
    for dims, dtype in itertools.product((1, 2, 3, 4), (HALF, FLOAT)):
        mask = bench.randn(*shape[4 - dims :], dtype=dtype)
        _masked_like_plain(bench, shape, mask, dtype)


@rule
def masks_of_odd_lengths_and_strides(bench: Bench) -> None:
    shape = (bench.size(8, 2), bench.size(8, 2), bench.size(64, 9), 15)
    for dtype in (HALF, FLOAT):
        mask = bench.randn(*shape, dtype=dtype)
        _masked_like_plain(bench, shape, mask, dtype)
        _masked_like_plain(bench, shape, mask.as_strided(shape, (0, 0, 0, 1)), dtype)


def _masked_like_plain(bench: Bench, shape: tuple[int, ...], mask: Tensor, dtype: torch.dtype) -> None:
    batch, heads, queries, keys = shape
    q, k, v = (bench.rand(batch, heads, n, 64, dtype=dtype) for n in (queries, keys, keys))
    d_out = torch.ones_like(q)
    got = trained(partial(ours, attn_mask=mask), (q, k, v), d_out)
    wide = mask if mask.dtype == torch.bool else mask.double()
    wanted = trained(partial(plain, mask=wide), (q, k, v), d_out, torch.float64)
    for mine, theirs in zip(got, wanted):
        same(mine, theirs, 2e-3 if dtype == HALF else 1e-5, 2e-3 if dtype == HALF else 1e-5)


@rule
def broadcast_masks(bench: Bench) -> None:
    queries, keys = bench.size(267, 19), bench.size(514, 33)
    shapes = [*itertools.product((queries, 1), (keys, 1))]
    shapes += itertools.product((2, 1), (3, 1), (queries, 1), (keys, 1))
    for number, shape in enumerate(shapes):
        dtype = (FLOAT, HALF)[number % 2]
        mask = bench.randn(*shape, dtype=dtype)
        for given in (mask, mask > -0.5):
            _masked_like_plain(bench, (2, 3, queries, keys), given, dtype)


@rule
def a_band_of_minus_infinity(bench: Bench) -> None:
    length = bench.size(600, 60)
    full = torch.full((length, length), -torch.inf, device=bench.device)
    mask = full.triu(1) + full.tril(-10)
    q, k, v = (bench.randn(1, 2, length, 8, dtype=FLOAT) for _ in "qkv")
    same(ours(q, k, v, attn_mask=mask), plain(q, k, v, mask))


@rule
def strides_of_one_decoding_step(bench: Bench) -> None:
    def made(size: tuple[int, ...], strides: tuple[int, ...]) -> Tensor:
        count = max(n * step for n, step in zip(size, strides))
        return torch.randn(count, device=bench.device).as_strided(size, strides)

    query = made((3, 16, 1, 128), (2304, 128, 2048, 1))
    key, value = (made((3, 16, 14, 128), (3584, 0, 256, 1)) for _ in "kv")
    mask = made((3, 1, 1, 14), (14, 14, 14, 1))
    out = attention(query, key, value, attn_mask=mask)[0]
    contiguous = attention(query, key, value, attn_mask=mask.contiguous())[0]
    assert float((out - contiguous).abs().mean()) < 1e-7
    same(out, plain(query, key, value, mask))


@card_rule
def a_mask_of_8192(bench: Bench) -> None:
    for dtype in (FLOAT, HALF):
        q, k, v = (bench.rand(1, 32, 8192, 64, dtype=dtype).requires_grad_() for _ in "qkv")
        mask = torch.randn(1, 32, 8192, 8192, device=bench.device, dtype=dtype)
        out = ours(q, k, v, attn_mask=mask)
        out.sum().backward()
        assert all(bool(x.isfinite().all()) for x in (out, q.grad, k.grad, v.grad))


@rule
def values_of_another_width(bench: Bench) -> None:
    shape = (bench.size(32, 1), bench.size(16, 1), bench.size(640, 64))
    dtype = BRAIN if bench.on_card else HALF
    q, k, v = (bench.rand(*shape, width, dtype=dtype) for width in (128, 128, 64))
    same(ours(q, k, v), plain(q.float(), k.float(), v.float()), 1e-3, 1e-2)


@rule
def causal_biases(bench: Bench) -> None:
    sizes = [(16, 16, 128, 128, 16), (16, 16, 128, 256, 32), (16, 16, 256, 128, 32), (1, 1, 23, 56, 15)]
    for batch, heads, queries, keys, width in sizes if bench.on_card else sizes[3:]:
        q, k, v = (bench.rand(batch, heads, n, width) for n in (queries, keys, keys))
        d_out = bench.randn(*q.shape)
        upper = causal_upper_left(queries, keys)._materialize(bench.device)
        cases = [({"is_causal": True}, upper), ({"attn_mask": upper}, upper)]
        if queries <= keys:
            lower = causal_lower_right(queries, keys)._materialize(bench.device)
            cases.append(({"attn_mask": lower}, lower))
        for given, mask in cases:
            got = trained(partial(ours, **given), (q, k, v), d_out)
            wanted = trained(partial(plain, mask=mask), (q, k, v), d_out)
            same(got[0], wanted[0], 1e-3, 1e-3)
            for mine, theirs in zip(got[1:], wanted[1:]):
                same(mine, theirs, 5e-3, 5e-3)


@rule
def sequences_of_many_lengths(bench: Bench) -> None:
    """PyTorch's nested tensors, as a pack: lengths of 1 and of 0 among them."""
    lengths = torch.randint(1, 32, (bench.size(32, 5),))
    lengths[::3], lengths[1::5] = 1, 0
    seqlens = torch.cat([torch.zeros(1), lengths.cumsum(0)]).to(torch.int32)
    q, k, v = (bench.randn(1, bench.size(16, 2), int(seqlens[-1]), 64) for _ in "qkv")
    out = attention(q, k, v, seqlens=seqlens.to(bench.device))[0]
    for start, end in zip(seqlens.tolist(), seqlens.tolist()[1:]):
        part = [x[:, :, start:end].float() for x in (q, k, v)]
        same(out[:, :, start:end], plain(*part), 1e-3, 1e-2)


@card_rule
def graphs_replay_the_same_output(bench: Bench) -> None:
    for causal, (queries, keys) in itertools.product((False, True), ((256, 256), (256, 1024), (1024, 512))):
        if causal and queries != keys:
            continue
        q, k, v = (bench.rand(8, 4, n, 64).requires_grad_() for n in (queries, keys, keys))
        d_out = bench.rand(8, 4, queries, 64)
        flash, stream = Flash(True), torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            eagerly = trained(partial(flash, is_causal=causal), (q, k, v), d_out)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = flash(q, k, v, is_causal=causal)
            gradients = torch.autograd.grad(out, (q, k, v), d_out)
        graph.replay()
        first = [x.clone() for x in (out, *gradients)]
        graph.replay()
        assert torch.equal(first[0], out) and torch.equal(first[0], eagerly[0])
        # The backward of a library may add in any order.
        assert torch.equal(first[0], out) and torch.equal(first[0], eagerly[0])
        for mine, once in zip(eagerly, first):  # PyTorch may choose cuDNN's gradient, which promises no bits
            same(once, mine, 1e-3, 1e-3)


@rule
def inputs_that_do_not_fit_are_refused(bench: Bench) -> None:
    q = bench.randn(1, 4, 8, 16, dtype=FLOAT)
    half = q.to(HALF)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        raises(RuntimeError, lambda: sdpa(q, half, half))
        raises(RuntimeError, lambda: sdpa(half[0, 0, 0], half[0, 0], half[0, 0]))
        if bench.on_card:
            raises(RuntimeError, lambda: sdpa(half, half[:, :, :4], half[:, :, :4], is_causal=True))
            raises(RuntimeError, lambda: sdpa(q, half.cpu(), half.cpu()))
    raises(TypeError, lambda: attention(q, half, half))
    raises(ValueError, lambda: attention(half[0, 0], half[0, 0], half[0, 0]))
