"""What a snapshot says about rounding: bounds that hold of every row, from the folded maxima alone."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from heads import checked, head_stats, queries_and_keys
from torch import nn

from hnf_attention import AttentionStabilityMonitor, attention_stats, theory
from hnf_attention.engine import fold
from hnf_attention.reference.fold import new_accumulator
from hnf_attention.statistics.heads import HeadStats

BENCH = Path(__file__).resolve().parents[1] / "bench"


@pytest.fixture
def rows(monkeypatch):
    if not (BENCH / "theory_rows.py").is_file():
        pytest.skip("the benchmarks are in the checkout only")
    monkeypatch.syspath_prepend(str(BENCH))
    import theory_rows

    yield theory_rows
    sys.modules.pop("theory_rows", None)


def read(query, key, sample=None, dtype=None, **options):
    """The snapshot of one call, (1, H, N, D) each."""
    stats = attention_stats(query, key, sample=sample, **options)
    accumulator = fold.new_accumulator(query.shape[1], torch.device("cpu"))
    fold.fold(accumulator, query, key, stats, checked(query, key, **options))
    text = str(dtype or query.dtype).removeprefix("torch.")
    return HeadStats(fold.collect([accumulator]).numpy(), query.shape[3], text, sample[0] if sample else 1)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize(
    "family", ["plain", "sink", "cancelling", "heavy tails", "one-signed V", "aligned signs"]
)
def test_no_output_of_a_head_is_further_off(rows, family, dtype):
    for seed in range(6):
        case = rows.make(family, seed, 8).rounded(rows.DTYPES[dtype])
        rounded, _ = rows.simulate(case, rows.DTYPES[dtype], "flash")
        error = (rounded - rows.exact(case)).abs().max() / case.v.abs().max()
        q, k = (x[None, None].float() for x in (case.q, case.k))
        for sample in (None, (2, 0)):
            stats = read(q, k, sample, rows.DTYPES[dtype])
            assert error <= stats.error_bound.item() < 2.1
            _, size = case.scores()
            assert size.max() <= stats.score_magnitude.item()


@pytest.mark.parametrize("family", ["plain", "sink", "ties", "low rank"])
def test_that_many_bits_of_q_and_k_are_enough(rows, family):
    for seed in range(8):
        case = rows.make(family, seed, 8)
        q, k = (x[None, None] for x in (case.q, case.k))
        bits = int(read(q, k).required_bits.item())
        stored = rows.Case(*(rows.to_bits(x, bits) for x in (case.q, case.k)), case.v)
        off = (rows.exact(stored) - rows.exact(case)).abs() / (case.v.amax(0) - case.v.amin(0))
        assert off.max() <= theory.TOLERANCE


def test_the_magnitude_is_that_of_the_longest_rows_of_each_head():
    query, key = queries_and_keys(heads=2, rows=70, batch=2)
    query[0, 1, 3], key[1, 0, 60] = 9.0, -7.0
    stats = read(query, key, scale=0.25)
    longest = 0.25 * query.norm(dim=3).amax((0, 2)) * key.norm(dim=3).amax((0, 2))
    np.testing.assert_allclose(stats.score_magnitude, longest.numpy(), rtol=1e-4)
    assert (stats.score_magnitude >= longest.numpy()).all()
    sampled = read(query, key, (2, 1), scale=0.25)
    np.testing.assert_array_equal(sampled.score_magnitude, stats.score_magnitude)


def test_a_collapsed_head_errs_less_and_a_sample_of_it_cannot_say_so():
    sharp = dict(max_weight=1.0, dtype="bfloat16", query_size=40.0, key_size=40.0, max_logit=1500.0)
    collapsed, spread = head_stats(**sharp), head_stats(**sharp | {"max_weight": 0.3})
    assert (collapsed.error_bound < spread.error_bound).all()
    assert (collapsed.required_bits < spread.required_bits).all()
    sampled = head_stats(**sharp, sample_period=4)
    assert (sampled.error_bound >= spread.error_bound).all()
    np.testing.assert_array_equal(sampled.required_bits, spread.required_bits)


def test_an_additive_mask_counts_with_the_scores():
    query, key = queries_and_keys(rows=20)
    mask = torch.zeros(20, 20)
    mask[:, ::2] = 500.0
    plain, biased = read(query, key), read(query, key, attn_mask=mask)
    np.testing.assert_array_equal(plain.score_magnitude, biased.score_magnitude)
    np.testing.assert_array_equal(plain.required_bits, biased.required_bits)
    assert (biased.error_bound > 1.01 * plain.error_bound).all()
    hidden = read(query, key, attn_mask=mask > 0)
    assert hidden.error_bound == pytest.approx(plain.error_bound, rel=0.1)
    # What is not seen of the scores is not seen of the mask.
    unseen = read(query, key, (2, 1), attn_mask=mask)
    assert (unseen.error_bound >= 2.0).all()


def test_a_weight_is_read_as_wrong_as_its_mask_makes_it():
    wrong = []
    for keys in range(2, 12):
        query, key = queries_and_keys(heads=1, rows=keys, scale=0.1)
        stats = read(query[:, :, :1], key, attn_mask=torch.full((1, keys), 1e4))
        scores = 8**-0.5 * (query[:, :, :1].double() @ key.double().transpose(2, 3))
        true = scores.softmax(-1).max().item()
        assert stats._least_weight.item() <= true
        wrong.append(-stats._max("neg_max_weight").item() - true)
    assert max(wrong) > 1e-4, "1e4 has an ulp of 1e-3"


@pytest.mark.parametrize("bend", [{"softcap": 5.0}, {"sinks": torch.zeros(2)}])
def test_what_the_theory_does_not_cover_is_not_known(bend):
    query, key = queries_and_keys(rows=20)
    bent = read(query, key, **bend)
    assert np.isnan(bent.error_bound).all()
    assert np.isfinite(bent.required_bits).all() and np.isfinite(bent.typical_bits).all()
    assert np.isnan(read(query.double(), key.double()).error_bound).all()


def test_unseen_queries_give_no_numbers():
    blank = HeadStats(new_accumulator(2, "cpu").numpy(), 8, "bfloat16")
    for name in ("score_magnitude", "error_bound", "required_bits", "typical_bits"):
        assert np.isnan(getattr(blank, name)).all(), name


def test_typical_bits_are_those_of_the_most_sensitive_weights_there_are():
    weights = [dict(max_weight=0.1), dict(max_weight=0.39), dict(max_weight=0.999)]
    low, worst, sharp = (head_stats(query_size=30.0, key_size=30.0, **w).typical_bits[0] for w in weights)
    assert low < worst and sharp < worst
    assert worst <= head_stats(query_size=30.0, key_size=30.0).required_bits[0]


class BothAttention(nn.Module):
    """A softmax of its own, whose queries and keys nobody sees, and a small call of SDPA beside it."""

    num_heads, head_dim = 2, 16

    def forward(self, big, small):
        weights = torch.softmax(big @ big.transpose(-1, -2), -1)
        return weights @ big + torch.nn.functional.scaled_dot_product_attention(small, small, small)


def test_no_bound_is_told_of_a_head_some_of_whose_queries_nobody_saw():
    big = 20 * torch.randn(1, 2, 32, 16, generator=torch.Generator().manual_seed(0))
    model = BothAttention()
    with AttentionStabilityMonitor(model, log_every=1) as monitor:
        model(big, big / 2000)
        (stats,) = monitor.on_step().stats.values()
    assert (stats.max_abs_logit > 1000).all()
    for name in ("score_magnitude", "error_bound", "required_bits", "typical_bits"):
        assert np.isnan(getattr(stats, name)).all(), name
