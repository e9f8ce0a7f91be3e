"""Triton kernels against the fp64 oracle and the reference: interpreter on the CPU, for real on a GPU."""

import itertools

import pytest
import torch
from cases import (
    CASES,
    EXTENDED,
    HEAD_DIMS,
    NON_FINITE,
    Case,
    break_a_key,
    cases_with,
    close,
    errors_beside_sdpa,
    extended_oracle,
    oracle,
    random_cases,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from hnf_attention.reference import attention as reference

pytest.importorskip("triton", reason="Triton kernels need Linux")
from hnf_attention.kernels.portable import backward, forward, probe
from hnf_attention.kernels.shared.tiles import Tiles

ON_GPU = torch.cuda.is_available()
# The interpreter has no bf16 products; its tiles are small so that short rows span several.
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if ON_GPU else [])
TILES = None if ON_GPU else Tiles(16, 16, 4, 1)
BACKWARD_TILES = None if ON_GPU else (TILES, TILES)
# Relative to the largest entry: rounding of inputs' products in fp32, of P and the output otherwise.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def _check_forward(case, dtype, device):
    tensors = case.tensors(dtype, device)
    expected = oracle(case, *tensors)
    # 1 - 2 / (e^2x + 1) rounds in proportion to the cap, however small the score (docs/limits.md).
    bend = (case.softcap or 0.0) * 2**-22
    for extended in (False, True):
        got = forward.forward(*tensors[:3], case.options(*tensors), TILES, extended)
        close(got[0], expected[0], TOLERANCE[dtype] + bend, "out")
        for name, actual, wanted in zip(("lse", "entropy", "max_logit", "min_logit"), got[1:], expected[1:]):
            assert actual.dtype == torch.float32
            close(actual, wanted, 1e-5 + bend, name)
    for name, actual, wanted in zip(EXTENDED, got[5], extended_oracle(case, *tensors), strict=True):
        close(actual, wanted, 2e-5 + bend, name)


@pytest.mark.parametrize(("case", "dtype"), cases_with(DTYPES))
def test_forward_matches_the_oracle(case, dtype, device):
    _check_forward(case, dtype, device)


@pytest.mark.slow
@settings(max_examples=10, deadline=None, derandomize=True)
@given(case=random_cases(), dtype=st.sampled_from(DTYPES))
def test_forward_matches_the_oracle_anywhere(case, dtype):
    _check_forward(case, dtype, "cuda" if ON_GPU else "cpu")


@pytest.mark.parametrize(
    ("is_causal", "window_size"),
    [
        (False, 20),
        (True, None),
        pytest.param(False, None, marks=pytest.mark.slow),
        pytest.param(True, 20, marks=pytest.mark.slow),
    ],
)
def test_forward_walks_masked_and_unmasked_tiles(is_causal, window_size, device):
    case = Case(1, 1, 1, 70, 90, is_causal=is_causal, window_size=window_size)
    _check_forward(case, torch.float32, device)


def test_forward_takes_a_sink_of_minus_infinity_for_none(device):
    case = Case(is_causal=True)
    q, k, v, _, _ = case.tensors(device=device)
    absent = torch.full((q.shape[1],), -torch.inf, device=device)
    got = forward.forward(q, k, v, case.options(q, k, v, None, absent), TILES)
    expected = forward.forward(q, k, v, case.options(q, k, v, None, None), TILES)
    for actual, wanted in zip(got, expected):
        torch.testing.assert_close(actual, wanted)


@pytest.mark.parametrize("window_size", [2**31 - 1, 2**31, 2**63 - 1])
def test_a_window_wider_than_everything_hides_nothing(window_size, device):
    case = Case(window_size=window_size)
    tensors = case.tensors(device=device)
    got = forward.forward(*tensors[:3], case.options(*tensors), TILES)
    expected = forward.forward(*tensors[:3], Case().options(*tensors), TILES)
    for actual, wanted in zip(got, expected):
        torch.testing.assert_close(actual, wanted)


def test_forward_entropy_is_exact_at_large_scores(device):
    torch.manual_seed(0)
    offsets = torch.randint(0, 64, (1, 1, 1, 200)).float() / 16
    k = torch.cat([torch.full((1, 1, 200, 1), 10000.0), offsets.mT, torch.zeros(1, 1, 200, 14)], -1)
    q = torch.ones(1, 1, 16, 16)
    case = Case(scale=1.0)
    exact = reference.attention(
        q.double(), k.double(), None, case.options(q.double(), k.double(), None, None, None)
    )
    q, k = q.to(device), k.to(device)
    entropy = probe.probe(q, k, case.options(q, k, None, None, None), TILES)[1]
    assert (entropy.cpu().double() - exact[1].entropy).abs().max() <= 1e-5


@pytest.mark.parametrize("number", NON_FINITE)
def test_forward_says_nan_for_rows_that_non_finite_input_reached(number, device):
    case = Case(sinks=True)
    q, k, v, mask, sinks = case.tensors(device=device)
    q[0, 1, 4, 2] = number
    got = forward.forward(q, k, v, case.options(q, k, v, mask, sinks), TILES, extended=True)
    broken = torch.zeros(q.shape[:3], dtype=torch.bool, device=device)
    broken[0, 1, 4] = True
    *numbers, visible_keys = got[5]
    for row_stat in (*got[1:5], *numbers):
        assert torch.equal(row_stat.isnan(), broken)
    assert (visible_keys == case.num_keys).all()


@pytest.mark.parametrize("softcap", [None, pytest.param(5.0, marks=pytest.mark.slow)])
@pytest.mark.parametrize("number", NON_FINITE)
def test_a_non_finite_key_makes_the_rows_nan_that_see_it_and_no_others(number, softcap, device):
    case, tensors, broken = break_a_key(number, softcap)
    tensors = [x if x is None else x.to(device) for x in tensors]
    options = case.options(*tensors)
    out, *row_stats, more = forward.forward(*tensors[:3], options, TILES, extended=True)
    for row_stat in (*row_stats, *more[:-1]):
        assert torch.equal(row_stat.isnan().cpu(), broken)
    if softcap is not None and number == number:  # tanh(inf) = 1: eager attention goes on, and so does ours
        close(out, oracle(case, *tensors)[0], TOLERANCE[torch.float32], "out")
    lse, entropy = row_stats[:2]
    gradients = backward.backward(
        *tensors[:3], options, out, lse, entropy, torch.ones_like(out), None, None, BACKWARD_TILES
    )
    assert gradients.query.isnan().any(-1).cpu()[broken].all()
    for name in ("query", "key", "value"):
        reached = getattr(gradients, name).isnan().unflatten(1, (case.kv_heads, -1)).flatten(2).any(-1)
        assert reached.tolist() == [[False, True], [False, False]], name


@pytest.mark.parametrize(("case", "dtype"), cases_with(DTYPES))
def test_backward_matches_the_reference(case, dtype, device):
    tensors = case.tensors(dtype, device)
    _check_backward(tensors, case.options(*tensors), TOLERANCE[dtype])


@pytest.mark.slow
@settings(max_examples=7, deadline=None, derandomize=True)
@given(case=random_cases())
def test_backward_matches_the_reference_anywhere(case):
    tensors = case.tensors(device="cuda" if ON_GPU else "cpu")
    # Scores of 30 and more, rounded in fp32 on both sides; 3e-6 is the worst of 300 random cases.
    _check_backward(tensors, case.options(*tensors), 1e-5)


def _check_backward(
    tensors, options, tolerance, with_value=True, cotangents=(True, True, True), tiles=BACKWARD_TILES
):
    q, k, v = tensors[:3]
    v = v if with_value else None
    if with_value:
        out, lse, entropy, *_ = forward.forward(q, k, v, options, TILES)
    else:
        out, (lse, entropy, *_) = q.new_empty(0), probe.probe(q, k, options, TILES)
    use_out, use_lse, use_entropy = cotangents
    arguments = (
        lse,
        entropy,
        torch.randn_like(out) if use_out and with_value else None,
        torch.randn_like(lse) if use_lse else None,
        torch.randn_like(lse) if use_entropy else None,
    )
    got = backward.backward(q, k, v, options, out, *arguments, tiles)
    expected = reference.backward(q, k, v, options, out, *arguments)
    for name, actual, wanted in zip(got._fields, got, expected):
        assert (actual is None) == (wanted is None), name
        if actual is not None:
            assert actual.dtype == wanted.dtype and actual.shape == wanted.shape
            close(actual, wanted, 2 * tolerance, name)


@pytest.mark.parametrize(
    ("with_value", "cotangents"),
    [
        (True, (True, False, False)),
        (True, (False, True, False)),
        (True, (False, False, True)),
        (False, (False, True, True)),
    ],
)
def test_backward_of_each_cotangent_alone(with_value, cotangents, device):
    case = CASES["sinks"]
    tensors = case.tensors(device=device)
    _check_backward(tensors, case.options(*tensors), 2e-6, with_value, cotangents)


@pytest.mark.parametrize(
    ("is_causal", "window_size", "lengths"),
    [
        pytest.param(
            *walk, marks=() if walk in ((False, 20, (90, 70)), (True, None, (70, 90))) else pytest.mark.slow
        )
        for walk in itertools.product((False, True), (None, 20), ((70, 90), (90, 70)))
    ],
)
def test_backward_walks_masked_and_unmasked_tiles(is_causal, window_size, lengths, device):
    case = Case(1, 1, 2, *lengths, is_causal=is_causal, window_size=window_size)
    tensors = case.tensors(device=device)
    tiles = None if ON_GPU else (Tiles(16, 32, 4, 1), Tiles(32, 16, 4, 1))
    _check_backward(tensors, case.options(*tensors), 2e-6, tiles=tiles)


MASKS = [
    ((2, 2, 19, 23), {}),
    ((1, 1, 19, 23), {"softcap": 2.0, "spread": 3.0}),
    ((1, 2, 19, 23), {"softcap": 2.0, "sinks": True, "is_causal": True, "window_size": 9}),
    ((2, 1, 1, 23), {"is_causal": True}),
    ((2, 2, 19, 1), {"window_size": 5}),
    ((1, 1, 30, 30), {"batch": 1, "num_queries": 30, "num_keys": 30, "seqlens": (0, 17, 17, 28)}),
]


@pytest.mark.parametrize(
    ("shape", "change", "dtype"),
    [
        pytest.param(
            *mask, dtype, marks=() if (number + other) % 2 else pytest.mark.slow, id=f"{mask}-{dtype}"
        )
        for number, mask in enumerate(MASKS)
        for other, dtype in enumerate(DTYPES)
    ],
)
def test_backward_of_the_mask(shape, change, dtype, device):
    """Its gradient has its shape and dtype, and is that of autograd through the reference's forward."""
    case = Case(**{"kv_heads": 1} | change)
    q, k, v, _, sinks = case.tensors(dtype, device)
    generator = torch.Generator().manual_seed(1)
    hidden = torch.rand(shape, generator=generator) < 0.1
    mask = torch.randn(shape, generator=generator).masked_fill(hidden, -torch.inf).to(device, dtype)
    mask.requires_grad_()
    options = case.options(q, k, v, mask, sinks)
    out, rows = reference.attention(q, k, v, options)
    results = (out, rows.lse, rows.entropy)
    cotangents = [torch.randn(x.shape, generator=generator).to(x) for x in results]
    (expected,) = torch.autograd.grad(results, mask, cotangents)
    arguments = (q, k, v, options, *(x.detach() for x in results), *cotangents)
    with torch.no_grad():
        got = backward.backward(*arguments, BACKWARD_TILES, mask_gradient=True)
        assert backward.backward(*arguments, BACKWARD_TILES).mask is None
        written_out = reference.backward(*arguments, mask_gradient=True)
        for _ in range(20 if ON_GPU else 0):
            again = backward.backward(*arguments, BACKWARD_TILES, mask_gradient=True)
            assert torch.equal(again.mask, got.mask)
    for actual in (got.mask, written_out.mask):
        assert actual.shape == shape and actual.dtype == dtype
        close(actual, expected, 2 * TOLERANCE[dtype], "mask")
        assert not actual[mask == -torch.inf].any()


def test_a_hidden_key_that_holds_nan_gets_no_gradient(device):
    """Its soft-cap's slope is NaN, which a weight of 0 does not take away."""
    case = Case(softcap=2.0)
    q, k, v, *_ = case.tensors(device=device)
    mask = torch.zeros(1, 1, 1, case.num_keys, device=device)
    k[:, :, 5], mask[..., 5] = torch.nan, -torch.inf
    options = case.options(q, k, v, mask, None)
    out, lse, entropy, *_ = forward.forward(q, k, v, options, TILES)
    cotangents = (torch.ones_like(out), None, torch.ones_like(entropy))
    got = backward.backward(
        q, k, v, options, out, lse, entropy, *cotangents, BACKWARD_TILES, mask_gradient=True
    )
    assert got.mask.isfinite().all() and got.key.isfinite().all()
    assert not got.mask[..., 5].any() and not got.key[:, :, 5].any()


def test_backward_takes_cotangents_of_any_strides(device):
    case = Case(is_causal=True)
    q, k, v, mask, sinks = case.tensors(device=device)
    options = case.options(q, k, v, mask, sinks)
    out, lse, entropy, *_ = forward.forward(q, k, v, options, TILES)
    one = torch.ones((), device=device)
    broadcast = [one.expand(x.shape) for x in (out, lse, entropy)]
    got = backward.backward(q, k, v, options, out, lse, entropy, *broadcast, BACKWARD_TILES)
    copied = [x.contiguous() for x in broadcast]
    expected = backward.backward(q, k, v, options, out, lse, entropy, *copied, BACKWARD_TILES)
    assert all(torch.equal(a, b) for a, b in zip(got[:3], expected[:3]))


@pytest.mark.slow
def test_forward_and_backward_are_deterministic(device):
    length, tiles = (600, None) if ON_GPU else (40, BACKWARD_TILES)
    batch, kv_heads = (2, 2) if ON_GPU else (1, 1)
    case = Case(batch, kv_heads, 3, length, length, 64, 64, is_causal=True)
    q, k, v, _, _ = case.tensors(torch.bfloat16 if ON_GPU else torch.float32, device)
    options = case.options(q, k, v, None, None)

    def run():
        out, lse, entropy, *_ = forward.forward(q, k, v, options, None if ON_GPU else TILES)
        d_out, d_entropy = torch.ones_like(out), torch.ones_like(entropy)
        arguments = (q, k, v, options, out, lse, entropy, d_out, None, d_entropy, tiles)
        return out, lse, entropy, *backward.backward(*arguments)[:3]

    first = run()
    differences = torch.zeros((), dtype=torch.int64, device=device)
    for _ in range(1000 if ON_GPU else 1):
        for a, b in zip(first, run(), strict=True):
            differences += (a != b).sum()
    assert differences.item() == 0


@pytest.mark.parametrize("shape", [(2, 0, 5), (2, 5, 0), (0, 5, 5)])
def test_zero_lengths_give_empty_results(shape, device):
    batch, num_queries, num_keys = shape
    case = Case(batch=batch, num_queries=num_queries, num_keys=num_keys)
    tensors = case.tensors(device=device)
    options = case.options(*tensors)
    got = forward.forward(*tensors[:3], options, TILES)
    out, rows = reference.attention(*tensors[:3], options)
    for actual, expected in zip(got, (out, rows.lse, rows.entropy, rows.max_logit, rows.min_logit)):
        assert torch.equal(actual, expected)
    arguments = (out, rows.lse, rows.entropy, out, None, None)
    gradients = backward.backward(*tensors[:3], options, *arguments, BACKWARD_TILES)
    assert all(g.shape == x.shape and not g.any() for g, x in zip(gradients, tensors[:3]))


@pytest.mark.parametrize("stride", ["inner", "expanded", "offset"])
def test_any_strides(stride, device):
    case = Case(head_dim=16)
    tensors = case.tensors(device=device)
    q, k, v = tensors[:3]
    if stride == "inner":
        k = k.transpose(2, 3).contiguous().transpose(2, 3)
    elif stride == "expanded":
        k = k[:1].expand(k.shape)
    else:
        k = torch.cat([k[..., :1], k], -1)[..., 1:]
    expected = forward.forward(
        q, k.clone(memory_format=torch.contiguous_format), v, case.options(*tensors), TILES
    )
    got = forward.forward(q, k, v, case.options(*tensors), TILES)
    assert all(torch.equal(a, b) for a, b in zip(got[:5], expected[:5]))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("is_causal", [False, True])
def test_error_is_at_most_twice_that_of_sdpa(head_dim, dtype, is_causal):
    """Against fp64, per the accuracy rule: 2x PyTorch's own kernel in the same dtype, plus one rounding."""
    for name, (ours, theirs) in errors_beside_sdpa(head_dim, dtype, is_causal).items():
        assert ours <= 2 * theirs + torch.finfo(dtype).eps / 2, name
