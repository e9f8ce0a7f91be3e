"""The diagnosis as a whole: order, groups, JSON, summary, plots."""

import json
import math

import numpy as np
import pytest
from heads import head_stats, snapshot

from hnf_attention.diagnosis import AttentionDiagnosis, StabilityIssue, diagnose
from hnf_attention.diagnosis.issue import grouped, heads_text
from hnf_attention.instrumentation import Coverage
from hnf_attention.statistics.heads import Snapshot

SHARP = {"normalized_entropy": 0.02, "max_weight": 0.9, "saturated_share": 0.7, "jacobian_trace_bound": 0.15}


@pytest.fixture
def broken():
    collapsed = SHARP | {
        "heads": 4,
        "max_logit": [2000.0, 150.0, 150.0, 70.0],
        "nonfinite_rows": [0, 0, 0, 1],
    }
    history = [snapshot(1, calm={}, wild=collapsed)]
    return diagnose(history, Coverage({"wild": "probe"}, {"other": "never ran"}))


def test_errors_come_first_and_worst_kind_before_others(broken):
    severities = [i.severity for i in broken.issues]
    assert severities == sorted(severities)
    assert broken.issues[0].issue_type == "non_finite"
    assert broken.errors + broken.warnings == broken.issues
    assert all(i.layer == "wild" for i in broken.issues)


def test_to_dict_is_strict_json(broken):
    text = json.dumps(broken.to_dict(), allow_nan=False)
    read = json.loads(text)
    assert read["healthy"] is False and read["step"] == 1
    assert read["not_measured"] == {"other": "never ran"}
    assert len(read["issues"]) == len(broken.issues)
    assert set(read["issues"][0]) == {
        "layer", "head", "issue_type", "severity", "value", "threshold", "source", "evidence", "suggestion",
    }  # fmt: skip
    layer = read["layers"]["wild"]
    assert layer["max_logit"] == [2000.0, 150.0, 150.0, 70.0]
    assert layer["log2_curvature"][0] == pytest.approx(math.log2(100 / 64) + 2 * math.log2(math.e) * 2000)


def test_numbers_that_are_not_finite_become_null():
    stats = head_stats(query_norm=[np.inf, 1.0, 1.0, 1.0])
    read = json.loads(json.dumps(diagnose([snapshot(1, a=stats)]).to_dict(), allow_nan=False))
    assert read["layers"]["a"]["query_norm"] == [None, 1.0, 1.0, 1.0]


def test_summary_groups_heads(broken):
    lines = broken.summary().splitlines()
    assert lines[0].startswith("step 1: 2 layers, 8 heads measured; ")
    assert "error: entropy_collapse in wild heads 0-3" in lines
    start = lines.index("error: overflow_risk in wild head 0")
    assert "2000" in lines[start + 1] and "QK-clip at 30" in lines[start + 2]
    assert "warning: overflow_risk in wild heads 1-2" in lines
    assert lines[-2:] == ["not measured:", "    other: never ran"]


def issue(layer, head, value, issue_type="overflow_risk", severity="error"):
    return StabilityIssue(layer, head, issue_type, severity, value, 1.0, "s", "e", "f")


def test_groups_keep_the_order_and_start_with_their_worst():
    issues = [
        issue("b", 0, 2.0),
        issue("b", 5, 9.0),
        issue("a", 1, 3.0),
        issue("b", 2, 3.0, severity="warning"),
    ]
    groups = grouped(issues)
    assert [[(i.layer, i.head) for i in group] for group in groups] == [
        [("b", 5), ("b", 0)],
        [("a", 1)],
        [("b", 2)],
    ]
    low = [issue("a", 0, 0.4, "entropy_collapse"), issue("a", 1, 0.1, "entropy_collapse")]
    assert [i.head for i in grouped(low)[0]] == [1, 0]


@pytest.mark.parametrize(
    "heads, text", [([None], ""), ([3], " head 3"), ([7, 0, 1, 2], " heads 0-2, 7"), ([4, 6], " heads 4, 6")]
)
def test_heads_text(heads, text):
    assert heads_text([issue("a", head, 2.0) for head in heads]) == text


def test_plots_are_figures_and_saved(broken, tmp_path):
    for plot in (broken.plot_entropy_heatmap, broken.plot_curvature_evolution):
        assert plot().axes
        path = tmp_path / f"{plot.__name__}.png"
        plot(path)
        assert path.read_bytes().startswith(b"\x89PNG")


def test_plots_without_a_history(tmp_path):
    diagnosis = AttentionDiagnosis(issues=[], stats={"a": head_stats()})
    assert diagnosis.plot_entropy_heatmap().axes and diagnosis.plot_curvature_evolution().axes


def test_a_long_history_is_printed_short():
    layers = {f"blocks.{number}.attention": SHARP | {"heads": 16, "max_logit": 2e3} for number in range(8)}
    first = snapshot(1, **layers)
    diagnosis = diagnose([Snapshot(step, first.layers) for step in range(1, 401)])
    assert len(diagnosis.issues) >= 2 * 8 * 16
    text = repr(diagnosis)
    assert len(text) < 2000 and "\n" not in text
    assert text.startswith(
        "AttentionDiagnosis of step 400: 8 layers, 128 heads; error: overflow_risk (128), "
    )
    assert text.endswith("history of 400 snapshots")
    assert all(len(repr(issue)) < 200 for issue in diagnosis.issues)


def test_a_diagnosis_without_issues_says_so():
    healthy = AttentionDiagnosis(issues=[], stats={"a": head_stats()}, step=3, not_measured={"b": "why"})
    assert repr(healthy) == (
        "AttentionDiagnosis of step 3: 1 layers, 4 heads, 1 layers not measured; no issues; history of 0 snapshots"
    )


def test_an_issue_is_printed_in_one_line():
    assert repr(issue("", 3, 2000.0)) == (
        "StabilityIssue(error: overflow_risk in (the model itself) head 3, value 2000, threshold 1)"
    )
    assert "in a, value" in repr(issue("a", None, 2.0))


def test_the_former_name_of_an_issue_type_becomes_todays():
    assert issue("a", 0, 1.0, "attention_spike").issue_type == "one_hot_attention"
