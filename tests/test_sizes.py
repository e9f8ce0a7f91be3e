"""Sizes of the scores: the longest rows by a kernel, bounds, and exact scores of the heads that need them."""

import contextlib

import pytest
import torch
from cases import Case
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from hnf_attention.engine import engines
from hnf_attention.engine.scaled import scaled_queries
from hnf_attention.engine.sizes import (
    Raised,
    bounds_of_sizes,
    clip_factors,
    product_options,
    sizes_of_rows,
    sizes_over,
)
from hnf_attention.interventions.sizes import LayerSizes
from hnf_attention.reference import attention as reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(params=["kernels", "plain PyTorch"], autouse=True)
def way(request, monkeypatch):
    """Both ways on any device: kernels run through the interpreter on a CPU."""
    if request.function is not test_fp64_and_wide_heads_are_computed_without_a_kernel:
        monkeypatch.setattr(engines, "kernels_cover", lambda *_: request.param == "kernels")
        monkeypatch.setattr(engines, "on_device", lambda _: contextlib.nullcontext())
    return request.param


# The interpreter cuts bf16 off, where a card rounds.
ROUNDED = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16][: 3 if DEVICE == "cuda" else 2]
)
FLOATS = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])


def nothing_yet(heads):
    found = torch.full((1 + heads,), -torch.inf, dtype=torch.float32, device=DEVICE)
    return Raised(found[0].clone(), found[1:].clone())


def bounds_of(query, key, options=None, **named):
    """Bounds by whichever way the test has."""
    options = options or Case(1, 1, 1, 1, 1, 1, 1).options(*[torch.ones(1, 1, 1, 1)] * 3, None, None)
    named = {"measure": "max_logit", "threshold": 1.0, "exact": False} | named
    return clip_factors(query, key, options._replace(scale=1.0), None, nothing_yet(query.shape[1]), **named)[
        0
    ]


def lengths(x):
    return torch.linalg.vector_norm(x.double(), dim=-1).amax((0, 2))


@FLOATS
@pytest.mark.parametrize("shape", [(2, 2, 2, 150, 37, 24), (1, 1, 4, 1, 130, 80), (2, 1, 2, 300, 300, 64)])
def test_a_bound_is_the_product_of_the_longest_rows(shape, dtype):
    batch, kv_heads, group, queries, keys, head_dim = shape
    query = torch.randn(batch, queries, kv_heads * group, head_dim, device=DEVICE).to(dtype).transpose(1, 2)
    key = torch.randn(batch, kv_heads, head_dim, keys, device=DEVICE).to(dtype).transpose(2, 3)
    expected = lengths(query) * lengths(key).repeat_interleave(group)
    torch.testing.assert_close(bounds_of(query, key).double(), expected, rtol=1e-5, atol=0)


def test_fp64_and_wide_heads_are_computed_without_a_kernel():
    for dtype, head_dim in ((torch.float64, 8), (torch.float32, 300)):
        query, key = (torch.randn(1, 2, 5, head_dim, dtype=dtype, device=DEVICE) for _ in "qk")
        expected = lengths(query) * lengths(key)
        torch.testing.assert_close(bounds_of(query, key).double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("side", [0, 1])
def test_a_head_with_a_number_that_is_not_finite_has_no_finite_bound(side, number):
    tensors = [torch.randn(2, 3, 40, 16, device=DEVICE) for _ in "qk"]
    tensors[side][1, 2, 39, 15] = number
    assert bounds_of(*tensors).tolist()[2] == torch.inf and bounds_of(*tensors)[:2].isfinite().all()


def test_numbers_that_are_huge_or_tiny():
    query = torch.full((1, 1, 3, 16), 1e18, device=DEVICE)
    key = torch.zeros(1, 1, 3, 16, device=DEVICE)
    assert float(bounds_of(query, key)) == 0
    key[0, 0, 1, 3] = 1e-15
    assert float(bounds_of(query, key)) == pytest.approx(4e3)


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("exact", [False, True])
def test_numbers_are_fp32_whatever_the_default_is(default, exact):
    case = Case(1, 2, 1, 70, 70, 16, 16)
    q, k, v, *_ = case.tensors(torch.float32, DEVICE)
    options = case.options(q, k, v, None, None)
    named = {"measure": "range", "threshold": 1e-3, "exact": exact}
    expected = clip_factors(q, k, options, None, nothing_yet(2), **named)
    torch.set_default_dtype(default)
    try:
        layer = LayerSizes(2, torch.device(DEVICE))
        found = clip_factors(q, k, options, None, Raised(layer.top, layer.largest), **named)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(map(torch.equal, found, expected)) and torch.equal(layer.largest, expected[0])


@ROUNDED
@pytest.mark.parametrize("window", [None, 20])
def test_heads_over_the_threshold_are_exact_and_the_others_have_their_bound(window, dtype):
    case = Case(2, 3, 2, 150, 150, 16, 16, is_causal=True, window_size=window)
    q, k, v, *_ = case.tensors(dtype, DEVICE)
    q[:, 1] *= 6.0
    q[:, 4] *= 5.0
    options = case.options(q, k, v, None, None)
    bounds = bounds_of_sizes(q, k, options.scale, "range")
    rows = reference.attention(q.double(), k.double(), None, options)[1]
    exact = sizes_of_rows(rows.max_logit, rows.min_logit, None, "range")
    assert (exact <= bounds * (1 + 1e-5)).all()
    threshold = float(bounds[[1, 4]].min()) * 0.9
    found = sizes_over(bounds, threshold, q, k, options, None, "range")
    over = [1, 4]
    torch.testing.assert_close(found[over], exact[over], rtol=1e-5, atol=1e-5)
    others = [0, 2, 3, 5]
    assert torch.equal(found[others], bounds[others])


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("measure", ["range", "max_logit"])
@pytest.mark.parametrize("hides", [False, True])
def test_factors_bring_the_heads_of_a_call_to_the_threshold(exact, measure, hides):
    case = Case(2, 3, 2, 150, 150, 16, 16, is_causal=True, window_size=40 if hides else None)
    q, k, v, *_ = case.tensors(torch.float16 if measure == "max_logit" else torch.float32, DEVICE)
    q[:, [1, 4]] *= 6.0
    options = case.options(q, k, v, None, None)
    left_out = skipped = None
    if hides:  # the longest query of one head does not count
        q[1, 4, 70] *= 10.0
        left_out = torch.zeros(2, 150, dtype=torch.bool, device=DEVICE)
        left_out[1, 70] = True
        skipped = left_out[:, None]
    bounds = bounds_of_sizes(q, k, options.scale, measure)
    rows = reference.attention(q.double(), k.double(), None, options)[1]
    expected = bounds.clone()
    threshold = float(bounds[[1, 4]].min()) * 0.3
    if exact:
        over = bounds > threshold
        expected[over] = sizes_of_rows(rows.max_logit, rows.min_logit, skipped, measure)[over]
        assert (expected[[1, 4]] < bounds[[1, 4]]).all()
    raised = nothing_yet(6)
    raised.largest[3] = 1e5
    named = {"measure": measure, "threshold": threshold, "exact": exact}
    sizes, factors = clip_factors(q, k, options, left_out, raised, **named)
    torch.testing.assert_close(sizes, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(factors, (threshold / expected).clamp(max=1.0), rtol=1e-5, atol=0)
    assert (factors[[1, 4]] < 1).all() and float(raised.top) == pytest.approx(float(bounds.max()))
    assert raised.largest[3] == 1e5 and torch.equal(raised.largest[[0, 1, 2, 4, 5]], sizes[[0, 1, 2, 4, 5]])
    # What is less raises nothing.
    clip_factors(q * 0.5, k, options, left_out, raised, **named)
    assert raised.largest[3] == 1e5 and torch.equal(raised.largest[[0, 1, 2, 4, 5]], sizes[[0, 1, 2, 4, 5]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    "options",
    [
        {"mask": "bool"},
        {"mask": "additive", "softcap": 20.0, "is_causal": True},
        {"seqlens": (0, 10, 70, 150), "is_causal": True},
        {"seqlens": (0, 10, 70, 150), "window_size": 9, "sinks": True},
    ],
    ids=lambda options: ", ".join(options),
)
def test_exact_sizes_are_those_of_the_product_alone(options, dtype):
    case = Case(1, 2, 2, 150, 150, 16, 16, **options)
    q, k, v, mask, sinks = case.tensors(dtype, DEVICE)
    given = product_options(case.options(q, k, v, mask, sinks))
    rows = reference.attention(q.double(), k.double(), None, given)[1]
    expected = sizes_of_rows(rows.max_logit, rows.min_logit, None, "range")
    named = {"measure": "range", "threshold": 1e-3, "exact": True}
    found = clip_factors(q, k, case.options(q, k, v, mask, sinks), None, nothing_yet(4), **named)[0]
    torch.testing.assert_close(found, expected.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("number", [torch.nan, torch.inf])
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("where", ["query", "key", "all queries"])
def test_a_head_that_is_not_finite_has_no_factor_and_is_remembered(where, exact, number):
    case = Case(1, 2, 1, 140, 140, 16, 16, is_causal=True)
    q, k, v, *_ = case.tensors(torch.float32, DEVICE)
    broken, options, raised = [q.clone(), k.clone()], case.options(q, k, v, None, None), nothing_yet(2)
    broken[where == "key"][0, 1, slice(None) if "all" in where else 7, 3] = number
    named = {"measure": "range", "threshold": 1e-3, "exact": exact}
    for query, key in (broken, (q, k)):
        sizes, factors = clip_factors(query, key, options, None, raised, **named)
        assert 0 < factors[0] < 1 and raised.largest.isfinite().tolist() == [True, False]
        assert (factors[1] < 1) == sizes[1].isfinite() and raised.top == torch.inf
    assert sizes[1].isfinite()


def test_a_key_that_no_row_sees_may_hold_anything():
    case = Case(1, 1, 1, 140, 140, 16, 16, mask="bool")
    q, k, v, mask, _ = case.tensors(torch.float32, DEVICE)
    mask[..., 9] = False
    options = case.options(q, k, v, mask, None)
    named = {"measure": "range", "threshold": 1e-3, "exact": True}
    expected = clip_factors(q, k, options, None, nothing_yet(1), **named)[0]
    k[0, 0, 9] = torch.nan
    torch.testing.assert_close(clip_factors(q, k, options, None, nothing_yet(1), **named)[0], expected)


@pytest.mark.parametrize("number", [torch.nan, torch.inf])
def test_rows_that_do_not_count_may_hold_anything(number):
    case = Case(1, 2, 1, 40, 40, 16, 16)
    q, k, v, *_ = case.tensors(torch.float32, DEVICE)
    options, left_out = (
        case.options(q, k, v, None, None),
        torch.zeros(1, 40, dtype=torch.bool, device=DEVICE),
    )
    rows = reference.attention(q.double(), k.double(), None, options)[1]
    q[0, 1, 7], left_out[0, 7] = number, True
    expected = sizes_of_rows(rows.max_logit, rows.min_logit, left_out[:, None], "range").float()
    named = {"measure": "range", "threshold": 1e-3, "exact": True}
    sizes, factors = clip_factors(q, k, options, left_out, nothing_yet(2), **named)
    torch.testing.assert_close(sizes, expected, rtol=1e-5, atol=1e-5)
    assert (factors < 1).all()


LAYOUTS = {
    "(B, H, M, D)": lambda: torch.randn(2, 3, 150, 24, device=DEVICE),
    "(B, M, H, D)": lambda: torch.randn(2, 150, 3, 24, device=DEVICE).transpose(1, 2),
    "fused": lambda: torch.randn(2, 150, 3, 3, 24, device=DEVICE)[:, :, 1].transpose(1, 2),
    "no unit stride": lambda: torch.randn(2, 3, 24, 150, device=DEVICE).transpose(2, 3),
    "no rows": lambda: torch.randn(2, 3, 0, 24, device=DEVICE),
}


@ROUNDED
@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_queries_times_factors_are_rounded_once_and_so_are_gradients(layout, dtype):
    raw = LAYOUTS[layout]().to(dtype)
    factors = torch.tensor([1.0, 0.337, 0.91], device=DEVICE)
    query = raw.detach().requires_grad_()
    out = scaled_queries(query, factors)
    weight = torch.randn_like(raw)

    def product(x):
        return (x.double() * factors.double()[:, None, None]).to(dtype)

    torch.testing.assert_close(out, product(raw), rtol=1e-7 if dtype == torch.float32 else 0, atol=0)
    assert torch.equal(out[:, 0], raw[:, 0]) and out.dtype == dtype
    given = []
    out.register_hook(lambda grad: given.append(grad.clone()))
    for _ in range(2):
        (found,) = torch.autograd.grad((out * weight).sum(), query, retain_graph=True)
        torch.testing.assert_close(found, product(weight), rtol=1e-7 if dtype == torch.float32 else 0, atol=0)
    assert all(torch.equal(x, weight) for x in given)


def test_second_derivatives_pass_queries_times_factors():
    factors = torch.tensor([1.0, 0.337], device=DEVICE)
    query = torch.randn(1, 2, 5, 8, device=DEVICE, requires_grad=True)
    (first,) = torch.autograd.grad(scaled_queries(query, factors).square().sum(), query, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), query)
    torch.testing.assert_close(second, (2 * factors.square())[:, None, None].expand_as(query))


def test_a_gradient_that_others_hold_is_left_to_them():
    factors = torch.tensor([1.0, 0.337], device=DEVICE)
    query = torch.randn(1, 2, 5, 8, device=DEVICE, requires_grad=True)
    weight, kept = torch.randn_like(query), []
    scaled = scaled_queries(query, factors)
    scaled.register_hook(kept.append)
    of_scaled, of_query = torch.autograd.grad((scaled * weight).sum(), [scaled, query])
    assert torch.equal(of_scaled, weight) and torch.equal(kept[0], weight)
    torch.testing.assert_close(of_query, weight * factors[:, None, None])
    beside = torch.zeros_like(query, requires_grad=True) * 1.0  # a query bias
    scaled = (scaled_queries(query, factors).transpose(1, 2) + beside.transpose(1, 2)).transpose(1, 2)
    found = torch.autograd.grad((scaled * weight).sum(), [beside, query])
    assert torch.equal(found[0], weight)
    torch.testing.assert_close(found[1], weight * factors[:, None, None])


@pytest.mark.parametrize("counts", ["forward", "backward"])
def test_a_checkpoint_may_run_one_of_its_passes_under_a_dispatch_mode(counts):
    factors = torch.tensor([1.0, 0.337], device=DEVICE)
    query = torch.randn(1, 2, 5, 8, device=DEVICE, requires_grad=True)

    def mode(here):
        return FlopCounterMode(display=False) if here == counts else contextlib.nullcontext()

    with mode("forward"):
        out = checkpoint(lambda x: scaled_queries(x, factors).square(), query, use_reentrant=False)
    with mode("backward"):
        out.sum().backward()
    torch.testing.assert_close(query.grad, 2 * query.detach() * factors.square()[:, None, None])
