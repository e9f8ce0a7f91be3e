"""`sample=` of instrument, analyzer and monitor: what is measured, how it rotates, and what is said of it."""

import numpy as np
import pytest
import torch
from attention_models import Model
from heads import head_stats, snapshot
from torch import nn

from hnf_attention import AttentionAnalyzer, AttentionStabilityMonitor, attention_stats, instrument
from hnf_attention.diagnosis import diagnose

TOKENS = 200  # four blocks of rows


class OneLayer(nn.Module):
    """Causal attention of what comes in, straight."""

    def forward(self, x):
        q = x.unflatten(-1, (2, 16)).transpose(1, 2)
        return nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)


@pytest.fixture
def x():
    return torch.randn(3, TOKENS, 32, generator=torch.Generator().manual_seed(0))


def test_calls_rotate_until_every_row_was_measured_once(x):
    model = OneLayer()
    q = x.unflatten(-1, (2, 16)).transpose(1, 2)
    expected = attention_stats(q, q, is_causal=True).entropy
    seen = torch.full_like(expected, torch.nan)
    plain = model(x)
    with instrument(model, sample=4) as instrumentation:
        for _ in range(4):
            assert torch.equal(model(x), plain)
            measurement = instrumentation.latest[""]
            index, rows = measurement.rows.row_index, measurement.rows
            assert measurement.sample_period == 4 and index.shape == (3, 2, 64)
            b, h, place = (index >= 0).nonzero(as_tuple=True)
            m = index[b, h, place]
            assert seen[b, h, m].isnan().all()
            seen[b, h, m] = rows.entropy[b, h, place]
            assert torch.equal(measurement.visible_keys[b, h, place], m + 1)
        assert "probe of 1/4 of the rows" in str(instrumentation.coverage)
    torch.testing.assert_close(seen, expected)


def test_a_short_sequence_is_measured_whole(x):
    model = OneLayer()
    with instrument(model, sample=16) as instrumentation:
        model(x[:, :60])
    measurement = instrumentation.latest[""]
    assert measurement.sample_period == 1 and measurement.rows.row_index is None


def test_fused_calls_keep_all_rows(x):
    model = OneLayer()
    with instrument(model, mode="fused", sample=4) as instrumentation:
        model(x)
    measurement = instrumentation.latest[""]
    assert measurement.sample_period == 1 and measurement.rows.lse.shape == (3, 2, TOKENS)


@pytest.mark.parametrize("sample", [0, -1, 2.0, True, "16"])
def test_bad_samples(sample):
    with pytest.raises(ValueError, match="sample to be None or an int >= 1"):
        instrument(Model(), sample=sample)


def test_head_statistics_know_their_sample(x):
    model = OneLayer()
    with AttentionAnalyzer(model) as whole:
        model(x)
        (every,) = whole.mark().layers.values()
    with AttentionAnalyzer(model, sample=4) as analyzer:
        model(x)
        (some,) = analyzer.mark().layers.values()
        for _ in range(4):
            model(x)
        (four,) = analyzer.mark().layers.values()
    assert some.sampled and some.sample_period == 4 and not every.sampled
    assert (some.rows < every.rows).all() and (some.max_logit <= every.max_logit).all()
    np.testing.assert_array_equal(four.rows, every.rows)
    np.testing.assert_allclose(four.normalized_entropy, every.normalized_entropy, rtol=1e-6)
    np.testing.assert_allclose(four.max_logit, every.max_logit, rtol=1e-6)
    assert some.merge(every).sampled


def test_a_single_block_has_no_standard_error(x):
    model = OneLayer()
    with AttentionAnalyzer(model, sample=4) as analyzer:
        model(x[:1])
        (stats,) = analyzer.mark().layers.values()
    assert np.isnan(stats.normalized_entropy_stderr).all() and not np.isnan(stats.normalized_entropy).all()


def test_the_monitor_passes_it_on(x):
    monitor = AttentionStabilityMonitor(OneLayer(), log_every=1, sample=2)
    monitor.model(x)
    diagnosis = monitor.on_step()
    monitor.restore()
    assert diagnosis.to_dict()["layers"][""]["sample_period"] == 2


def test_a_sampled_maximum_is_a_lower_bound_in_words():
    for period, words in ((1, "scores range over 4000 nats"), (16, "scores range over at least 4000 nats")):
        stats = head_stats(max_logit=2000.0, sample_period=period)
        issue = diagnose([snapshot(1, a=stats)]).issues[0]
        assert words in issue.evidence


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        ({"normalized_entropy": 0.02, "saturated_share": 0.9}, "normalized entropy 0.020 ± 0.0006"),
        ({"max_weight": 0.97}, "is 0.970 ± 0.03 on average"),
        ({"jacobian_trace_bound": 1e-3}, "at most 0.001 ± 3e-05 of the softmax"),
    ],
)
def test_a_sampled_mean_comes_with_its_error(numbers, words):
    for period in (1, 16):
        issues = diagnose([snapshot(1, a=head_stats(sample_period=period, **numbers))]).issues
        assert any(words in issue.evidence for issue in issues) == (period > 1)
        assert all(("±" in issue.evidence) == (period > 1) for issue in issues)
