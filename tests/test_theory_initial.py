"""Scores before training: against samples, in the limits, and monotone."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hnf_attention import theory


def sampled_scores(rows, n, d_model=256, head_dim=32, std=0.02, scale=None, rho=0.0, seed=0):
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=g, dtype=torch.float64)

    x = rho**0.5 * draw(1, d_model) + (1 - rho) ** 0.5 * draw(n, d_model)
    y = rho**0.5 * draw(1, d_model) + (1 - rho) ** 0.5 * draw(rows, d_model)
    q, k = (z @ (std * draw(d_model, head_dim)) for z in (y, x))
    return (head_dim**-0.5 if scale is None else scale) * q @ k.T


@pytest.mark.parametrize("options", [{}, {"head_dim": 8}, {"scale": 1.0}, {"rho": 0.4}])
def test_score_std_is_that_of_random_weights(options):
    rho = options.pop("rho", 0.0)
    spreads = [
        sampled_scores(100, 200, seed=s, rho=rho, std=0.05, **options).std(-1).square().mean()
        for s in range(30)
    ]
    measured = torch.stack(spreads).mean().sqrt()
    head_dim, scale = options.get("head_dim", 32), options.get("scale")
    predicted = theory.score_std(256, head_dim, 0.05, 0.05, scale=scale, correlation=rho)
    assert float(measured) == pytest.approx(float(predicted), rel=0.08)


def test_the_head_dimension_drops_out_at_the_usual_scale_only():
    usual = [theory.score_std(768, d, 0.02, 0.02) for d in (2, 64, 128)]
    np.testing.assert_allclose(usual, 768 * 0.02**2)
    assert theory.score_std(768, 64, 0.02, 0.02, scale=1.0) == pytest.approx(8 * 768 * 0.02**2)


@pytest.mark.parametrize("n", [2, 3, 4, 10, 100, 1000, 16_000])
def test_expected_maximum_is_within_two_percent(n):
    g = torch.Generator().manual_seed(0)
    tops = torch.cat([torch.randn(max(1, 10**6 // n), n, generator=g).amax(-1) for _ in range(5)])
    assert float(theory.expected_max_logit(1.0, n)) == pytest.approx(float(tops.mean()), rel=0.02)


def test_limits_of_the_expected_maximum():
    assert theory.expected_max_logit(3.0, 1) == 0.0
    values = theory.expected_max_logit(1.0, [1, 2, 3, 4, 5, 10, 1e3, 1e6, 1e12, 1e100, 1e300])
    assert np.isfinite(values).all() and (np.diff(values) > 0).all()
    # GPT-2's row maximum at initialisation: about 1 nat.
    assert float(theory.expected_max_logit(theory.score_std(768, 64, 0.02, 0.02), 1024)) == pytest.approx(
        0.99, abs=0.02
    )


@pytest.mark.parametrize("n", [4, 100, 1024])
@pytest.mark.parametrize("share", [0.2, 0.5, 1.0, 3.0])
def test_expected_entropy_is_that_of_samples(n, share):
    std = share * float(theory.critical_std(n))
    s = std * torch.randn(400_000 // n, n, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    p = s.softmax(-1)
    entropy = -torch.special.xlogy(p, p).sum(-1)
    error = 4 * float(entropy.std()) / len(entropy) ** 0.5 + 2e-3
    assert float(theory.expected_entropy(std, n)) == pytest.approx(float(entropy.mean()), abs=error)


def test_the_law_is_within_three_hundredths_up_to_half_the_critical_spread():
    for n in (256, 1024, 16_384):
        std = np.linspace(0.0, 0.5, 6) * theory.critical_std(n)
        np.testing.assert_allclose(
            theory.entropy_law(std, n), theory.expected_entropy(std, n) / np.log(n), atol=0.03, rtol=0
        )


def test_limits_of_the_entropy():
    assert theory.expected_entropy(0.0, 100) == pytest.approx(np.log(100))  # T -> infinity
    assert theory.expected_entropy(5.0, 1) == 0.0
    assert theory.expected_entropy(1e30, 1000) == pytest.approx(0.0, abs=1e-20)  # one-hot
    assert theory.entropy_law(1e30, 1000) == 0.0 and theory.entropy_law(7.0, 1) == 1.0
    # Where quadrature hands over to the law of the two largest scores.
    below, above = theory.expected_entropy([39.9, 40.1], 1024)
    assert above == pytest.approx(below, rel=0.02)


@settings(max_examples=15, deadline=None)
@given(st.floats(0.0, 1e30), st.integers(2, 10**6))
def test_entropy_falls_with_the_spread(std, n):
    a, b = theory.expected_entropy([std, 1.3 * std + 0.1], n)
    assert 0.0 <= b <= a + 2e-3 and a <= np.log(n)


def test_the_critical_temperature_is_where_the_spread_is_critical():
    options = dict(d_model=1280, head_dim=64, query_std=0.02, key_std=0.02)
    t = theory.critical_temperature(**options, keys=1024)
    assert theory.score_std(**options, scale=1 / t) == pytest.approx(float(theory.critical_std(1024)))
    # Monotone: longer rows stand a larger spread, larger weights and correlation-free tokens need more.
    assert theory.critical_temperature(**options, keys=4096) < t
    assert theory.critical_temperature(**{**options, "query_std": 0.04}, keys=1024) == pytest.approx(2 * t)
    assert theory.critical_temperature(**options, keys=1024, correlation=0.5) == pytest.approx(t / 2**0.5)
    assert theory.critical_temperature(**options, keys=1) == 0.0
    assert theory.critical_std(1) == np.inf


@pytest.mark.parametrize("head_dim", [1, 2, 4, 16, 64, 256])
def test_row_spread_is_the_quantile_of_the_norms(head_dim):
    norms = (
        torch.randn(100_000, head_dim, generator=torch.Generator().manual_seed(0)).square().mean(-1).sqrt()
    )
    assert float(theory.row_spread(head_dim)) == pytest.approx(float(np.quantile(norms, 0.99)), rel=0.015)


def test_refuses():
    with pytest.raises(ValueError, match="at least 1 visible key, got 0"):
        theory.critical_std(0)
    with pytest.raises(ValueError, match="std >= 0, got -1"):
        theory.expected_entropy(-1.0, 4)
