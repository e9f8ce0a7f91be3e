"""The fold from row statistics to head statistics, against numpy and by its own laws."""

import math

import numpy as np
import pytest
import torch
from heads import checked, queries_and_keys
from hypothesis import given, settings
from hypothesis import strategies as st

from hnf_attention import attention_stats
from hnf_attention.reference.fold import fold_rows, new_accumulator
from hnf_attention.reference.measured import Measured, measure
from hnf_attention.statistics.fields import (
    HISTOGRAM_BINS,
    JUDGED_MIN_KEYS,
    MAX_FIELDS,
    NUM_FOLDED,
    NUM_SUMS,
    SATURATED_ENTROPY,
    SUM_FIELDS,
)
from hnf_attention.statistics.heads import HeadStats, Snapshot
from hnf_attention.statistics.rows import RowStats


def folded(query, key, accumulator=None, **options):
    rows = attention_stats(query, key, **options)
    accumulator = new_accumulator(query.shape[1], "cpu") if accumulator is None else accumulator
    fold_rows(accumulator, rows, measure(query, key, rows, checked(query, key, **options)))
    return accumulator


def head_stats(accumulator):
    return HeadStats(accumulator.numpy(), 8, "float32")


def rows_of(entropy, max_logit=None, min_logit=None, lse=None):
    """Row statistics of one head and one batch element with these numbers."""
    entropy = torch.tensor(entropy)[None, None]
    default = torch.zeros_like(entropy)

    def row(x):
        return default if x is None else torch.tensor(x)[None, None]

    return RowStats(row(lse), entropy, row(max_logit), row(min_logit))


def fold_one(rows, visible):
    accumulator = new_accumulator(1, "cpu")
    zeros = torch.zeros_like(rows.entropy)
    fold_rows(accumulator, rows, Measured(torch.tensor(visible), zeros, zeros, zeros, zeros))
    return head_stats(accumulator)


def test_uniform_scores_have_ratio_one():
    query, key = torch.zeros(2, 3, 40, 8), torch.randn(2, 3, 40, 8)
    stats = head_stats(folded(query, key))
    np.testing.assert_allclose(stats.normalized_entropy, 1.0, rtol=1e-6)
    np.testing.assert_allclose(stats.entropy, math.log(40), rtol=1e-6)
    np.testing.assert_allclose(stats.max_weight, 1 / 40, rtol=1e-6)
    np.testing.assert_allclose(stats.jacobian_trace_bound, 1 - 1 / 1600, rtol=1e-6)
    np.testing.assert_allclose(stats.sink_mass, 1 / 40, rtol=1e-6)
    np.testing.assert_array_equal(stats.saturated_share, 0.0)
    np.testing.assert_array_equal(stats.judged_rows, 80.0)


def test_against_the_dense_definition():
    query, key = queries_and_keys(heads=3, rows=33, batch=2, scale=1.5)
    stats = head_stats(folded(query, key, is_causal=True))
    scores = (query.double() @ key.double().mT) * 8**-0.5
    seen = torch.ones(33, 33, dtype=torch.bool).tril()
    p = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    entropy = -torch.xlogy(p, p).sum(-1)
    count = torch.arange(1, 34).double()
    judged = count >= JUDGED_MIN_KEYS
    ratio = (entropy / count.log())[..., judged]
    largest = p.amax(-1)[..., judged]

    def mean(x):
        return x.mean((0, 2)).numpy()

    np.testing.assert_array_equal(stats.rows, 66)
    np.testing.assert_array_equal(stats.judged_rows, 2 * (33 - JUDGED_MIN_KEYS + 1))
    np.testing.assert_allclose(stats.entropy, mean(entropy), rtol=1e-5)
    np.testing.assert_allclose(stats.normalized_entropy, mean(ratio), rtol=1e-5)
    np.testing.assert_allclose(stats.normalized_entropy_min, ratio.amin((0, 2)).numpy(), rtol=1e-5)
    np.testing.assert_allclose(stats.max_weight, mean(largest), rtol=1e-5)
    np.testing.assert_allclose(stats.jacobian_trace_bound, mean(1 - largest**2), rtol=1e-5)
    np.testing.assert_allclose(stats.sink_mass, mean(p[..., 0][..., judged]), rtol=1e-5)
    visible = scores.masked_fill(~seen, -torch.inf)
    np.testing.assert_allclose(stats.max_logit, visible.amax((0, 2, 3)).numpy(), rtol=1e-5)
    low = scores.masked_fill(~seen, torch.inf)
    np.testing.assert_allclose(stats.min_logit, low.amin((0, 2, 3)).numpy(), rtol=1e-5)
    spread = (visible.amax(-1) - low.amin(-1)).double()
    np.testing.assert_allclose(stats.logit_range, mean(spread), rtol=1e-5)
    np.testing.assert_allclose(stats.logit_range_max, spread.amax((0, 2)).numpy(), rtol=1e-5)
    largest = [x.square().sum(3).amax((0, 2)).numpy() for x in (8**-0.5 * query, key)]
    np.testing.assert_allclose(
        stats.values[MAX_FIELDS.index("query_square") + NUM_SUMS], largest[0], rtol=1e-5
    )
    np.testing.assert_allclose(stats.values[MAX_FIELDS.index("key_square") + NUM_SUMS], largest[1], rtol=1e-5)
    least = p.amax(-1).amin((0, 2)).numpy()
    np.testing.assert_allclose(-stats.values[MAX_FIELDS.index("neg_max_weight") + NUM_SUMS], least, rtol=1e-5)
    for norm, x in ((stats.query_norm, query), (stats.key_norm, key)):
        np.testing.assert_allclose(norm, x.norm(dim=(2, 3)).square().mean(0).sqrt().numpy(), rtol=1e-5)


def test_short_rows_are_counted_but_not_judged():
    query, key = queries_and_keys(rows=JUDGED_MIN_KEYS - 1)
    stats = head_stats(folded(query, key))
    assert (stats.rows == JUDGED_MIN_KEYS - 1).all() and (stats.judged_rows == 0).all()
    for name in (
        "normalized_entropy",
        "normalized_entropy_p10",
        "normalized_entropy_min",
        "saturated_share",
        "max_weight",
    ):
        assert np.isnan(getattr(stats, name)).all(), name
    assert np.isfinite(stats.entropy).all() and np.isfinite(stats.max_logit).all()


def test_empty_and_nonfinite_rows():
    nan, inf = math.nan, math.inf
    rows = rows_of(
        entropy=[2.0, 0.0, nan, 1.0], max_logit=[3.0, -inf, nan, inf], min_logit=[-1.0, inf, nan, 0.0]
    )
    stats = fold_one(rows, [20, 0, 20, 20])
    assert stats.rows == 1 and stats.nonfinite_rows == 2
    assert stats.entropy == 2.0 and stats.max_logit == 3.0 and stats.min_logit == -1.0
    assert stats.max_abs_logit == 3.0


def test_nonfinite_queries_are_counted_in_their_head_only():
    query, key = queries_and_keys(heads=3, rows=20)
    query[0, 1, 4] = math.nan
    key[0, 2, 0, 0] = math.inf
    stats = head_stats(folded(query, key))
    np.testing.assert_array_equal(stats.nonfinite_rows, [0, 1, 20])
    np.testing.assert_array_equal(stats.rows, [20, 19, 0])
    assert np.isfinite(stats.normalized_entropy[:2]).all() and np.isnan(stats.normalized_entropy[2])
    rest = query[
        0, 1, torch.arange(20) != 4
    ]  # a row that holds NaN is left out of the norm, one with inf is not
    np.testing.assert_allclose(stats.query_norm[1], rest.norm().numpy(), rtol=1e-6)
    assert np.isfinite(stats.query_norm).all() and stats.key_norm[2] == np.inf


def test_nothing_folded_is_nan_everywhere():
    stats = head_stats(new_accumulator(2, "cpu"))
    assert (stats.rows == 0).all()
    for name in (
        "entropy",
        "normalized_entropy_p10",
        "max_logit",
        "min_logit",
        "max_abs_logit",
        "query_norm",
    ):
        assert np.isnan(getattr(stats, name)).all(), name


@pytest.mark.parametrize("shape", [(0, 2, 20, 8), (1, 2, 0, 8)])
def test_calls_without_rows_change_nothing(shape):
    accumulator = folded(torch.zeros(shape), torch.zeros(shape))
    assert torch.equal(accumulator, new_accumulator(2, "cpu"))


def test_saturated_rows():
    n = 64
    limit = SATURATED_ENTROPY * math.log(n)
    stats = fold_one(rows_of(entropy=[0.0, 0.99 * limit, 1.01 * limit, 1.0]), [n] * 4)
    assert stats.saturated_share == 0.5


@given(st.lists(st.floats(0, 1), min_size=1, max_size=200))
@settings(max_examples=60, deadline=None)
def test_percentile_is_within_a_bin_of_the_true_one(ratios):
    n = 1000
    rows = rows_of(entropy=[r * math.log(n) for r in ratios])
    stats = fold_one(rows, [n] * len(ratios))
    exact = np.sort(ratios)[max(0, math.ceil(0.1 * len(ratios)) - 1)]  # the value that 10 % reach
    assert abs(stats.normalized_entropy_p10[0] - exact) <= 1 / HISTOGRAM_BINS + 1e-6


def test_percentile_of_two_groups():
    ratios = [0.01] * 5 + [0.9] * 95
    stats = fold_one(rows_of(entropy=[r * math.log(100) for r in ratios]), [100] * 100)
    assert stats.normalized_entropy_p10[0] == pytest.approx(0.9, abs=1 / HISTOGRAM_BINS)
    ratios = [0.01] * 11 + [0.9] * 89
    stats = fold_one(rows_of(entropy=[r * math.log(100) for r in ratios]), [100] * 100)
    assert stats.normalized_entropy_p10[0] < 1 / HISTOGRAM_BINS


@given(st.lists(st.integers(0, 2**31), min_size=3, max_size=3, unique=True), st.integers(1, 40))
@settings(max_examples=25, deadline=None)
def test_merge_is_associative_commutative_and_the_same_as_one_fold(seeds, rows):
    calls = [queries_and_keys(rows=rows, seed=seed) for seed in seeds]
    a, b, c = (head_stats(folded(*call)) for call in calls)
    together = new_accumulator(2, "cpu")
    for call in calls:
        folded(*call, accumulator=together)
    left, right, swapped = a.merge(b).merge(c), a.merge(b.merge(c)), c.merge(a).merge(b)
    for merged in (left, right, swapped):
        np.testing.assert_allclose(merged.values, together.numpy(), rtol=1e-12)


def test_the_empty_fold_is_the_identity_of_merge():
    stats = head_stats(folded(*queries_and_keys()))
    empty = head_stats(new_accumulator(2, "cpu"))
    np.testing.assert_array_equal(stats.merge(empty).values, stats.values)
    np.testing.assert_array_equal(empty.merge(stats).values, stats.values)


def test_merge_refuses_other_head_counts():
    one, two = (head_stats(new_accumulator(h, "cpu")) for h in (1, 2))
    with pytest.raises(ValueError, match=rf"\({NUM_FOLDED}, 1\), got \({NUM_FOLDED}, 2\)"):
        one.merge(two)


def test_sums_come_first_in_the_accumulator():
    accumulator = new_accumulator(3, "cpu")
    assert accumulator.shape == (NUM_FOLDED, 3) and accumulator.dtype == torch.float64
    assert (accumulator[: len(SUM_FIELDS) + HISTOGRAM_BINS] == 0).all()
    assert (accumulator[len(SUM_FIELDS) + HISTOGRAM_BINS :] == -torch.inf).all()


def test_standard_errors_are_the_spread_of_the_means():
    """500 heads draw 10 of 160 blocks of rows, alike within a block; some rows are not judged."""
    generator = torch.Generator().manual_seed(0)
    block = torch.rand(500, 160, 1, generator=generator)
    ratio = 0.2 + 0.5 * block + 0.1 * torch.rand(500, 160, 64, generator=generator)
    visible = torch.full((1, 500, 640), 100)
    visible[:, :, :40] = JUDGED_MIN_KEYS - 1
    entropy = ratio[:, :10].reshape(1, 500, 640) * math.log(100)
    rows = RowStats(torch.zeros_like(entropy), entropy, torch.zeros_like(entropy), torch.zeros_like(entropy))
    accumulator = new_accumulator(500, "cpu")
    zeros = torch.zeros_like(entropy)
    fold_rows(accumulator, rows, Measured(visible, zeros, zeros, zeros, zeros))
    stats = HeadStats(accumulator.numpy(), 8, "float32", sample_period=16)
    off = stats.normalized_entropy - ratio.mean((1, 2)).numpy()
    assert np.sqrt((off**2).mean() / (stats.normalized_entropy_stderr**2).mean()) == pytest.approx(
        1.0, abs=0.08
    )
    assert not stats.max_weight_stderr.any(), "the same in every block"
    whole = HeadStats(accumulator.numpy(), 8, "float32")
    assert not whole.normalized_entropy_stderr.any()


def test_printed_statistics_are_sizes_and_ranges():
    query, key = queries_and_keys(heads=4, rows=40, head_dim=8, batch=2)
    rows = attention_stats(query.requires_grad_(), key)
    low, high = (f"{x.item():.4g}" for x in (rows.entropy.min(), rows.entropy.max()))
    assert repr(rows).startswith("RowStats of (2, 4, 40) rows, float32 on cpu: lse, ")
    assert f"entropy {low} to {high}, max_logit " in repr(rows) and len(repr(rows)) < 160
    elsewhere = RowStats(*[torch.empty(2, 4, 40, device="meta")] * 4)  # as on a card: nothing is read
    names = "lse, entropy, max_logit, min_logit"
    assert repr(elsewhere) == f"RowStats of (2, 4, 40) rows, float32 on meta: {names}"
    stats = head_stats(folded(query.detach(), key))
    assert repr(stats).startswith(
        "HeadStats of 4 heads of dimension 8, float32: rows 80, normalized_entropy 0."
    )
    assert len(repr(stats)) < 160
    assert "normalized_entropy not finite" in repr(head_stats(new_accumulator(2, "cpu")))
    layers = {f"model.layers.{i}.self_attn": stats for i in range(400)}
    names = "model.layers.0.self_attn, ..., model.layers.399.self_attn"
    assert (
        repr(Snapshot(7, layers))
        == f"Snapshot at step 7: 1600 heads in 400 layers ({names}), training forwards"
    )
