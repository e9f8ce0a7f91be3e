"""The HNF curvature bound, against the formula in exact arithmetic."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from hnf_attention.theory import hnf_curvature, hnf_curvature_bound


def test_is_the_formula_where_the_formula_fits_a_float():
    query, key, d, largest = 3.0, 5.0, 16, 2.5
    kappa = query * key / d * math.exp(2 * largest)
    assert hnf_curvature_bound(query, key, d, largest) == pytest.approx(math.log2(kappa), rel=1e-14)


def test_a_score_of_nothing_leaves_the_norms():
    exact = Fraction(2**20) * 2**10 / 64
    assert hnf_curvature_bound(2.0**20, 2.0**10, 64, 0.0) == math.log2(exact)


def test_does_not_overflow_where_the_exponential_does():
    value = hnf_curvature_bound(1e3, 1e3, 64, 1e6)
    assert np.isfinite(value)
    assert value == pytest.approx(2e6 / math.log(2), rel=1e-5)


def test_broadcasts_in_double_precision():
    query = np.array([1.0, 2.0, 4.0], dtype=np.float32)
    value = hnf_curvature_bound(query, np.float32(8.0), 8, np.zeros((2, 1)))
    assert value.shape == (2, 3) and value.dtype == np.float64
    np.testing.assert_array_equal(value[0], [0.0, 1.0, 2.0])


def test_zero_norm_and_nan():
    np.testing.assert_array_equal(hnf_curvature_bound([0.0, np.nan], 1.0, 4, 1.0), [-np.inf, np.nan])


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((1.0, 1.0, 0, 1.0), "head_dim"),
        ((1.0, 1.0, 2.5, 1.0), "head_dim"),
        ((1.0, 1.0, True, 1.0), "head_dim"),
        ((-1.0, 1.0, 4, 1.0), "query_norm"),
        ((1.0, -1.0, 4, 1.0), "key_norm"),
        ((1.0, 1.0, 4, [0.0, -3.0]), r"max_abs_logit >= 0, got -3"),
    ],
)
def test_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        hnf_curvature_bound(*arguments)


def second_derivative_norm(q, k, seeds=30):
    """Largest |D2 f[h, h]| / |h|^2 over random directions, f = softmax(QK^T / sqrt d), by central differences."""
    g = torch.Generator().manual_seed(0)
    best = 0.0
    for _ in range(seeds):
        hq, hk = (torch.randn(x.shape, generator=g, dtype=torch.float64) for x in (q, k))
        norm = (hq.square().sum() + hk.square().sum()).sqrt()
        hq, hk, e = hq / norm, hk / norm, 1e-3

        def f(t, hq=hq, hk=hk):
            return ((q + t * hq) @ (k + t * hk).T / q.shape[1] ** 0.5).softmax(-1)

        best = max(best, float(((f(e) - 2 * f(0.0) + f(-e)) / e**2).norm()))
    return best


@pytest.mark.parametrize("scale", [0.1, 1.0, 5.0])
def test_curvature_bounds_half_the_second_derivative(scale):
    g = torch.Generator().manual_seed(1)
    q, k = (scale * torch.randn(3, 4, generator=g, dtype=torch.float64) for _ in range(2))
    norms = [float(torch.linalg.matrix_norm(x, 2)) for x in (q, k)]
    bound = hnf_curvature(*norms, 4)
    assert second_derivative_norm(q, k) / 2 <= bound
    assert bound == pytest.approx((norms[0] ** 2 + norms[1] ** 2) / 4 / (2 * 2**0.5) + 1 / 8)
    assert hnf_curvature(*norms, 4, scale=0.5) == bound


def test_curvature_is_quadratic_where_the_seeds_bound_is_exponential():
    small, large = hnf_curvature(1.0, 1.0, 64), hnf_curvature(1e15, 1e15, 64)
    assert np.isfinite(large) and large < 1.1e30 * small
