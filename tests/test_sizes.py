"""Sizes of the scores: the longest rows by a kernel, bounds, and exact scores of the heads that need them."""

import contextlib

import pytest
import torch
from cases import Case

from hnf_attention.engine import engines
from hnf_attention.engine.sizes import extreme_scores, longest_rows
from hnf_attention.interventions.sizes import bounds_of_sizes, sizes_of_rows, sizes_over
from hnf_attention.reference import attention as reference

probe = engines.kernel("portable.probe")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(params=["kernels", "plain PyTorch"], autouse=True)
def way(request, monkeypatch):
    """Both ways on any device: kernels run through the interpreter on a CPU."""
    if request.function is not test_fp64_and_wide_heads_are_computed_without_a_kernel:
        monkeypatch.setattr(engines, "kernels_cover", lambda *_: request.param == "kernels")
        monkeypatch.setattr(engines, "on_device", lambda _: contextlib.nullcontext())
    return request.param


FLOATS = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])


def lengths(x):
    return torch.linalg.vector_norm(x.double(), dim=-1).amax((0, 2))


@FLOATS
@pytest.mark.parametrize("shape", [(2, 2, 2, 150, 37, 24), (1, 1, 4, 1, 130, 80), (2, 1, 2, 300, 300, 64)])
def test_the_longest_rows_are_those_of_plain_pytorch(shape, dtype):
    batch, kv_heads, group, queries, keys, head_dim = shape
    query = torch.randn(batch, queries, kv_heads * group, head_dim, device=DEVICE).to(dtype).transpose(1, 2)
    key = torch.randn(batch, kv_heads, head_dim, keys, device=DEVICE).to(dtype).transpose(2, 3)
    for got, x in zip(longest_rows(query, key), (query, key)):
        torch.testing.assert_close(got.double(), lengths(x), rtol=1e-5, atol=0)


def test_fp64_and_wide_heads_are_computed_without_a_kernel():
    for dtype, head_dim in ((torch.float64, 8), (torch.float32, 300)):
        query, key = (torch.randn(1, 2, 5, head_dim, dtype=dtype) for _ in "qk")
        for got, x in zip(longest_rows(query, key), (query, key)):
            torch.testing.assert_close(got.double(), lengths(x), rtol=1e-5, atol=0)


@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("side", [0, 1])
def test_a_head_with_a_number_that_is_not_finite_has_no_finite_length(side, number):
    tensors = [torch.randn(2, 3, 40, 16, device=DEVICE) for _ in "qk"]
    tensors[side][1, 2, 39, 15] = number
    found = longest_rows(*tensors)
    assert found[side].isfinite().tolist() == [True, True, False] and found[1 - side].isfinite().all()


def test_numbers_that_are_huge_or_tiny():
    query = torch.full((1, 1, 3, 16), 1e18, device=DEVICE)
    key = torch.zeros(1, 1, 3, 16, device=DEVICE)
    longest, none = longest_rows(query, key)
    assert float(longest) == pytest.approx(4e18) and float(none) == 0


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16][: 3 if DEVICE == "cuda" else 2]
)
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


def test_no_head_is_wanted_and_none_is_computed(monkeypatch, way):
    if way != "kernels":
        return  # plain PyTorch computes every head
    case = Case(1, 2, 1, 70, 70, 16, 16)
    q, k, v, *_ = case.tensors(torch.float32, DEVICE)
    none = torch.zeros(2, dtype=torch.bool, device=DEVICE)
    made = probe.new_rows

    def filled(*args, **named):
        rows = made(*args, **named)
        for x in rows[:4]:
            x.fill_(7.0)
        return rows

    monkeypatch.setattr(probe, "new_rows", filled)
    found = extreme_scores(q, k, case.options(q, k, v, None, None), none)
    assert all((x == 7.0).all() for x in found)
