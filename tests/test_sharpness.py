"""Sharp heads: trained patterns and sinks are told apart from collapse, wherever the sink is."""

import numpy as np
import pytest
from heads import finished, found, growing, head_stats, only

from hnf_attention.diagnosis import diagnose
from hnf_attention.diagnosis.thresholds import threshold
from hnf_attention.statistics.fields import MAX_FIELDS, NUM_SUMS, SUM_FIELDS
from hnf_attention.statistics.heads import Snapshot

SHARP = {"normalized_entropy": 0.02, "max_weight": 0.9, "saturated_share": 0.7, "jacobian_trace_bound": 0.15}
# All that three rules could say of one head.
ONE_HOT = SHARP | {"max_weight": 0.99, "jacobian_trace_bound": 0.001, "saturated_share": 0.95}


def first(count, **numbers):
    """Those numbers for the first heads of four, healthy ones for the others."""
    healthy = head_stats()
    return {k: np.where(np.arange(4) < count, v, getattr(healthy, k)) for k, v in numbers.items()}


@pytest.mark.parametrize("count, severity", [(1, "note"), (2, "warning"), (4, "warning")])
@pytest.mark.parametrize("numbers", [SHARP, ONE_HOT])
def test_sharpness_without_growth_is_no_error(count, severity, numbers):
    diagnosis = diagnose([finished(3, a=first(count, **numbers))])
    assert [(i.issue_type, i.severity, i.head) for i in diagnosis.issues] == [
        ("entropy_collapse", severity, head) for head in range(count)
    ]
    assert diagnosis.has_issues() == (severity != "note") and diagnosis.healthy
    assert (
        f"such heads in this layer: {count} of 4; scores range over 10 nats" in diagnosis.issues[0].evidence
    )


def test_one_issue_holds_all_that_is_sharp_about_a_head():
    issue = found([finished(3, a=only(2, **ONE_HOT))], "entropy_collapse")[2]
    assert issue.threshold == threshold("collapsed_entropy") and issue.value == pytest.approx(0.02)
    for words in ("95% of rows saturated", "largest weight 0.99", "0.001 of the softmax gradient"):
        assert words in issue.evidence


@pytest.mark.parametrize("heads, severity", [(1, "warning"), (2, "note"), (3, "note")])
def test_one_head_of_few(heads, severity):
    healthy = head_stats(heads)
    numbers = {k: np.where(np.arange(heads) == 0, v, getattr(healthy, k)) for k, v in SHARP.items()}
    assert found([finished(3, a={"heads": heads, **numbers})], "entropy_collapse")[0].severity == severity


def test_one_sharp_head_with_large_scores_is_a_warning_and_with_huge_ones_an_error():
    issue = found([finished(3, a=only(2, **SHARP, max_logit=150.0, min_logit=-150.0))], "entropy_collapse")[2]
    assert issue.severity == "warning" and "scores range over 300 nats" in issue.evidence
    huge = only(2, **SHARP, max_logit=1500.0, min_logit=-1500.0)
    assert found([finished(3, a=huge)], "entropy_collapse")[2].severity == "error"
    offset = only(2, **SHARP, max_logit=150.0, min_logit=140.0)
    assert found([finished(3, a=offset)], "entropy_collapse")[2].severity == "note"


def test_one_sharp_head_with_rising_scores_is_an_error():
    scores = [np.where(np.arange(4) == 2, 40.0 + 6 * t, 5.0) for t in range(10)]
    issue = found(growing(scores, **only(2, **SHARP)), "entropy_collapse")[2]
    assert issue.severity == "error" and "scores range over 188 nats and rising" in issue.evidence
    behind = [
        Snapshot(s.step, {"healthy": head_stats(), **s.layers}) for s in growing(scores, **only(2, **SHARP))
    ]
    assert found(behind, "entropy_collapse")[2].severity == "note"  # the first layer is as it was
    steady = growing([np.where(np.arange(4) == 2, 80.0, 5.0)] * 10, **only(2, **SHARP))
    assert found(steady, "entropy_collapse")[2].severity == "note"


@pytest.mark.parametrize("count", [1, 3])
def test_small_scores_that_rise_are_a_note(count):
    scores = [np.where(np.arange(4) < count, 8.0 + t, 5.0) for t in range(10)]
    issues = found(growing(scores, **first(count, **SHARP)), "entropy_collapse")
    assert {i.severity for i in issues.values()} == {"note"} and len(issues) == count


# Rows, not means


@pytest.mark.parametrize("share", [0.12, 0.49, 0.51, 0.89, 0.92])
@pytest.mark.parametrize("count", [1, 4])
def test_a_share_of_saturated_rows_is_said_whatever_the_mean(share, count):
    severity = "warning" if count == 4 and share > 0.9 else "note"  # a layer of heads that have collapsed
    numbers = {"normalized_entropy": 0.9 * (1 - share), "saturated_share": share}
    issues = found([finished(1, a=first(count, **numbers))], "entropy_collapse")
    assert {i.severity for i in issues.values()} == {severity} and len(issues) == count
    assert f"{share:.0%} of rows saturated" in issues[0].evidence and f"{share:.0%}" in issues[0].headline


def test_few_saturated_rows_are_normal():
    assert diagnose([finished(1, a={"saturated_share": 0.09})]).issues == []


def test_the_tenth_percentile_is_read_where_no_row_is_saturated():
    stats = head_stats(normalized_entropy=0.5)
    low = stats.values.copy()
    histogram = slice(len(SUM_FIELDS), NUM_SUMS)
    assert low[histogram].sum(0).tolist() == [1000.0] * 4
    low[histogram] = 0
    low[histogram][1], low[histogram][30] = 150.0, 850.0  # 15 % of the rows below 2/32
    low[NUM_SUMS + MAX_FIELDS.index("neg_normalized_entropy")] = -0.03  # the smallest
    sick = type(stats)(low, stats.head_dim, stats.dtype)
    assert sick.normalized_entropy_p10[0] < 0.06
    low[histogram][0], low[histogram][1] = 150.0, 0.0
    issues = found([finished(1, a=sick)], "entropy_collapse")
    assert len(issues) == 4 and issues[0].threshold == threshold("low_tenth") and issues[0].severity == "note"


@pytest.mark.parametrize("entropy, told", [(0.04, {"warning"}), (0.1, {"note"}), (0.16, set())])
def test_a_layer_of_collapsed_heads_is_a_warning_and_one_of_sharp_heads_a_note(entropy, told):
    issues = found([finished(1, a={"normalized_entropy": entropy})], "entropy_collapse")
    assert {i.severity for i in issues.values()} == told


def test_saturated_rows_and_growth_are_an_error():
    numbers = {"normalized_entropy": 0.3, "saturated_share": 0.95}
    issues = found(growing([60.0, 80.0, 100.0], **numbers), "entropy_collapse")
    assert issues[0].severity == "error" and issues[0].threshold == threshold("collapsed_saturation")


# Sinks


def by_head(numbers):
    """The issues of single heads about their sharpness, of one layer with these numbers."""
    issues = found([finished(1, a=numbers)], "entropy_collapse")
    return {head: issue for head, issue in issues.items() if head is not None}


@pytest.mark.parametrize("sink", [0.31, 0.79, 0.81, 0.98])
def test_a_head_with_a_sink_is_judged_by_its_other_keys(sink):
    resting = ONE_HOT | {"sink_mass": sink, "stray_share": 0.0}
    assert diagnose([finished(1, a=resting)]).issues == []
    # A fifth of the weight or more beside the sink, and nearly all of it on one key a row.
    sharp_rest = by_head(resting | {"rest_normalized_entropy": 0.01})
    assert len(sharp_rest) == (4 if sink < 0.8 else 0)
    assert not by_head(resting | {"rest_normalized_entropy": 0.13})
    # Rows that are saturated elsewhere.
    stray = by_head(resting | {"stray_share": 0.4})
    assert {i.severity for i in stray.values()} == {"note"} and stray[0].value == pytest.approx(0.4)
    assert {i.severity for i in by_head(resting | {"stray_share": 0.95}).values()} == {"warning"}
    assert f"{sink:.2f} of the weight is on a sink" in stray[0].evidence


@pytest.mark.parametrize("whole, told", [(0.17, False), (0.11, False), (0.09, True)])
def test_a_sink_does_not_accuse_a_head_that_rests_on_two_keys(whole, told):
    two = {"normalized_entropy": whole, "sink_mass": 0.5, "rest_normalized_entropy": 0.04, "stray_share": 0.0}
    assert bool(by_head(two)) == told


@pytest.mark.parametrize("layers", [1, 3])
def test_layers_that_rest_as_a_whole_are_one_note(layers):
    resting = {"normalized_entropy": [0.05, 0.17, 0.12, 0.20], "sink_mass": [0.92, 0.72, 0.79, 0.68]}
    rest = {"rest_normalized_entropy": [0.16, 0.25, 0.12, 0.15], "stray_share": 0.0}
    given = {f"block{index}": resting | rest for index in range(layers)}
    (note,) = diagnose([finished(4, other={}, **given)]).issues
    assert (note.layer, note.head, note.issue_type, note.severity) == ("", None, "entropy_collapse", "note")
    assert note.value == pytest.approx(0.135) and f"in {layers} layer" in note.evidence
    assert f"of {layers + 1} every head rests" in note.evidence and len(note.headline) <= 160


@pytest.mark.parametrize(
    "changed",
    [
        {"sink_mass": [0.92, 0.72, 0.79, 0.2], "normalized_entropy": [0.01, 0.01, 0.01, 0.4]},
        {"normalized_entropy": 0.2},
        {"rest_normalized_entropy": 0.35},
        {"heads": 1},
    ],
)
def test_a_layer_that_rests_in_part_is_no_note(changed):
    resting = {
        "normalized_entropy": 0.05,
        "sink_mass": 0.9,
        "stray_share": 0.0,
        "rest_normalized_entropy": 0.2,
    }
    assert diagnose([finished(4, a=resting | changed)]).issues == []


def test_a_sink_with_large_scores_is_no_excuse():
    grown = ONE_HOT | {"sink_mass": 0.9, "stray_share": 0.0, "max_logit": 150.0}
    issues = found([finished(1, a=grown)], "entropy_collapse")
    assert issues[0].severity == "warning" and "0.90 of the weight is on a sink" in issues[0].evidence


DORMANT = dict(sink_mass=0.9999, max_weight=0.9999, jacobian_trace_bound=4e-8, normalized_entropy=1e-4)


def dormant(**changed):
    return DORMANT | {"saturated_share": 1.0, "stray_share": 0.0} | changed


def test_a_model_that_rests_as_a_whole_is_dormant():
    diagnosis = diagnose([finished(5, a=dormant(), b=dormant(heads=8), short={"judged_rows": 0.0})])
    (issue,) = diagnosis.issues
    assert (issue.layer, issue.head, issue.issue_type, issue.severity) == (
        "",
        None,
        "dormant_attention",
        "warning",
    )
    assert "all 12 judged heads of 3 layers" in issue.evidence and "at step 5" in issue.evidence
    assert (
        diagnosis.has_issues() and "dormant_attention" in diagnosis.summary() and len(issue.headline) <= 160
    )


@pytest.mark.parametrize(
    "other", [{}, dormant(sink_mass=[0.9999, 0.98, 0.9999, 0.9999]), dormant(jacobian_trace_bound=0.01)]
)
def test_one_head_that_attends_is_enough(other):
    issues = diagnose([finished(5, a=dormant(), b=other)]).issues
    assert all(issue.issue_type != "dormant_attention" for issue in issues)


# Forecasts


def test_a_coming_collapse_is_announced_with_its_time():
    steps = range(10, 101, 10)
    ratios = [0.45 - 0.002 * (s - 10) for s in steps]  # at step 100: 0.27, then 110 steps to 0.05
    scores = [(3 + 0.04 * s) ** 2 for s in steps]  # at step 100: 49, and 81 after 50 more, 121 after 100
    issues = found(growing(scores, steps, normalized_entropy=ratios), "entropy_collapse")
    assert issues[0].severity == "note"
    warned = found(growing([1.5 * x for x in scores], steps, normalized_entropy=ratios), "entropy_collapse")
    assert warned[0].severity == "warning"
    assert "head 0 of a: will collapse in about 110 steps" in issues[0].evidence
    # sqrt(size) is 7 at step 100 and grows by 0.04 a step: 2.9 more is twice the size.
    assert issues[0].headline == (
        "a head 0: scores range 98, doubling every 72 steps; normalized entropy 0.270, will collapse near step 210 -> "
        "QK-clip at 30 if it goes on"
    )


@pytest.mark.parametrize(
    "first, fall, scores",
    [
        (0.45, 0.002, [20.0] * 10),  # what learning looks like: entropy falls, the scores stay
        (0.45, 0.002, [70.0] * 10),  # also where they are large
        (0.45, 0.00091, None),  # 350 steps ahead, beyond three times the 50 steps that are looked at
        (0.865, 0.0035, None),  # 143 steps ahead, from more than half of the full entropy
    ],
)
def test_no_collapse_is_announced(first, fall, scores):
    steps = range(10, 101, 10)
    ratios = [first - fall * (s - 10) for s in steps]
    scores = [(3 + 0.04 * s) ** 2 for s in steps] if scores is None else scores
    assert not found(growing(scores, steps, normalized_entropy=ratios), "entropy_collapse")


# One-hot heads and gradients that no other rule tells of


def test_one_hot_attention():
    issues = found([finished(1, a=only(1, max_weight=0.96))], "one_hot_attention")
    assert set(issues) == {1} and issues[1].severity == "note" and issues[1].value == pytest.approx(0.96)
    assert found([finished(1, a={"max_weight": 0.96})], "one_hot_attention")[0].severity == "note"
    grown = {"max_weight": 0.96, "max_logit": 120.0, "min_logit": -120.0}
    assert found([finished(1, a=grown)], "one_hot_attention")[0].severity == "warning"
    assert not found([finished(1, a={"max_weight": 0.95})], "one_hot_attention")
    assert not found([finished(1, a={"max_weight": 0.99, "sink_mass": 0.5})], "one_hot_attention")


@pytest.mark.parametrize(
    "share, heads, score, severity",
    [
        (0.06, 4, 5, None),
        (0.04, 4, 5, "note"),
        (0.004, 1, 5, "note"),
        (0.004, 4, 5, "warning"),
        (0.004, 1, 150, "warning"),
        (0.004, 1, 1500, "error"),
    ],
)
def test_vanishing_gradient(share, heads, score, severity):
    numbers = {"jacobian_trace_bound": np.where(np.arange(4) < heads, share, 0.9)}
    issues = found([finished(1, a=numbers | {"max_logit": float(score)})], "vanishing_gradient")
    assert {i.severity for i in issues.values()} == ({severity} if severity else set())
    assert len(issues) == (heads if severity else 0)
