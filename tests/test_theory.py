"""The HNF curvature bound, against the formula in exact arithmetic."""

import math
from fractions import Fraction

import numpy as np
import pytest

from hnf_attention.theory import hnf_curvature_bound


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
