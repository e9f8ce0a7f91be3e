"""The diagnosis as a whole: order, groups, JSON, summary, plots."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from heads import head_stats, snapshot

from hnf_attention.diagnosis import AttentionDiagnosis, StabilityIssue, diagnose
from hnf_attention.diagnosis.issue import SEVERITIES, grouped, headline, heads_text
from hnf_attention.diagnosis.measured import HARMED, RESOLVED, harm_text
from hnf_attention.instrumentation import Coverage
from hnf_attention.statistics.heads import Snapshot

SHARP = {"normalized_entropy": 0.02, "max_weight": 0.9, "saturated_share": 0.7, "jacobian_trace_bound": 0.15}


@pytest.fixture
def broken():
    collapsed = SHARP | {
        "heads": 4,
        "max_logit": [2000.0, 150.0, 150.0, 70.0],
        "nonfinite_rows": [0, 0, 0, 1],
        "empty_rows": 1.0,
    }
    history = [snapshot(1, wild=collapsed, calm={})]
    return diagnose(history, Coverage({"wild": "probe"}, {"other": "never ran"}))


def test_errors_come_first_and_worst_kind_before_others(broken):
    severities = [SEVERITIES.index(i.severity) for i in broken.issues]
    assert severities == sorted(severities) and len(set(severities)) == 3
    assert broken.issues[0].issue_type == "non_finite"
    assert broken.errors + broken.warnings + broken.notes == broken.issues
    assert all(i.layer == "wild" for i in broken.issues)


def test_to_dict_is_strict_json(broken):
    text = json.dumps(broken.to_dict(), allow_nan=False)
    read = json.loads(text)
    assert read["healthy"] is False and read["step"] == 1
    assert read["not_measured"] == {"other": "never ran"}
    assert len(read["issues"]) == len(broken.issues)
    assert set(read["issues"][0]) == {
        "layer", "head", "issue_type", "severity", "value", "threshold", "source", "evidence", "suggestion", "headline",
        "measured", "forecast",
    }  # fmt: skip
    layer = read["layers"]["wild"]
    assert layer["max_logit"] == [2000.0, 150.0, 150.0, 70.0]
    assert layer["log2_curvature"][0] == pytest.approx(math.log2(100 / 64) + 2 * math.log2(math.e) * 2000)


def test_numbers_that_are_not_finite_become_null():
    stats = head_stats(query_norm=[np.inf, 1.0, 1.0, 1.0])
    read = json.loads(json.dumps(diagnose([snapshot(1, a=stats)]).to_dict(), allow_nan=False))
    assert read["layers"]["a"]["query_norm"] == [None, 1.0, 1.0, 1.0]


def test_summary_groups_heads_and_ends_with_notes(broken):
    lines = broken.summary().splitlines()
    assert lines[0].startswith(
        "step 1: 2 layers, 8 heads measured, 8 judged over 8,000 rows; 1 error, 6 warnings, 2 notes"
    )
    assert lines[0].endswith(": not healthy")
    assert (
        "error: non_finite in wild head 3" in lines and "warning: entropy_collapse in wild heads 0-2" in lines
    )
    start = lines.index("warning: overflow_risk in wild heads 0-2")
    assert "2000" in lines[start + 1] and "QK-clip at 30" in lines[start + 3]
    assert lines[start + 2] == "    in 81% of such runs the loss suffered (48 of 59 in the laboratory)"
    assert lines[-5] == "note: empty_rows in wild"
    assert lines[-2:] == ["not measured:", "    other: never ran"]


def test_severities_say_how_often_they_meant_harm_of_models_in_training(broken):
    """Those of growing heads: NaN is a fact, a note is none, and of finished models nothing was counted."""
    kinds = {(i["severity"], i["issue_type"]): i["measured"] for i in broken.to_dict()["issues"]}
    assert kinds["error", "non_finite"] is None
    assert (
        kinds["warning", "overflow_risk"]
        == "in 81% of such runs the loss suffered (48 of 59 in the laboratory)"
    )
    assert all(text is None for (severity, _), text in kinds.items() if severity == "note")
    (last,) = broken.history
    finished = diagnose([replace(last, training=False)])
    assert not any(issue["measured"] for issue in finished.to_dict()["issues"])
    assert "the laboratory" not in finished.summary() and "the laboratory" in broken.summary()


def test_what_was_counted_is_in_one_table_with_its_source():
    assert set(HARMED) == {"error", "warning"} and all(0 < x.count <= x.total for x in HARMED.values())
    assert all("docs/validation.md" in x.source for x in (*HARMED.values(), *RESOLVED.values()))
    assert HARMED["error"].share == "88%" and harm_text("error", "empty_rows") == ""
    page = Path(__file__).parents[1] / "docs" / "validation.md"
    if not page.is_file():
        pytest.skip("the documentation is in the checkout only")
    text = page.read_text()
    for count in (*HARMED.values(), *RESOLVED.values()):  # the page and the table agree
        assert f"{count.count} of {count.total}" in text, count


# What was judged


def test_heads_that_were_not_judged_are_counted_and_leave_the_verdict_open():
    few = {"heads": 8, "judged_rows": 0.0, "normalized_entropy": 0.0}
    diagnosis = diagnose([snapshot(10, a={}, b=few, c={"rows": 0.0, "judged_rows": 0.0, "empty_rows": 9.0})])
    assert diagnosis.summary().splitlines()[0] == (
        "step 10: 3 layers, 16 heads measured, 4 judged over 4,000 rows; 8 heads not judged: fewer than 16 keys; "
        "4 heads not judged: no row with a visible key; 0 errors, 0 warnings, 1 note: no error, but not everything was "
        "judged"
    )
    assert diagnosis.healthy is None and diagnosis.to_dict()["healthy"] is None
    assert json.loads(json.dumps(diagnosis.to_dict(), allow_nan=False))["healthy"] is None


def test_rows_that_were_left_out_are_said():
    first = diagnose([snapshot(1, a={"left_out_rows": 300.0})]).summary()
    assert "4 judged over 4,000 rows (1,200 rows left out as padding or by a query mask); " in first


def test_a_layer_that_was_not_measured_leaves_the_verdict_open():
    history, missed = [snapshot(1, a={})], Coverage({"a": "probe"}, {"b": "never ran"})
    assert diagnose(history).healthy is True and diagnose(history, missed).healthy is None
    assert diagnose([snapshot(1, a={"max_logit": 2e3})], missed).healthy is False


def test_notes_raise_no_alarm():
    diagnosis = diagnose([snapshot(1, a={"empty_rows": 1.0})])
    assert (
        diagnosis.notes == diagnosis.issues != [] and not diagnosis.has_issues() and diagnosis.healthy is True
    )


# Thresholds of the caller


def test_thresholds_of_the_caller_decide_and_are_told():
    history = [snapshot(s, a={"max_logit": 70.0}) for s in range(1, 4)]
    assert not diagnose(history).has_issues()
    (issue, *_) = diagnose(history, thresholds={"clip_logit": 65}).issues
    assert issue.severity == "warning" and issue.threshold == 65.0 and "caller" in issue.source
    assert not diagnose(history).has_issues()  # for that call only
    assert diagnose(history, thresholds={"watch_logit": 71.0}).issues == []
    assert diagnose(history, thresholds={}).issues == diagnose(history).issues


@pytest.mark.parametrize(
    "thresholds, words",
    [
        ({"clip_logits": 1.0}, "got 'clip_logits'; the nearest are clip_logit, "),
        ({"": 1.0}, "the nearest are "),
        ({"clip_logit": "1"}, "'clip_logit' to be a finite number, got '1'"),
        ({"clip_logit": True}, "got True"),
        ({"clip_logit": math.nan}, "got nan"),
        ([20], "expected thresholds to be a dict of numbers by name, got list"),
    ],
)
def test_other_thresholds_are_refused(thresholds, words):
    with pytest.raises(ValueError, match=words):
        diagnose([snapshot(1, a={})], thresholds=thresholds)


# Issues


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


def test_a_headline_names_the_heads_and_fits_a_line():
    one = replace(
        issue("blocks.1", 2, 3.0), brief="scores range 413, doubling every 12 steps -> QK-clip at 30"
    )
    assert one.headline == "blocks.1 head 2: scores range 413, doubling every 12 steps -> QK-clip at 30"
    group = [one, replace(one, head=0), replace(one, head=1)]
    assert headline(group).startswith("blocks.1 heads 0-2: scores range 413")
    scattered = headline([replace(one, head=head) for head in range(0, 80, 2)])
    assert scattered.startswith("blocks.1 40 heads: scores range 413")
    long = replace(one, layer="very." * 40 + "last", brief=f"{'word ' * 60}-> mend it").headline
    assert len(long) <= 160 and long.startswith("...") and ".last head 2: word" in long
    assert long.endswith(" ... -> mend it")


def test_an_issue_of_an_older_version_has_a_headline_too():
    assert issue("a", 0, 2.0).headline == "a head 0: overflow risk"


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
