"""Each rule on head statistics made to break it, and on healthy ones that must not."""

import math
import warnings

import numpy as np
import pytest
from heads import head_stats, snapshot

from hnf_attention.diagnosis import diagnose
from hnf_attention.diagnosis.heads import concatenate_heads
from hnf_attention.diagnosis.thresholds import THRESHOLDS, threshold
from hnf_attention.diagnosis.trends import score_size, theil_sen
from hnf_attention.statistics.heads import Snapshot


def found(history, issue_type):
    """{head: issue} of one kind, after checks that hold for every issue."""
    diagnosis = diagnose(history)
    keys = [(i.layer, i.head, i.issue_type) for i in diagnosis.issues]
    assert len(keys) == len(set(keys))
    for issue in diagnosis.issues:
        assert issue.severity in ("warning", "error")
        assert issue.source and issue.suggestion
        assert f"step {history[-1].step}" in issue.evidence
        assert issue.threshold in {t.value for t in THRESHOLDS.values()}
    return {i.head: i for i in diagnosis.issues if i.issue_type == issue_type}


def growing(scores, steps=None, **numbers):
    """History of layer `a`, whose largest score takes these values (each a number or one per head)."""
    steps = range(1, len(scores) + 1) if steps is None else steps
    each = [
        {k: v[t] if isinstance(v, list) and len(v) == len(scores) else v for k, v in numbers.items()}
        for t in range(len(scores))
    ]
    return [snapshot(s, a={"max_logit": m, **e}) for s, m, e in zip(steps, scores, each)]


def test_a_healthy_model_has_no_issues():
    diagnosis = diagnose([snapshot(step, a={}, b={"heads": 8}) for step in range(1, 30)])
    assert diagnosis.issues == [] and not diagnosis.has_issues()
    assert diagnosis.summary() == "step 29: 2 layers, 12 heads measured; 0 errors, 0 warnings"


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
    "score, severity, limit",
    [(101.0, "warning", 100.0), (1001.0, "error", 1e3), (10001.0, "error", 1e4)],
)
@pytest.mark.parametrize("sign", [1, -1])
def test_overflow_of_one_snapshot(score, severity, limit, sign):
    side = {"max_logit": [5, score, 5, 5]} if sign > 0 else {"min_logit": [-5, -score, -5, -5]}
    side = side if sign > 0 else side | {"max_logit": [5, score / 5, 5, 5]}
    issues = found([snapshot(7, a=side)], "overflow_risk")
    assert set(issues) == {1}
    assert (issues[1].severity, issues[1].threshold, issues[1].value) == (severity, limit, score)
    assert f"{score:.4g}" in issues[1].evidence and "head 1 of a" in issues[1].evidence


@pytest.mark.parametrize("score", [59.0, 61.0, 100.0])
def test_no_overflow_of_one_snapshot(score):
    assert not found([snapshot(1, a={"max_logit": score})], "overflow_risk")


def test_three_snapshots_above_the_watch_level():
    assert not found(growing([59, 61, 61]), "overflow_risk")
    assert not found(growing([61, 59, 61]), "overflow_risk")
    issues = found(growing([5, 61, 61, 61]), "overflow_risk")
    assert issues[0].severity == "warning" and issues[0].threshold == 60.0
    assert "3 snapshots in a row" in issues[0].evidence


def test_what_rounding_does_is_told_where_it_is_known():
    large = {"max_logit": 200.0, "query_size": 40.0, "dtype": "bfloat16"}
    layer = head_stats(**large)
    told = found([snapshot(1, a=layer)], "overflow_risk")[0].evidence
    assert f"rounding error up to {layer.error_bound[0]:.2g} of the largest |v|" in told
    assert f"q, k need {layer.typical_bits[0]:.0f} bits, {layer.required_bits[0]:.0f} at worst" in told
    assert len(told) < 240
    unseen = found([snapshot(1, a=large | {"query_size": np.nan})], "overflow_risk")[0].evidence
    assert "rounding" not in unseen and "nan" not in unseen


def test_fp16_range_depends_on_dtype_and_head_dimension():
    score = 65504 / 8 + 1  # q.k = 8 * score at head dimension 64
    half = found([snapshot(1, a={"max_logit": score, "dtype": "float16"})], "overflow_risk")[0]
    assert half.threshold == 65504.0 and half.value == pytest.approx(8 * score)
    assert "fp16" in half.evidence
    brain = found([snapshot(1, a={"max_logit": score, "dtype": "bfloat16"})], "overflow_risk")[0]
    assert brain.threshold == 1e3
    just_below = {"max_logit": score - 2, "dtype": "float16"}
    assert found([snapshot(1, a=just_below)], "overflow_risk")[0].threshold == 1e3


@pytest.mark.parametrize("dtype, score, told", [("float16", 12, True), ("bfloat16", 12, False)])
def test_the_naive_limit_is_information_only(dtype, score, told):
    history = growing([score] * 4, dtype=dtype)
    assert not found(history, "overflow_risk")
    issues = found(growing([200] * 4, dtype=dtype), "overflow_risk")
    assert issues[0].severity == "warning" and "without max subtraction" in issues[0].evidence
    limit = "11.09" if told else "88.72"
    assert limit in issues[0].evidence


def test_alarm_projects_the_square_root():
    # sqrt(score) = 2 + 0.35 t: at step 10 the score is 30, 100 steps later 1640; passes 1200 in 81.
    scores = [(2 + 0.35 * t) ** 2 for t in range(1, 11)]
    issue = found(growing(scores), "overflow_risk")[0]
    assert issue.severity == "error" and issue.threshold == 1200.0
    assert issue.value == pytest.approx((2 + 0.35 * 110) ** 2)
    eta = (math.sqrt(1200) - 2 - 0.35 * 10) / 0.35
    assert f"in about {eta:.0f} steps" in issue.evidence
    # Slower, it stays below 1200 for the next 100 steps.
    assert not found(growing([(2 + 0.25 * t) ** 2 for t in range(1, 11)]), "overflow_risk")


def test_the_alarm_is_per_training_step_not_per_snapshot():
    scores = [(2 + 0.35 * t) ** 2 for t in range(1, 11)]
    assert not found(growing(scores, steps=range(10, 101, 10)), "overflow_risk")


def test_the_alarm_survives_an_outlier():
    scores = [(2 + 0.35 * t) ** 2 for t in range(1, 11)]
    scores[6] *= 1.9
    assert found(growing(scores), "overflow_risk")[0].severity == "error"


def test_a_fix_restarts_the_trend():
    before = [(2 + 2 * t) ** 2 for t in range(1, 9)]
    assert found(growing(before), "overflow_risk")[0].severity == "error"
    assert not found(growing([*before, 30.0]), "overflow_risk")
    again = [30.0 * (1 + 0.3 * t) for t in range(6)]
    assert found(growing([*before, *again]), "overflow_risk")[0].severity == "error"


@pytest.mark.parametrize("fill", [-1e4, -1e9, float(np.finfo(np.float32).min), -512.0])
def test_mask_fills_and_position_slopes_are_no_growth(fill):
    stats = head_stats(min_logit=fill, max_logit=8.0)
    np.testing.assert_array_equal(score_size(stats), 8.0)
    assert not found([snapshot(step, a=stats) for step in range(1, 12)], "overflow_risk")
    np.testing.assert_array_equal(score_size(head_stats(min_logit=-500.0, max_logit=200.0)), 500.0)


# Collapse

SHARP = {"normalized_entropy": 0.02, "max_weight": 0.9, "saturated_share": 0.7, "jacobian_trace_bound": 0.15}


def only(head, **numbers):
    """Those numbers for one head of four, healthy ones for the others."""
    healthy = head_stats()
    return {k: np.where(np.arange(4) == head, v, getattr(healthy, k)) for k, v in numbers.items()}


def test_one_sharp_head_is_a_warning_half_a_layer_an_error():
    issues = found([snapshot(3, a=only(2, **SHARP))], "entropy_collapse")
    assert set(issues) == {2} and issues[2].severity == "warning"
    assert "such heads in this layer: 1 of 4; scores up to 5" in issues[2].evidence
    many = {k: np.where(np.arange(4) < 2, v, getattr(head_stats(), k)) for k, v in SHARP.items()}
    issues = found([snapshot(3, a=many)], "entropy_collapse")
    assert {h: i.severity for h, i in issues.items()} == {0: "error", 1: "error"}
    assert issues[0].threshold == threshold("collapsed_entropy") and issues[0].value == pytest.approx(0.02)
    assert "such heads in this layer: 2 of 4" in issues[0].evidence


def test_one_sharp_head_with_large_scores_is_an_error():
    issues = found([snapshot(3, a=only(2, **SHARP, max_logit=150.0))], "entropy_collapse")
    assert issues[2].severity == "error" and "scores up to 150" in issues[2].evidence


def test_one_sharp_head_with_rising_scores_is_an_error():
    scores = [np.where(np.arange(4) == 2, 40.0 + 4 * t, 5.0) for t in range(10)]
    history = growing(scores, **only(2, **SHARP))
    issue = found(history, "entropy_collapse")[2]
    assert issue.severity == "error" and "scores up to 76 and rising" in issue.evidence
    steady = growing([np.where(np.arange(4) == 2, 80.0, 5.0)] * 10, **only(2, **SHARP))
    assert found(steady, "entropy_collapse")[2].severity == "warning"


def test_saturated_rows_count_even_when_the_mean_is_fine():
    numbers = {"normalized_entropy": 0.3, "saturated_share": 0.95}
    issues = found([snapshot(1, a=numbers)], "entropy_collapse")
    assert issues[0].severity == "error" and issues[0].threshold == threshold("collapsed_saturation")
    issues = found([snapshot(1, a=numbers | {"saturated_share": 0.6})], "entropy_collapse")
    assert issues[0].severity == "warning" and issues[0].threshold == threshold("high_saturation")


def test_low_entropy_is_a_warning_in_any_number_of_heads():
    issues = found([snapshot(1, a={"normalized_entropy": 0.1})], "entropy_collapse")
    assert {i.severity for i in issues.values()} == {"warning"} and len(issues) == 4
    assert not found([snapshot(1, a={"normalized_entropy": 0.16})], "entropy_collapse")


def test_sink_heads_are_told_apart_unless_their_scores_are_large():
    sharp = SHARP | {"max_weight": 0.99, "jacobian_trace_bound": 0.001}
    assert diagnose([snapshot(1, a=sharp | {"sink_mass": 0.9})]).issues == []
    assert len(diagnose([snapshot(1, a=sharp | {"sink_mass": 0.2})]).issues) == 12
    issues = found([snapshot(1, a=sharp | {"sink_mass": 0.9, "max_logit": 150.0})], "entropy_collapse")
    assert issues[0].severity == "error" and "a sink head (0.90 on the first key)" in issues[0].evidence


def test_a_coming_collapse_is_announced_with_its_time():
    steps = range(10, 101, 10)
    ratios = [0.45 - 0.002 * (s - 10) for s in steps]  # at step 100: 0.27, then 110 steps to 0.05
    scores = [(3 + 0.04 * s) ** 2 for s in steps]  # at step 100: 49
    issues = found(growing(scores, steps, normalized_entropy=ratios), "entropy_collapse")
    assert issues[0].severity == "warning"
    assert "head 0 of a: will collapse in about 110 steps" in issues[0].evidence


@pytest.mark.parametrize(
    "first, fall, scores",
    [
        (0.45, 0.002, [20.0] * 10),  # what learning looks like: entropy falls, the scores stay
        (0.45, 0.002, [70.0] * 10),  # also where they are large
        (0.45, 0.00091, None),  # 350 steps ahead, beyond three times the 90 steps that were seen
        (0.865, 0.0035, None),  # 143 steps ahead, from more than half of the full entropy
    ],
)
def test_no_collapse_is_announced(first, fall, scores):
    steps = range(10, 101, 10)
    ratios = [first - fall * (s - 10) for s in steps]
    scores = [(3 + 0.04 * s) ** 2 for s in steps] if scores is None else scores
    assert not found(growing(scores, steps, normalized_entropy=ratios), "entropy_collapse")


# One-hot heads, gradients, non-finite numbers


def test_one_hot_attention():
    issues = found([snapshot(1, a=only(1, max_weight=0.96))], "one_hot_attention")
    assert set(issues) == {1} and issues[1].severity == "warning" and issues[1].value == pytest.approx(0.96)
    assert not found([snapshot(1, a={"max_weight": 0.95})], "one_hot_attention")
    assert not found([snapshot(1, a={"max_weight": 0.99, "sink_mass": 0.5})], "one_hot_attention")


@pytest.mark.parametrize(
    "share, heads, severity",
    [(0.06, 4, None), (0.04, 4, "warning"), (0.004, 1, "warning"), (0.004, 4, "error")],
)
def test_vanishing_gradient(share, heads, severity):
    numbers = {"jacobian_trace_bound": np.where(np.arange(4) < heads, share, 0.9)}
    issues = found([snapshot(1, a=numbers)], "vanishing_gradient")
    assert {i.severity for i in issues.values()} == ({severity} if severity else set())
    assert len(issues) == (heads if severity else 0)


def test_non_finite_names_share_and_origin():
    bad = {"nonfinite_rows": [0, 250, 0, 0], "rows": [1000, 750, 1000, 1000]}
    history = [
        snapshot(10, a={}, b={}, c={}),
        snapshot(20, a={}, b=bad, c={}),
        snapshot(30, a=bad, b=bad, c=bad),
    ]
    diagnosis = diagnose(history)
    issues = {i.layer: i for i in diagnosis.errors if i.issue_type == "non_finite"}
    assert list(issues) == ["a", "b", "c"]
    assert all(i.head == 1 and i.value == 0.25 for i in issues.values())
    assert "250 of 1000 rows (25.0%)" in issues["a"].evidence
    assert "layer b was the first to show it, at step 20" in issues["a"].evidence
    assert "this layer is the first to show it, at step 20" in issues["b"].evidence
    assert diagnose(history[:1]).issues == []


def test_of_two_layers_that_broke_in_one_snapshot_the_first_to_run_is_the_origin():
    bad = {"nonfinite_rows": 1}
    for issue in diagnose([snapshot(1, a={}, b={}, c={}), snapshot(2, a={}, b=bad, c=bad)]).issues:
        where = "this layer is" if issue.layer == "b" else "layer b was"
        assert f"{where} the first to show it, at step 2" in issue.evidence
        assert "the overflow in b " in issue.suggestion


def test_a_layer_that_is_the_model_itself_is_named_in_words():
    diagnosis = diagnose(
        [snapshot(1, **{"": {"nonfinite_rows": 1, "max_logit": 2e3}, "b": {"nonfinite_rows": 1}})]
    )
    assert (
        "overflow_risk in (the model itself) heads 0-3\n    head 0 of (the model itself):"
        in diagnosis.summary()
    )
    other = next(issue for issue in diagnosis.issues if issue.layer == "b")
    assert "layer (the model itself) was the first" in other.evidence
    assert "the overflow in (the model itself) and" in other.suggestion


def test_an_old_incident_does_not_name_the_origin_of_a_new_one():
    bad = {"nonfinite_rows": 1}
    history = [snapshot(1, a={}, b=bad), snapshot(2, a={}, b={}), snapshot(3, a=bad, b={})]
    assert "this layer is the first to show it, at step 3" in diagnose(history).issues[0].evidence


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
    steps = np.arange(6.0)
    values = np.ones((6, 2))
    values[:2, 1] = np.nan
    line = theil_sen(steps, values)
    assert line.slope[0] == 0 and np.isnan(line.slope[1])
    assert np.isnan(theil_sen(steps[:1], values[:1]).slope).all()
    assert np.isnan(theil_sen(np.zeros(6), values).slope).all()  # snapshots of one and the same step


def test_trend_skips_snapshots_without_the_layer_and_stops_where_heads_change():
    history = [snapshot(s, a={"heads": 2, "max_logit": 500.0}) for s in range(1, 6)]
    history += [snapshot(s, **({"a": {"max_logit": float(s)}} if s % 2 else {"b": {}})) for s in range(6, 20)]
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
    together = diagnose(history).issues
    for layer in layers:
        alone = [Snapshot(s.step, {k: v for k, v in s.layers.items() if k == layer}) for s in history]
        assert diagnose(alone).issues == [issue for issue in together if issue.layer == layer], layer
    assert {issue.layer for issue in together} == layers.keys() - {"healthy", "empty"}


def test_every_threshold_says_where_it_comes_from():
    for name, entry in THRESHOLDS.items():
        assert entry.source and np.isfinite(entry.value), name
        assert any(mark in entry.source for mark in ("own ", "arXiv", "IEEE", "proposal")), name
