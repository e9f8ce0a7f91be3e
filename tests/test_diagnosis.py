"""Each rule on head statistics made to break it, and on healthy ones that must not."""

import warnings

import numpy as np
import pytest
from heads import found, growing, head_stats, only, snapshot

from hnf_attention.diagnosis import diagnose
from hnf_attention.diagnosis.heads import concatenate_heads
from hnf_attention.diagnosis.thresholds import THRESHOLDS
from hnf_attention.diagnosis.trends import score_size, theil_sen
from hnf_attention.statistics.heads import Snapshot

SHARP = {"normalized_entropy": 0.02, "max_weight": 0.9, "saturated_share": 0.7, "jacobian_trace_bound": 0.15}


def test_a_healthy_model_has_no_issues():
    diagnosis = diagnose([snapshot(step, a={}, b={"heads": 8}) for step in range(1, 30)])
    assert diagnosis.issues == [] and not diagnosis.has_issues()
    assert diagnosis.summary() == (
        "step 29: 2 layers, 12 heads measured, 12 judged over 12,000 rows; 0 errors, 0 warnings: healthy"
    )


def test_an_empty_history_is_refused():
    with pytest.raises(ValueError, match="at least one snapshot"):
        diagnose([])


def test_heads_without_any_number_cause_nothing():
    stats = head_stats()
    stats.values[:] = 0
    stats.values[-7:] = -np.inf
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        diagnosis = diagnose([snapshot(1, a=stats)] * 12)
        assert diagnosis.issues == []
        assert diagnosis.to_dict()["layers"]["a"]["normalized_entropy"] == [None] * 4


# Overflow


@pytest.mark.parametrize(
    "size, severity, limit",
    [
        (101.0, "warning", 100.0),
        (301.0, "error", 300.0),
        (1001.0, "error", 1e3),
        (10001.0, "error", 1e4),
    ],
)
@pytest.mark.parametrize("offset", [0.0, 0.9, -1.0, 50.0])  # of the size; -1: all scores are below 0
def test_overflow_of_one_snapshot(size, severity, limit, offset):
    middle = offset * size
    issues = found(
        [snapshot(7, a=only(1, max_logit=middle + size, min_logit=middle - size))], "overflow_risk"
    )
    assert set(issues) == {1}
    assert (issues[1].severity, issues[1].threshold, issues[1].value) == (severity, limit, size)
    assert f"head 1 of a: scores range over {2 * size:.4g} nats" in issues[1].evidence
    cure = "go back, a lower rate" if severity == "error" else "QK-clip at 30"
    assert issues[1].headline.startswith(f"a head 1: scores range {2 * size:.4g} -> {cure}")


@pytest.mark.parametrize("offset", [200.0, 5000.0, -5000.0])
def test_a_number_added_to_all_scores_changes_nothing(offset):
    history = [snapshot(s, a={"max_logit": offset + 8.0, "min_logit": offset - 8.0}) for s in range(1, 12)]
    diagnosis = diagnose(history)
    assert diagnosis.issues == [] and diagnosis.healthy
    growing_offset = [
        snapshot(s, a={"max_logit": s * offset + 8, "min_logit": s * offset - 8}) for s in range(12)
    ]
    assert diagnose(growing_offset).issues == []


def test_large_negative_scores_are_no_bias_where_nothing_is_added_to_them():
    issue = found([snapshot(1, a={"max_logit": -1.6, "min_logit": -6359.0})], "overflow_risk")[0]
    assert issue.severity == "error" and issue.value == pytest.approx(3178.7)
    masked = head_stats(max_logit=-1.6, min_logit=-6359.0, score_kind=1)
    np.testing.assert_array_equal(score_size(masked), 1.6)


def test_where_q_and_k_are_known_only_what_they_cannot_reach_is_a_bias():
    """With a soft-cap or a sink: scores within scale * |q| * |k| may be the product's own."""
    wide = dict(max_logit=8.0, min_logit=-800.0, score_kind=2, key_size=1.0)
    np.testing.assert_allclose(score_size(head_stats(**wide, query_size=900.0)), 404.0)
    np.testing.assert_allclose(score_size(head_stats(**wide, query_size=20.0)), 8.0)
    np.testing.assert_allclose(score_size(head_stats(**wide, query_size=np.nan)), 8.0)


@pytest.mark.parametrize("score", [59.0, 61.0, 100.0])
def test_no_overflow_of_one_snapshot(score):
    assert not found([snapshot(1, a={"max_logit": score})], "overflow_risk")


def test_three_snapshots_above_the_watch_level_are_a_note():
    assert not found(growing([59, 61, 61]), "overflow_risk")
    assert not found(growing([61, 59, 61]), "overflow_risk")
    issues = found(growing([61, 61, 61]), "overflow_risk")
    assert issues[0].severity == "note" and issues[0].threshold == 60.0
    assert "3 snapshots in a row" in issues[0].evidence


def test_what_rounding_does_is_told_where_it_is_known():
    large = {"max_logit": 200.0, "query_size": 40.0, "dtype": "bfloat16"}
    layer = head_stats(**large)
    told = found([snapshot(1, a=layer)], "overflow_risk")[0].evidence
    assert f"rounding error up to {layer.error_bound[0]:.2g} of the largest |v|" in told
    assert f"q, k need {layer.typical_bits[0]:.0f} bits, {layer.required_bits[0]:.0f} at worst" in told
    assert len(told) < 260
    unseen = found([snapshot(1, a=large | {"query_size": np.nan})], "overflow_risk")[0].evidence
    assert "rounding" not in unseen and "nan" not in unseen


@pytest.mark.parametrize("head_dim", [16, 64, 256])
def test_the_fp16_product_counts_a_common_offset(head_dim):
    """q.k = sqrt(head dimension) * score. What helps is another format, not a clip."""
    limit = 65504 / head_dim**0.5
    numbers = dict(min_logit=limit - 40, head_dim=head_dim, query_size=limit, key_size=1.0)
    half = found([snapshot(1, a={**numbers, "max_logit": limit + 1, "dtype": "float16"})], "overflow_risk")[0]
    assert (half.severity, half.threshold) == ("warning", 65504.0)
    assert half.value == pytest.approx((limit + 1) * head_dim**0.5, rel=1e-3)
    for text in (half.suggestion, half.headline):
        assert "bf16 or fp32" in text and "SDPA" in text and "clip" not in text.lower()
    below = {**numbers, "max_logit": limit - 1, "dtype": "float16"}
    assert found([snapshot(1, a=below)], "overflow_risk")[0].threshold != 65504.0
    single = {**numbers, "max_logit": limit + 1, "dtype": "float32"}
    assert diagnose([snapshot(1, a=single)]).issues == []


def test_the_fp16_product_is_told_beside_growth():
    score = 65504 / 8 + 1
    half = {"max_logit": score, "query_size": score, "key_size": 1.0, "dtype": "float16"}
    issue = found([snapshot(1, a=half)], "overflow_risk")[0]
    assert (issue.severity, issue.threshold) == ("error", 1e3)
    assert (
        "QK-clip" in issue.suggestion and "bf16 or fp32" in issue.suggestion and "in fp16" in issue.evidence
    )


def test_a_mask_fill_is_no_product():
    fill = {"max_logit": 8.0, "min_logit": -65504.0, "score_kind": 1, "dtype": "float16"}
    assert diagnose([snapshot(1, a=fill)]).issues == []


@pytest.mark.parametrize(
    "dtype, score, told",
    [
        ("bfloat16", 260.0, True),
        ("bfloat16", 250.0, False),
        ("float16", 520.0, False),
        ("float32", 1e5, False),
        ("float8_e4m3fn", 55.0, False),  # its kernels store no scores
    ],
)
def test_scores_that_a_format_rounds_are_a_note(dtype, score, told):
    offset = {
        "max_logit": score,
        "min_logit": score - 20,
        "dtype": dtype,
        "query_size": score,
        "key_size": 1.0,
    }
    issues = found([snapshot(1, a=offset)], "overflow_risk")
    assert {i.severity for i in issues.values()} == ({"note"} if told else set())
    assert not told or (issues[0].threshold == 1.0 and "stored in bfloat16" in issues[0].evidence)


@pytest.mark.parametrize("dtype, score, told", [("float16", 12, True), ("bfloat16", 12, False)])
def test_the_naive_limit_is_information_only(dtype, score, told):
    history = growing([score] * 4, dtype=dtype)
    assert not found(history, "overflow_risk")
    issues = found(growing([200] * 4, dtype=dtype), "overflow_risk")
    assert issues[0].severity == "error" and "without max subtraction" in issues[0].evidence
    limit = "11.09" if told else "88.72"
    assert limit in issues[0].evidence


def roots(slope, count=6):
    """Scores whose square root grows by that much a step, from 2, every 10 steps."""
    return [(2 + slope * t) ** 2 for t in range(10, 10 * count + 1, 10)]


def test_alarm_projects_the_square_root():
    # sqrt(score) = 2 + 0.08 t: at step 60 the score is 46, 50 steps later 116; it passes 100 in 40.
    issue = found(growing(roots(0.08)), "overflow_risk")[0]
    assert issue.severity == "error" and issue.threshold == 100.0
    assert issue.value == pytest.approx((2 + 0.08 * 110) ** 2)
    assert "116.6 within 50 steps" in issue.evidence and "saturates in 50 (20 to 205) steps" in issue.headline
    # Slower, it stays below 100 for the next 50 steps, and below 150 for the next 100.
    assert not found(growing(roots(0.06)), "overflow_risk")


def test_a_warning_looks_further_ahead_than_an_alarm():
    # At step 60 the score is 38; it is 96 after 50 steps, and 174 after 100.
    issue = found(growing(roots(0.07)), "overflow_risk")[0]
    assert issue.severity == "warning" and issue.threshold == 150.0
    assert issue.value == pytest.approx((2 + 0.07 * 160) ** 2)
    # Scores of less than 20 may grow as fast, and stop.
    assert not found(growing(roots(0.11, 2) + [19.0]), "overflow_risk")


@pytest.mark.parametrize(
    "layers, severity", [("abcd", "error"), ("abc", "error"), ("ab", "warning"), ("bcd", None)]
)
def test_an_alarm_needs_the_first_layer_and_most_layers(layers, severity):
    history = [
        snapshot(10 * t, **{x: {"max_logit": (2 + 0.8 * t) ** 2 if x in layers else 5.0} for x in "abcd"})
        for t in range(1, 7)
    ]
    issues = [issue for issue in diagnose(history).issues if issue.issue_type == "overflow_risk"]
    assert {issue.severity for issue in issues} == ({severity} if severity else set())
    # The first layer alone is warned of; the others where their scores are large already.
    assert {issue.layer for issue in issues} == (
        {"a"} if severity == "warning" else set(layers if severity else "")
    )
    history.append(snapshot(70, **{x: {"max_logit": 101.0 if x in layers else 5.0} for x in "abcd"}))
    assert {x.layer for x in diagnose(history).warnings + diagnose(history).errors} == set(layers)


@pytest.mark.parametrize("every", [1, 2, 10, 100])
def test_the_alarm_is_per_training_step_at_any_cadence(every):
    """The last 50 steps count, or the last three snapshots; the steps of the first snapshots are too few for a line."""
    steps = [t for t in range(1, 301) if t % every == 0]
    for slope, alarmed in ((0.06, True), (0.02, False)):
        history = growing([(2 + slope * (t - 200)) ** 2 if t > 200 else 4.0 for t in steps], steps=steps)
        issues = found(history, "overflow_risk")
        assert [issue.severity for issue in issues.values()] == ["error"] * 4 * (alarmed and every < 100)
    history = growing([9.0 * t for t in range(1, 20)], steps=range(1, 20))
    assert not any(issue.severity == "error" for issue in found(history, "overflow_risk").values())


def test_the_alarm_survives_an_outlier():
    scores = roots(0.09, 8)
    scores[4] *= 1.9
    assert found(growing(scores), "overflow_risk")[0].severity == "error"


def test_a_fix_restarts_the_trend():
    before = [(2 + 2 * t) ** 2 for t in range(1, 9)]
    assert found(growing(before), "overflow_risk")[0].severity == "error"
    assert not found(growing([*before, 30.0]), "overflow_risk")
    again = [30.0 * (1 + 0.3 * t) for t in range(6)]
    assert found(growing([*before, *again]), "overflow_risk")[0].severity == "error"


@pytest.mark.parametrize("kind, seen", [(1, 1.0), (2, np.nan)])
@pytest.mark.parametrize("fill", [-1e4, -1e9, float(np.finfo(np.float32).min), -512.0])
def test_mask_fills_and_position_slopes_are_no_growth(fill, kind, seen):
    """In a mask that is added, or in scores whose q and k are not known."""
    stats = head_stats(min_logit=fill, max_logit=8.0, score_kind=kind, query_size=seen)
    np.testing.assert_array_equal(score_size(stats), 8.0)
    assert not found([snapshot(step, a=stats) for step in range(1, 12)], "overflow_risk")
    both = head_stats(min_logit=-500.0, max_logit=200.0, score_kind=kind, query_size=seen)
    np.testing.assert_array_equal(score_size(both), 350.0)


# Trends


def test_theil_sen_is_exact_on_lines_and_blind_to_few_outliers():
    steps = np.arange(0, 50, 5.0)
    values = np.stack([3 + 0.5 * steps, 7 - 0.1 * steps, 2 + 1.0 * steps], axis=1)
    values[[2, 5, 7], 2] = 1e6
    line = theil_sen(steps, values)
    np.testing.assert_allclose(line.slope, [0.5, -0.1, 1.0], rtol=1e-12)
    np.testing.assert_allclose(line.level, [25.5, 2.5, 47.0], rtol=1e-12)
    np.testing.assert_allclose(line.ahead(100), [75.5, -7.5, 147.0])
    np.testing.assert_allclose(line.steps_until(30.5), [10.0, np.nan, np.nan])


def test_too_few_values_give_no_line():
    steps = 10 * np.arange(4.0)
    values = np.ones((4, 2))
    values[:2, 1] = np.nan
    line = theil_sen(steps, values)
    assert line.slope[0] == 0 and np.isnan(line.slope[1])
    assert np.isnan(theil_sen(steps[:1], values[:1]).slope).all()
    assert np.isnan(theil_sen(0.4 * steps, values).slope).all()  # of 12 steps
    assert np.isnan(theil_sen(np.zeros(4), values).slope).all()  # snapshots of one and the same step


def test_trend_skips_snapshots_without_the_layer_and_stops_where_heads_change():
    history = [snapshot(4 * s, a={"heads": 2, "max_logit": 500.0}) for s in range(1, 6)]
    history += [
        snapshot(4 * s, **({"a": {"max_logit": float(s)}} if s % 2 else {"b": {}})) for s in range(6, 20)
    ]
    line = concatenate_heads(history, ["a"])[0].root_score
    assert line.slope.shape == (4,)
    np.testing.assert_allclose(line.level, np.sqrt(19.0), rtol=0.02)


def test_a_layer_is_judged_beside_others_as_alone():
    """Whatever they share: head counts, head dimension, dtype, sampling, keys, snapshots, falls, rising heads."""
    rising = [{"max_logit": (3 + 0.8 * t) ** 2, "normalized_entropy": 0.4 - 0.01 * t} for t in range(16)]
    large = [{**numbers, "query_size": 40.0} for numbers in rising]
    fallen = [
        {"max_logit": [500.0, 500.0, 200.0, 5.0] if t < 8 else [150.0, 60.0 + t, 200.0, 5.0]}
        for t in range(16)
    ]
    layers = {
        "plain": rising,
        "healthy": [{}] * 16,
        "sharp": [only(1, **SHARP)] * 16,
        "collapsed": [SHARP | {"heads": 6}] * 16,
        "fallen": fallen,
        "late": [None if t % 3 == 0 else numbers for t, numbers in enumerate(rising)][:-1] + rising[-1:],
        "resized": [numbers | {"heads": 2 if t < 9 else 3} for t, numbers in enumerate(rising)],
        "half": [numbers | {"dtype": "float16"} for numbers in large],
        "wide": [numbers | {"head_dim": 128} for numbers in large],
        "sampled": [numbers | {"sample_period": 4} for numbers in large],
        "long": [numbers | {"num_keys": 4096.0} for numbers in large],
        "short": large,
        "empty": [{"heads": 0}] * 16,
    }
    history = [
        snapshot(10 * t, **{name: each[t] for name, each in layers.items() if each[t] is not None})
        for t in range(16)
    ]
    # The first layer and the share of layers decide about alarms, so alone each is beside a healthy first layer.
    history = [Snapshot(s.step, {"healthy": s.layers["healthy"], **s.layers}) for s in history]
    together = diagnose(history).issues
    for layer in layers:
        alone = [
            Snapshot(s.step, {k: v for k, v in s.layers.items() if k in ("healthy", layer)}) for s in history
        ]
        assert diagnose(alone).issues == [issue for issue in together if issue.layer == layer], layer
    assert {issue.layer for issue in together} == layers.keys() - {"healthy", "empty"}


def test_every_threshold_says_where_it_comes_from():
    for name, entry in THRESHOLDS.items():
        assert entry.source and np.isfinite(entry.value), name
        assert any(mark in entry.source for mark in ("own ", "arXiv", "IEEE", "proposal")), name
