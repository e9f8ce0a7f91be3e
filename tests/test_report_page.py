"""A report's page: what it packs, how it tells a run, what it lets out of a run's names."""

import base64
import hashlib
import json
import re
import sqlite3
from contextlib import closing

import numpy as np
import pytest
from heads import finished, head_stats, snapshot
from report_parts import Parts, numbers, unpacked

from hnf_attention import report
from hnf_attention.diagnosis import diagnose
from hnf_attention.errors import InputError
from hnf_attention.report.page import (
    compare,
    fixes,
    limits,
    packing,
    runs,
    scalars,
    stories,
    verdict,
)
from hnf_attention.run_log import RunLog, RunLogWriter, metrics
from hnf_attention.run_log.reader import Event

HOSTILE = "</script><img src=x onerror=alert(1)><!--{{script}}&amp;\u2028'\""


def issue(step, change, severity="error", layer="a", head=1, kind="overflow_risk", value=500.0, **more):
    detail = {"layer": layer, "head": head, "issue_type": kind, "severity": severity, "value": value}
    return Event(step, "issue", change, detail | {"threshold": 100.0, "evidence": f"at {step}"} | more)


def done(step, **detail):
    return Event(step, "intervention", None, {"kind": "intervention", "step": step} | detail)


def test_a_story_tells_what_happened_and_whether_the_fix_helped():
    events = [
        issue(10, "new", "note", value=130.0),
        issue(20, "worse", "error", value=300.0),
        issue(20, "new", "error", head=3, value=900.0),
        done(25, action="qk_clip", threshold=30, layers=["a", "b"]),
        done(26, action="prune_heads", layers=["z"]),
        issue(30, "better", "note", value=90.0),
        issue(30, "gone", head=3),
        issue(40, "gone"),
    ]
    (story,) = stories.stories(events)
    assert (story.first, story.alarmed, story.gone, story.severity, story.heads) == (
        10,
        20,
        40,
        "error",
        {1, 3},
    )
    assert story.worst["head"] == 3 and story.worst_step == 20 and not story.open
    told = story.to_dict({"a": 7})
    assert [(x["step"], x["text"]) for x in told["moments"]] == [
        (10, "first sign: note"),
        (20, "worse: error"),
        (20, "more heads: error"),
        (25, "qk clip (threshold 30)"),
        (30, "better: note"),
        (30, "gone"),
        (40, "gone"),
    ]
    assert told["outcome"] == "qk clip at step 25 helped: the issue went at step 40."
    assert told["layer"] == 7 and told["evidence"] == "at 20" and told["spans"] == [[10, 40]]
    found = verdict.verdict(run(), [story])
    assert found.status == "recovered" and "qk clip at step 25 ended it by step 40" in found.sentence


def test_the_evidence_is_of_the_gravest_moment():
    """A graver issue takes the place of a milder one that is further beyond another threshold."""
    (story,) = stories.stories(
        [issue(5, "new", "warning", value=9e3), issue(8, "worse", "error", value=200.0)]
    )
    assert story.worst["evidence"] == "at 8" and story.worst_step == 8 and story.alarmed == 8


def test_what_is_still_grave_comes_first():
    events = [
        issue(1, "new", layer="ended"),
        issue(2, "gone", layer="ended"),
        issue(1, "new", "note", layer="note"),
        issue(3, "new", "warning", layer="open"),
    ]
    assert [story.layer for story in stories.stories(events)] == ["open", "ended", "note"]


def test_an_issue_that_returns_is_open_again():
    events = [issue(10, "new"), issue(20, "gone"), done(25, action="qk_clip"), issue(30, "new")]
    (story,) = stories.stories(events)
    assert story.spans == [[10, 20], [30, None]] and story.gone is None and story.open
    assert story.outcome == "qk clip at step 25 did not end it: the issue is still there."


def test_a_monitor_s_account_is_told_as_deeds_and_findings():
    events = [
        issue(10, "new"),
        done(10, action="qk_clip", outcome="open", text="intervened at step 10: clipped 3 heads"),
        issue(20, "gone"),
        done(
            60,
            action="qk_clip",
            outcome="kept",
            text="at step 60 the intervention of step 10 is kept: no error",
        ),
    ]
    (story,) = stories.stories(events)
    assert [each["step"] for each in story.done] == [10] and [each["step"] for each in story.checks] == [60]
    assert story.outcome == (
        "qk clip at step 10 helped: the issue went at step 20. "
        "Checked later: at step 60 the intervention of step 10 is kept: no error."
    )
    told = story.to_dict({})["moments"]
    assert [(each["step"], each["kind"]) for each in told] == [
        (10, "new"),
        (10, "intervention"),
        (20, "gone"),
        (60, "verification"),
    ]
    assert told[1]["text"] == "qk clip (intervened at step 10: clipped 3 heads)"


def run(**values):
    return runs.Run("run.db", [10, 50], {"a": (4, {})}, values)


@pytest.mark.parametrize(
    ("events", "status", "said"),
    [
        ([], "healthy", "Attention is healthy up to step 50: nothing serious in 4 heads of 1 layer."),
        ([issue(10, "new", "note")], "healthy", "and 1 place is worth a look"),
        (
            [issue(10, "new", "warning")],
            "at risk",
            "in a head 1 began at step 10, and the log has no intervention",
        ),
        (
            [
                issue(5, "new", "error"),
                issue(9, "new", kind="non_finite", layer="b", head=2),
                done(9, action="x"),
            ],
            "failed",
            "NaN or inf in b head 2 began at step 9, and x at step 9 has not ended it (and 1 more issue)",
        ),
        (
            [
                issue(5, "new", "note", layer="b"),
                issue(7, "new"),
                issue(9, "new", kind="non_finite", layer="b"),
            ],
            "failed",
            "NaN or inf in b head 1 began at step 9 after signs from step 5 on, and the log",
        ),
        ([issue(5, "new", "note"), issue(8, "worse", "error")], "at risk", "and was serious from step 8"),
        (
            [issue(5, "new"), done(9, action="x"), done(30, action="x", outcome="kept")],
            "at risk",
            "and x at step 9 holds so far, kept at step 30",
        ),
        ([issue(5, "new"), issue(8, "gone")], "recovered", "and it ended by step 8"),
        (
            [issue(5, "new"), issue(8, "better", "note"), issue(9, "better", "note")],
            "recovered",
            "it eased to a note by step 8",
        ),
        (
            [issue(5, "new"), done(6, action="x"), issue(8, "better", "note")],
            "recovered",
            "x at step 6 eased it to a note by step 8",
        ),
        ([issue(5, "new", layer="", head=None)], "at risk", "in the whole model began at step 5"),
    ],
)
def test_the_verdict_says_where_when_and_what_was_done(events, status, said):
    found = verdict.verdict(run(), stories.stories(events))
    assert found.status == status and said in found.sentence


def test_no_attention_is_no_verdict():
    assert verdict.verdict(runs.Run("x", [1], {}, {}), []).status == "not judged"


def test_fixes_are_code_that_runs_on_public_names():
    import hnf_attention

    for kind, suggestion in (
        ("non_finite", "look"),
        ("overflow_risk", "apply QK-clip at 30 after the optimizer step"),
    ):
        text = fixes.code(kind, suggestion)
        compile(text, "fix", "exec")
        for name in re.findall(r"from hnf_attention import (\w+)", text):
            assert hasattr(hnf_attention, name)
    assert (
        fixes.code("overflow_risk", "apply QK-clip at 30 after the optimizer step if it keeps rising") == ""
    )
    assert fixes.code("one_hot_attention", "watch whether the scores rise") == ""


def test_limits_are_of_statistics_that_a_log_holds():
    assert set(limits._LIMITS) | set(limits._LOW_IS_BAD) | set(limits.SHOWS.values()) <= set(metrics.NAMES)
    assert set(runs.DEFAULT_METRICS) <= set(metrics.NAMES)
    assert [each["value"] for each in limits.limits("logit_range_max")] == [120, 200, 2000, 20000]


def log_of(path, *snapshots, events=(), **about):
    writer = RunLogWriter(path, about=about)
    for taken in snapshots:
        writer.note(taken.step, loss=1.0 / taken.step)
        for kind, detail in events:
            writer.event(taken.step, kind, **detail)
        writer.write(diagnose([taken]))
    writer.close()
    return RunLog(path)


def test_a_page_holds_the_run_and_lets_no_name_out_of_its_text(tmp_path):
    large = {"max_logit": [5.0, 2000.0, 5.0], "heads": 3, "sink_mass": [0.1, 0.5, 0.995]}
    taken = [snapshot(step, **{HOSTILE: large, "b": {"heads": 2, "judged_rows": 0.0}}) for step in (10, 20)]
    with log_of(tmp_path / "run.db", *taken, events=[(HOSTILE, {"x": HOSTILE})], model=HOSTILE) as log:
        page = report.html(log, title=HOSTILE)
        wanted = log.metric("logit_range_max", HOSTILE)
    text = page.text
    parts = Parts(text)
    assert {tag for tag, _ in parts.tags}.isdisjoint({"img", "link", "iframe"})
    outside = re.sub(r"<(script|style).*?</\1>", "", text, flags=re.DOTALL)
    assert (
        "onerror" not in re.sub(r"&[#\w]+;", "", outside).replace("img src=x onerror", "")
        and "<img" not in text
    )
    found = json.loads(parts.scripts["report"])
    assert (
        found["layers"][0]["name"] == HOSTILE and found["runs"][0]["sessions"][0]["run"]["model"] == HOSTILE
    )
    metric = next(each for each in found["metrics"] if each["name"] == "logit_range_max")
    codes = unpacked(parts.scripts["plane-0-logit_range_max"], 2)
    np.testing.assert_allclose(numbers(codes, packing.Scale(**metric["scale"]))[:, :3], wanted, rtol=0.02)
    marks = unpacked(parts.scripts["plane-0-marks"], 2)
    assert marks[0].tolist() == [0, 2, 6, 8, 8]
    assert re.search(r"url\(|https?://(?!github.com/leeoniya)", parts.scripts["style"]) is None


def test_the_policy_admits_the_page_s_own_script_and_style_alone():
    text = report.html(diagnose([snapshot(1, a={})])).text
    parts = Parts(text)
    policy = next(each["content"] for _, each in parts.tags if each.get("http-equiv"))
    for name in ("own", "style"):
        digest = base64.b64encode(hashlib.sha256(parts.scripts[name].encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy and "unsafe" not in policy
    assert not any("style" in each or any(key.startswith("on") for key in each) for _, each in parts.tags)


def test_a_diagnosis_is_a_page_that_shows_itself_in_a_notebook():
    page = report.html(diagnose([finished(step, a={"heads": 2}) for step in (1, 2)]))
    assert (
        page.verdicts[0].sentence == "Attention is healthy at step 2: nothing serious in 2 heads of 1 layer."
    )
    frame = page._repr_html_()
    assert frame.startswith("<iframe") and 'sandbox="allow-scripts"' in frame and frame.count("<") == 2
    assert json.loads(Parts(page.text).scripts["report"])["runs"][0]["steps"] == [1, 2]


def test_a_name_that_utf8_cannot_hold_is_shown_all_the_same(tmp_path):
    broken = {"\ud800": {"nonfinite_rows": 1.0, "nonfinite_out": 1.0}}
    report.html(diagnose([snapshot(1, **broken)])).save(tmp_path / "page.html")
    assert "NaN or inf in ? " in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_numbers_that_json_cannot_hold_are_none(tmp_path):
    log_of(tmp_path / "run.db", snapshot(1, a={})).close()
    with closing(sqlite3.connect(tmp_path / "run.db")) as file, file:
        file.execute('UPDATE sessions SET about = \'{"run": {"rate": NaN}}\'')
    with RunLog(tmp_path / "run.db") as log:
        found = json.loads(Parts(report.html(log).text).scripts["report"])
    assert found["runs"][0]["sessions"][0]["run"]["rate"] is None


def test_two_runs_share_layers_and_scales(tmp_path):
    first = log_of(tmp_path / "a.db", snapshot(10, a={"max_logit": 5.0}), rate=1, same=2)
    second = log_of(
        tmp_path / "b.db",
        snapshot(10, b={"heads": 2}, a={"max_logit": 50.0}),
        snapshot(30, a={}),
        rate=3,
        same=2,
    )
    page = report.html(first, second)
    first.close(), second.close()
    found = json.loads(Parts(page.text).scripts["report"])
    assert [(x["name"], x["start"], x["heads"]) for x in found["layers"]] == [("a", 0, 4), ("b", 4, 2)]
    codes = [unpacked(Parts(page.text).scripts[f"plane-{i}-logit_range_max"], 1 + i)[0] for i in (0, 1)]
    assert (codes[0][:4] < codes[1][:4]).all() and (codes[0][4:] == packing.NO_NUMBER).all()
    rows = {row["name"]: (row["first"], row["second"]) for row in found["comparison"]}
    assert rows["last log step"] == ("10", "30") and rows["run.rate"] == ("1", "3") and "run.same" not in rows
    assert rows["layers that the other has not"] == ("0", "1")
    assert [run["name"] for run in found["runs"]] == ["a.db", "b.db"]


def test_runs_of_one_name_are_told_apart():
    one = diagnose([snapshot(1, a={})])
    found = json.loads(Parts(report.html(one, one).text).scripts["report"])
    assert len({run["name"] for run in found["runs"]}) == 2


def test_a_long_run_is_joined_and_its_extremes_stay(monkeypatch):
    monkeypatch.setattr(runs, "MOST_STEPS", 3)
    history = [snapshot(step, a={"max_logit": 9e3 if step == 2 else 5.0}) for step in range(1, 8)]
    diagnosis = diagnose(history)
    made = runs.of_diagnosis(diagnosis, ["logit_range_max"])
    assert made.steps == [3, 6, 7] and made.joined
    assert made.values["logit_range_max"].max(axis=1).tolist() == [18000, 10, 10]


def test_as_many_statistics_are_held_as_fit():
    assert runs.chosen_metrics(None, 10, 10, 1) == list(runs.DEFAULT_METRICS)
    assert len(runs.chosen_metrics(None, 10**6, 126 * 128, 1)) == 3
    assert runs.chosen_metrics(["key_norm", "key_norm"], 1, 1, 1) == ["key_norm"]


def test_bad_input_is_refused(tmp_path):
    one = diagnose([snapshot(1, a={})])
    with pytest.raises(InputError, match="expected metrics among .*; got nonsense"):
        report.html(one, metrics=["nonsense"])
    with pytest.raises(InputError, match="expected one name for each of 1 runs, got 2"):
        report.html(one, names=["a", "b"])
    RunLogWriter(tmp_path / "empty.db").close()
    with RunLog(tmp_path / "empty.db") as log, pytest.raises(InputError, match="at least one log step"):
        report.html(log)


def test_long_scalars_are_thinned_and_keep_extremes_and_gaps():
    values = np.sin(np.arange(50_000) / 1000)
    values[12_345], values[40_000:] = 99.0, np.nan
    found = scalars.for_page({"loss": (np.arange(50_000), values)})["loss"]
    assert len(found["steps"]) <= 2000 and 99.0 in found["values"] and None in found["values"]
    assert found["steps"][found["values"].index(None)] - 40_000 < 100


def test_a_check_of_an_earlier_deed_is_none_of_the_latest():
    events = [
        issue(10, "new"),
        done(10, action="qk_clip", text="clipped"),
        done(20, action="qk_clip", outcome="kept", text="it helped"),
        done(30, action="qk_clip", text="clipped again"),
    ]
    (story,) = stories.stories(events)
    assert story.outcome == "qk clip at step 30 did not end it: the issue is still there."


def test_layers_that_come_while_a_page_is_made_are_left_for_the_next_one(tmp_path):
    out = RunLogWriter(tmp_path / "run.db")
    out.write(diagnose([snapshot(1, a={})]))
    assert out.flush()

    class Growing(RunLog):
        @property
        def layers(self):
            found = super().layers
            out.write(diagnose([snapshot(2, a={}, b={})]))
            assert out.flush()
            return found

    with Growing(tmp_path / "run.db") as log:
        run = runs.of_log(log, ["key_norm"])
    out.close()
    assert run.steps == [1] and list(run.layers) == ["a"]


def test_a_run_without_a_finite_number_has_a_page():
    nothing = head_stats(2, judged_rows=0.0)
    page = report.html(diagnose([snapshot(1, a=nothing)]), metrics=["normalized_entropy"])
    assert len(json.loads(Parts(page.text).scripts["report"])["metrics"]) == 1


def test_what_differs_is_said_once():
    made = [
        runs.Run("x", [1], {"a": (1, {})}, {"logit_range_max": np.array([[np.nan]])}),
        runs.Run("y", [2], {"a": (1, {})}, {"logit_range_max": np.array([[7.0]])}),
    ]
    rows = compare.comparison(made, [[], []], [verdict.verdict(each, []) for each in made])
    assert {"name": "largest range of scores", "first": "none", "second": "7"} in rows
