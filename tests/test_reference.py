"""The specification against an independent full-matrix fp64 oracle, analytic cases, and gradcheck."""

import math
from dataclasses import fields

import pytest
import torch
from cases import (
    CASES,
    EXTENDED,
    NON_FINITE,
    Case,
    break_a_key,
    extended_oracle,
    oracle,
    packed_cases,
    random_cases,
)
from hypothesis import given, settings

from hnf_attention.kernels.shared.results import Core, Extended
from hnf_attention.reference import attention as reference
from hnf_attention.reference import masks
from hnf_attention.reference.options import Options
from hnf_attention.statistics import fields as names
from hnf_attention.statistics.rows import RowStats

PLAIN = Options(None, False, 1.0, None, None, None)


def _run(case, dtype=torch.float64, extended=False):
    tensors = case.tensors(dtype)
    out, rows = reference.attention(*tensors[:3], case.options(*tensors), extended=extended)
    return tensors, out, rows


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_matches_the_oracle(case):
    tensors, out, rows = _run(case, extended=True)
    got = (out, rows.lse, rows.entropy, rows.max_logit, rows.min_logit)
    for actual, expected in zip(got, oracle(case, *tensors), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
    for name, expected in zip(EXTENDED, extended_oracle(case, *tensors), strict=True):
        actual = getattr(rows, name).to(expected.dtype)
        torch.testing.assert_close(
            actual, expected, rtol=1e-9, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_statistics_have_one_order_of_names():
    """The reference and the kernels return them by place."""
    assert names.EXTENDED_FIELDS == EXTENDED == Extended._fields
    assert tuple(field.name for field in fields(RowStats)) == (*Core._fields, *EXTENDED, "row_index")


@settings(max_examples=60, deadline=None, derandomize=True)
@given(case=random_cases() | packed_cases())
def test_matches_the_oracle_anywhere(case):
    test_matches_the_oracle(case)


def test_chunks_do_not_change_the_result(monkeypatch):
    case = CASES["everything"]
    _, out, rows = _run(case, extended=True)
    monkeypatch.setattr(masks, "CHUNK_ELEMENTS", 3 * case.num_keys * case.batch * case.kv_heads * case.group)
    _, chunked_out, chunked = _run(case, extended=True)
    torch.testing.assert_close(chunked_out, out)
    for field in fields(rows):
        torch.testing.assert_close(getattr(chunked, field.name), getattr(rows, field.name))


def test_uniform_scores_have_entropy_log_n():
    q, k = torch.zeros(1, 1, 3, 8), torch.randn(1, 1, 100, 8)
    _, rows = reference.attention(q, k, None, PLAIN, extended=True)
    torch.testing.assert_close(rows.entropy, torch.full((1, 1, 3), math.log(100)))
    torch.testing.assert_close(rows.max_weight, torch.full((1, 1, 3), 0.01))
    torch.testing.assert_close(rows.collision, torch.full((1, 1, 3), 0.01))
    torch.testing.assert_close(rows.tie_mass, torch.ones(1, 1, 3))
    assert rows.logit_var.abs().max() < 1e-6 and rows.score_std.abs().max() < 1e-6


def test_extended_statistics_match_their_definitions():
    case = Case(spread=3.0)
    tensors, _, rows = _run(case, extended=True)
    q, k = tensors[:2]
    scores = q @ k.repeat_interleave(case.group, 1).transpose(-1, -2) * case.head_dim**-0.5
    p = scores.softmax(-1)
    mean = (p * scores).sum(-1, keepdim=True)
    torch.testing.assert_close(rows.logit_var, (p * (scores - mean) ** 2).sum(-1))
    torch.testing.assert_close(rows.collision, (p**2).sum(-1))
    torch.testing.assert_close(rows.score_std, scores.std(-1, correction=0))
    torch.testing.assert_close(rows.score_mean, scores.mean(-1))
    assert rows.visible_keys.dtype == torch.int64 and (rows.visible_keys == case.num_keys).all()
    torch.testing.assert_close(rows.sink_mass, p[..., 0])


def test_entropy_is_exact_at_large_scores():
    # Integers below 2^24 and a power-of-two scale: the scores themselves are exact in fp32.
    torch.manual_seed(0)
    offsets = torch.randint(0, 64, (1, 1, 1, 200)).float() / 16
    k = torch.cat([torch.full((1, 1, 200, 1), 10000.0), offsets.mT], -1)
    q = torch.ones(1, 1, 1, 2)
    exact = reference.attention(q.double(), k.double(), None, PLAIN)[1]
    rows = reference.attention(q, k, None, PLAIN)[1]
    assert rows.max_logit.item() > 1e4
    assert (rows.entropy.double() - exact.entropy).abs().max() <= 1e-5


@pytest.mark.parametrize("sink", [60.0, 4e7])
def test_a_sink_far_above_the_keys_leaves_the_statistics_of_the_keys_alone(sink):
    """Their mean and spread were those of scores less the sink, and rounded at its size."""
    q, k, _, _, sinks = Case(sinks=True).tensors()
    high = PLAIN._replace(sinks=torch.full_like(sinks, sink))
    rows = reference.attention(q, k, None, PLAIN, extended=True)[1]
    sunk = reference.attention(q, k, None, high, extended=True)[1]
    for name in ("score_mean", "score_std", "visible_keys", "max_logit", "min_logit"):
        assert torch.equal(getattr(sunk, name), getattr(rows, name)), name


@pytest.mark.parametrize("number", NON_FINITE)
def test_a_non_finite_query_makes_its_own_row_nan_and_no_other(number):
    q, k, v, _, _ = Case().tensors()
    q[0, 1, 4, 2] = number
    _, rows = reference.attention(q, k, v, PLAIN, extended=True)
    broken = torch.zeros(q.shape[:3], dtype=torch.bool)
    broken[0, 1, 4] = True
    for name in ("lse", "entropy", "max_logit", "min_logit", "collision", "sink_mass"):
        assert torch.equal(getattr(rows, name).isnan(), broken), name


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("number", NON_FINITE)
def test_a_non_finite_key_makes_the_rows_nan_that_see_it_and_no_others(number, softcap):
    case, tensors, broken = break_a_key(number, softcap)
    out, rows = reference.attention(*tensors[:3], case.options(*tensors), extended=True)
    for name in ("lse", "entropy", "max_logit", "min_logit", "logit_var", "collision", "score_std"):
        assert torch.equal(getattr(rows, name).isnan(), broken), name
    if softcap is not None and number == number:  # tanh(inf) = 1: eager attention goes on, and so does ours
        torch.testing.assert_close(out.double(), oracle(case, *tensors)[0], rtol=1e-4, atol=1e-5)


def test_a_non_finite_key_that_is_hidden_harms_nothing():
    case = Case(num_queries=4, num_keys=6)
    q, k, v, _, _ = case.tensors()
    k[:, :, 5] = torch.nan
    _, rows = reference.attention(q, k, v, Options(None, True, 1.0, None, None, None))
    assert rows.entropy.isfinite().all()


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_explicit_backward_equals_autograd(case):
    q, k, v, mask, sinks = case.tensors(torch.float64)
    sinks = None if sinks is None else sinks.double().requires_grad_()
    for x in (q, k, v):
        x.requires_grad_()
    options = case.options(q, k, v, mask, sinks)
    out, rows = reference.attention(q, k, v, options)
    finite = rows.lse.isfinite()
    d_out, d_lse, d_entropy = torch.randn_like(out), torch.randn_like(rows.lse), torch.randn_like(rows.lse)
    lse = torch.where(finite, rows.lse, 0.0)  # the derivative of -inf is not asked for
    loss = (out * d_out).sum() + (lse * d_lse).sum() + (rows.entropy * d_entropy).sum()
    inputs = [x for x in (q, k, v, sinks) if x is not None]
    expected = torch.autograd.grad(loss, inputs)
    with torch.no_grad():
        got = reference.backward(
            q, k, v, options, out, rows.lse, rows.entropy, d_out, torch.where(finite, d_lse, 0.0), d_entropy
        )
    for actual, wanted in zip([g for g in got if g is not None], expected):
        torch.testing.assert_close(actual, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "name", ["plain", "everything", "empty rows", "bool mask by head", "packed everything"]
)
def test_visible_keys_counts_and_finds_the_first(name):
    case = CASES[name]
    tensors = case.tensors()
    q, k = tensors[:2]
    options = case.options(*tensors)
    count, first = masks.visible_keys(q.shape[2], k.shape[2], options, q.device)
    seen = masks.visible(slice(0, q.shape[2]), k.shape[2], options, q.device)
    torch.testing.assert_close(count.expand(seen.shape[:-1]), seen.sum(-1))
    expected = torch.where(seen.any(-1), seen.to(torch.uint8).argmax(-1), 0)
    torch.testing.assert_close(first.expand(seen.shape[:-1]), expected)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("window_size", [None, 1, 4, 100])
@pytest.mark.parametrize("seqlens", [None, [0], [0, 0, 1, 9, 9, 25], [0, 30]])
def test_visible_keys_by_position_equals_the_mask(is_causal, window_size, seqlens):
    num_keys = 12 if seqlens is None else 30
    seqlens = None if seqlens is None else torch.tensor(seqlens)
    options = PLAIN._replace(is_causal=is_causal, window_size=window_size, seqlens=seqlens)
    count, first = masks.visible_keys(30, num_keys, options, torch.device("cpu"))
    seen = masks.visible(slice(0, 30), num_keys, options, torch.device("cpu"))
    assert torch.equal(count, seen.sum(-1))
    assert torch.equal(first, torch.where(seen.any(-1), seen.to(torch.uint8).argmax(-1), 0))


def test_a_sink_of_minus_infinity_is_no_sink():
    q, k, v, *_ = Case().tensors(torch.float64)
    absent = torch.full((q.shape[1],), -torch.inf, dtype=torch.float64, requires_grad=True)
    sunk = Options(None, True, 1.0, None, None, absent)
    out, rows = reference.attention(q, k, v, sunk, extended=True)
    plain, plain_rows = reference.attention(
        q, k, v, Options(None, True, 1.0, None, None, None), extended=True
    )
    torch.testing.assert_close(out, plain)
    for name in ("lse", "entropy", "logit_var", "collision", "sink_mass"):
        torch.testing.assert_close(getattr(rows, name), getattr(plain_rows, name))
    ones = torch.ones_like(rows.lse)
    arguments = (q, k, v, sunk, out, rows.lse, rows.entropy, out, ones, ones)
    assert not reference.backward(*arguments).sinks.any()
