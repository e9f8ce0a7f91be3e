"""The Hopper forward and the library backward, on a card: against fp64, over everything they cover."""

import pytest
import torch
from cases import Case, oracle

from hnf_attention import attention
from hnf_attention.engine import engines, library
from hnf_attention.engine.call import BackwardInputs, Call
from hnf_attention.engine.card import card_of
from hnf_attention.reference import attention as reference

pytest.importorskip("triton", reason="Triton kernels need Linux")
from hnf_attention.kernels.portable import probe

pytestmark = pytest.mark.gpu
BACKWARDS = engines.output_backward(library.Choice())
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2}  # as in test_kernels.py

SHAPES = {
    "tiles fit": Case(2, 2, 1, 256, 256, 64, 64),
    "ragged": Case(1, 3, 1, 333, 457, 128, 128, transposed=True),
    "few keys": Case(2, 1, 2, 100, 5, 64, 64),
    "one key": Case(2, 1, 1, 65, 1, 128, 128),
    "more queries than keys": Case(1, 2, 2, 700, 190, 64, 64),
    "more keys than queries": Case(1, 2, 4, 190, 700, 128, 128, transposed=True),
    "narrow": Case(2, 2, 2, 130, 300, 16, 24),
    "padded": Case(1, 2, 1, 260, 260, 80, 96, transposed=True),
    "value wider": Case(1, 2, 2, 200, 260, 64, 128),
    "value narrower": Case(1, 2, 2, 200, 260, 128, 64),
    "many blocks": Case(3, 5, 2, 1500, 1500, 64, 64),
    "large scores": Case(1, 2, 1, 300, 300, 64, 64, spread=200.0),
    "explicit scale": Case(1, 2, 1, 300, 300, 128, 128, scale=1.7),
}


def agree(host, case, tensors):
    dtype = tensors[0].dtype
    got = host.forward(*tensors[:3], case.options(*tensors))[:5]
    for name, actual, wanted in zip(
        ("out", "lse", "entropy", "max_logit", "min_logit"), got, oracle(case, *tensors)
    ):
        size = wanted.abs().amax().clamp(min=1.0)
        allowed = TOLERANCE[dtype] if name == "out" else 1e-5
        # Entropy's error is absolute, and a rounding of |score| = 7e3 in the exponent costs it 1e-5 (fp32
        # inputs are subtracted before they are scaled; half-precision ones are not).
        allowed = 2e-5 if name == "entropy" else allowed * size
        difference = (actual.double() - wanted).abs().max()
        assert difference <= allowed, f"{name}: off by {difference:.2e}, allowed {allowed:.2e}"


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", SHAPES.values(), ids=SHAPES.keys())
def test_forward_matches_the_oracle(host, case, dtype, is_causal):
    case = Case(**{**case.__dict__, "is_causal": is_causal})
    tensors = case.tensors(dtype, "cuda")
    options = case.options(*tensors)
    assert engines.choose(engines.FORWARD, Call(*tensors[:3], options)).name == engines.HOPPER
    agree(host, case, tensors)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("rise", [3.0, 60.0, -60.0])
def test_scores_that_rise_from_tile_to_tile(host, rise, head_dim):
    """By so much in log2 units, as the keys are walked, up to 0 or down from it. A warp skips its rescaling where
    no row's maximum rises."""
    case = Case(1, 2, 2, 300, 1280, head_dim, head_dim, scale=0.6931471805599453)
    q, k, v, mask, sinks = case.tensors(torch.bfloat16, "cuda")
    q[..., 0] = torch.arange(300, device="cuda") // 16 % 2  # every second warp's rows rise
    q[..., 5::7, 0] = 1.0  # and single rows of the others
    tiles = torch.arange(1280, device="cuda") // 128  # the last is walked first
    k[..., 0] = -rise * tiles if rise > 0 else rise * (9 - tiles)
    q[..., 1:] *= 0.2
    agree(host, case, (q, k, v, mask, sinks))


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("signs", ["negative", "positive", "by row", "by tile", "by tile, rising"])
def test_scores_of_one_sign(host, signs, is_causal):
    """The largest scores of warps whose rows have had none that is not negative are found in another way."""
    case = Case(1, 2, 2, 700, 900, 64, 64, is_causal=is_causal, spread=0.5)
    q, k, v, mask, sinks = case.tensors(torch.bfloat16, "cuda")
    q, k = q.abs(), k.abs()
    rows, tiles = torch.arange(700, device="cuda"), torch.arange(900, device="cuda") // 128
    if signs == "negative":
        k = -k
    elif signs == "by row":
        q = torch.where((rows % 5 > 0)[:, None], q, -q)
    elif signs != "positive":  # the last tile is walked first
        k = torch.where((tiles % 3 == (0 if "rising" in signs else 1))[:, None], k, -k)
    agree(host, case, (q, k, v, mask, sinks))


def test_output_rows_that_are_no_multiple_of_16_bytes_take_another_path(host):
    case = Case(1, 2, 1, 200, 200, 64, 20)
    q, k, v, *_ = case.tensors(torch.bfloat16, "cuda")
    call = Call(q, k, v, case.options(q, k, v, None, None))
    assert engines.choose(engines.FORWARD, call).name == engines.TRITON
    out = attention(q, k, v)[0]
    wanted = attention(q.double(), k.double(), v.double())[0]
    assert (out.double() - wanted).abs().max() <= TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["query", "key"])
def test_rows_that_non_finite_input_reached_are_nan_and_no_others(host, number, where):
    case = Case(2, 2, 2, 300, 300, 64, 64, is_causal=True)
    q, k, v, *_ = case.tensors(torch.bfloat16, "cuda")
    broken = torch.zeros(q.shape[:3], dtype=torch.bool, device="cuda")
    if where == "query":
        q[0, 1, 140, 2] = number
        broken[0, 1, 140] = True
    else:
        k[1, 0, 200, 3] = number
        broken[1, :2, 200:] = True
    got = host.forward(q, k, v, case.options(q, k, v, None, None))[:5]
    for row_stat in got[1:]:
        assert torch.equal(row_stat.isnan(), broken)


def test_a_row_of_a_million_keys(host):
    """A rounding error of every tile would add up: the shift must not move where the maximum stays."""
    case = Case(1, 1, 1, 130, 1 << 20, 64, 64)
    q, k, v, *_ = case.tensors(torch.bfloat16, "cuda")
    options = case.options(q, k, v, None, None)
    _, *fused, _ = host.forward(q, k, v, options)
    *probed, _, _ = probe.probe(q, k, options)
    scores = q[0, 0].double() @ k[0, 0].double().T * options.scale
    log_weights = scores.log_softmax(-1)
    wanted = (
        scores.logsumexp(-1),
        -(log_weights.exp() * log_weights).sum(-1),
        scores.amax(-1),
        scores.amin(-1),
    )
    for rows in (fused, probed):
        for actual, true in zip(rows, wanted):
            assert (actual[0, 0].double() - true).abs().max() <= 2e-5 * true.abs().max()


def test_forward_writes_the_same_bits_a_thousand_times(host):
    case = Case(2, 4, 2, 1100, 1100, 128, 128, is_causal=True)
    tensors = case.tensors(torch.bfloat16, "cuda")
    options = case.options(*tensors)
    first = host.forward(*tensors[:3], options)[:5]
    differences = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(1000):
        for a, b in zip(first, host.forward(*tensors[:3], options)[:5]):
            differences += (a != b).sum()
    assert differences.item() == 0


@pytest.mark.parametrize("engine", BACKWARDS[:2], ids=["cudnn", "flash"])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_library_backward_takes_our_output_and_lse(engine, is_causal, head_dim):
    case = Case(2, 3, 1, 333, 333, head_dim, head_dim, is_causal=is_causal, transposed=True)
    q, k, v, *_ = case.tensors(torch.bfloat16, "cuda")
    call = Call(q, k, v, case.options(q, k, v, None, None))
    reason = engine.supports(call, card_of(q.device))
    if reason is not None:
        pytest.skip(reason)
    out, rows = attention(q, k, v, is_causal=is_causal)
    d_out = torch.randn_like(out)
    got = engine.run(call, BackwardInputs(out, rows.lse, rows.entropy, d_out, None, None), False)
    exact = [x.double() for x in (q, k, v)]
    out64, rows64 = reference.attention(*exact, case.options(*exact, None, None))
    wanted = reference.backward(
        *exact,
        case.options(*exact, None, None),
        out64,
        rows64.lse,
        rows64.entropy,
        d_out.double(),
        None,
        None,
    )
    for name, actual, true in zip(("dq", "dk", "dv"), got, wanted):
        error = (actual.double() - true).norm() / true.norm()
        assert error < 6e-3, f"{name}: relative error {error:.1e}"
