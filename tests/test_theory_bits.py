"""Required bits and overflow paths: closed forms, limits, monotony."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hnf_attention import theory
from hnf_attention.theory.bits import STORED


def test_is_the_closed_form():
    assert theory.required_bits("scores", 100.0, 1e-3) == math.ceil(math.log2(100.0 / (2 * math.atanh(1e-3))))
    unit = math.sqrt(1 + 2 * math.atanh(1e-3) / 100.0) - 1
    assert theory.required_bits("query_key", 100.0, 1e-3) == math.ceil(-math.log2(unit))
    assert theory.required_bits("weights", 1.0, 2.0**-7) == 7
    assert theory.required_bits("weights", 4.0, 2.0**-7) == 9  # values 4 spreads away from zero


@given(st.sampled_from(STORED), st.floats(0.0, 1e300), st.floats(1e-12, 2.0))
def test_finite_and_monotone(stored, size, tolerance):
    bits = theory.required_bits(stored, size, tolerance)
    assert 1 <= bits < 1100
    assert bits <= theory.required_bits(stored, 2 * size, tolerance)
    assert bits >= theory.required_bits(stored, size, min(2 * tolerance, 2.0))


@given(st.sampled_from(STORED), st.floats(0.0, 1e300), st.floats(1e-12, 2.0), st.floats(0.0, 1.0))
def test_a_known_weight_only_helps(stored, size, tolerance, weight):
    free = theory.required_bits(stored, size, tolerance)
    known = theory.required_bits(stored, size, tolerance, max_weight=weight)
    assert 1 <= theory.required_bits(stored, size, tolerance, max_weight=1.0) <= known <= free
    assert theory.required_bits(stored, size, tolerance, max_weight=math.nan) == free


@given(st.lists(st.floats(-30.0, 5.0), min_size=1, max_size=7), st.floats(1e-6, 0.9))
def test_no_signs_of_the_allowed_moves_move_the_weights_further(scores, eps):
    s = np.array([0.0, *scores])
    p = np.exp(s) / np.exp(s).sum()
    rest = np.sort(p)[:-1].sum()
    move = theory.bits._allowed_move(np.float64(eps), rest)
    assert move >= 2 * math.atanh(eps) * (1 - 1e-12)
    assert theory.bits._gain(move, rest) == pytest.approx(eps, rel=1e-6)
    signs = np.array(list(itertools.product((-1.0, 1.0), repeat=len(s))))  # all corners, where the maximum is
    moved = p * np.exp(signs * np.minimum(move, 300.0))
    moved = moved / moved.sum(-1, keepdims=True)
    assert np.abs(moved - p).sum(-1).max() / 2 <= eps * (1 + 1e-9)


@pytest.mark.parametrize("bits", [8, 12, 20])
@pytest.mark.parametrize("eps", [1e-2, 1e-3])
def test_rows_of_the_worst_roundings_need_every_bit(bits, eps):
    """q = (up, down), k = +-(up, -down): scores of next to nothing, moved the same way by all four roundings."""
    unit = 2.0**-bits
    up, down = 1 + unit * (1 + 2.0**-25), 1 + unit * (1 - 2.0**-25)  # rounded to 1 + 2 unit and to 1
    scale = 1.02 * math.atanh(eps) / unit / (up**2 + down**2)
    exact, stored = scale * (up**2 - down**2), scale * ((1 + 2 * unit) ** 2 - 1)
    moved = 1 / (1 + math.exp(-2 * stored)) - 1 / (1 + math.exp(-2 * exact))  # v = (1, 0)
    claimed = theory.required_bits("query_key", scale * (up**2 + down**2), eps, max_weight=0.5)
    assert moved > eps and claimed == bits + 1


def test_sharp_rows_can_do_with_less():
    free = theory.required_bits("query_key", 1e3, 1e-2)
    sharp = [theory.required_bits("query_key", 1e3, 1e-2, max_weight=p) for p in (0.5, 0.9, 0.999, 1 - 1e-9)]
    assert free == sharp[0] == 17 and sharp[1:] == [16, 11, 8]
    # A p_max of 1 is one up to rounding: scores that move by thousands can still turn the row over.
    assert theory.required_bits("query_key", 1e6, 1e-2, max_weight=1.0) > 15
    assert theory.required_bits("weights", 4.0, 2.0**-7, max_weight=0.76) == 7


def test_grows_with_the_logarithm_of_the_scores_where_the_seeds_formula_explodes():
    seed = 2 * math.log2(math.e) * 1e4 + math.log2(1024**2 / 1e-6)
    assert seed > 28_000
    assert theory.required_bits("scores", 1e4, 1e-2) == 19


def test_the_row_needs_no_more_than_its_largest_numbers_say():
    rng = np.random.default_rng(0)
    s, v = rng.normal(size=(50, 20)) * np.logspace(-2, 3, 50)[:, None], rng.normal(size=(20, 3))
    for eps in (0.1, 1e-3):
        row = theory.required_bits_of_row("scores", s, np.abs(s), v, eps)
        p_max = 1 / np.exp(s - s.max(-1, keepdims=True)).sum(-1)
        few = theory.required_bits("scores", np.abs(s).max(-1), eps, max_weight=p_max)
        assert row.shape == (50,) and (row <= few).all()
        typical = theory.required_bits_of_row("scores", s, np.abs(s), v, eps, typical=True)
        assert (typical <= row).mean() > 0.9


def test_rows_that_cannot_err_need_one_bit():
    v = np.array([[1.0, -1.0]])
    assert theory.required_bits_of_row("query_key", [[1e30]], [[1e30]], v, 1e-6) == 1  # one key
    equal = np.full((3, 2), 5.0)
    assert theory.required_bits_of_row("scores", [[1.0, 2.0, 1e30]], [[1.0, 2.0, 1e30]], equal, 1e-6) == 1
    hidden = theory.required_bits_of_row("scores", [[3.0, -np.inf]], [[3.0, 0.0]], np.eye(2), 1e-6)
    assert hidden == 1


def test_typical_bits_follow_the_spread():
    flat, sharp = np.full(1024, 1 / 1024), np.array([0.5, 0.5] + [0.0] * 1022)
    few, many = (
        theory.typical_bits("scores", 10.0, theory.rounding_spread("scores", p), 1e-3) for p in (flat, sharp)
    )
    assert few < many
    assert theory.rounding_spread("scores", [1.0, 0.0]) == 0.0  # one-hot: nothing to first order
    assert theory.typical_bits("scores", 0.0, 0.1, 1e-3) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("logits", 1.0, 0.1), "stored in .* got 'logits'"),
        (("scores", -1.0, 0.1), "size >= 0, got -1"),
        (("scores", 1.0, 0.0), "tolerance > 0, got 0"),
    ],
)
def test_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        theory.required_bits(*arguments)


def paths(*arguments, **options):
    return {path.name: path for path in theory.overflow_paths(*arguments, **options)}


def test_names_the_path_of_a_logit_of_89():
    found = paths("bf16", 89.3, 0.125, 1024)
    naive = found["exp(score) in bfloat16"]
    assert naive.overflows and naive.limit == pytest.approx(88.72, abs=0.01)
    assert "does not subtract the maximum" in naive.where
    assert not found["q.k in bfloat16 before scaling"].overflows


def test_each_limit_is_where_torch_overflows():
    half = torch.float16
    limit = paths("fp16", 1.0, 0.125, 8)["exp(score) in float16"].limit
    assert limit == pytest.approx(11.09, abs=0.01)
    assert (
        torch.tensor(limit - 0.01).to(half).exp().isfinite()
        and torch.tensor(limit + 0.01).to(half).exp().isinf()
    )
    added = paths("fp16", 1.0, 0.125, 8)["score + finfo.min in float16"].limit
    lowest = torch.tensor(torch.finfo(half).min, dtype=half)
    assert added == 16.0
    assert (lowest + torch.tensor(-15.9, dtype=half)).isfinite() and (
        lowest + torch.tensor(-16.0, dtype=half)
    ).isinf()
    product = paths("fp16", 65504.0 / 8 + 1, 0.125, 8)["q.k in float16 before scaling"]
    assert product.overflows and product.headroom < 0
    assert paths("fp16", 1.0, 0.125, 70_000)["sum of 70000 exponentials in float16"].overflows


def test_worst_path_first_and_a_score_of_nothing_is_safe():
    found = theory.overflow_paths("fp16", 50.0, 0.125, 1024)
    assert [p.headroom for p in found] == sorted(p.headroom for p in found)
    assert not any(p.overflows for p in theory.overflow_paths("fp16", 0.0, 0.125, 1))
    with pytest.raises(ValueError, match="scale > 0 and keys >= 1"):
        theory.overflow_paths("fp16", 1.0, 0.0, 4)
