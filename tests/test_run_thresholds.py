"""Thresholds that a run sets: its log keeps them, its report draws them."""

import json
import sqlite3
from contextlib import closing

import pytest
import torch
from heads import snapshot
from report_parts import Parts, unpacked

from hnf_attention import report
from hnf_attention.cli.main import main
from hnf_attention.diagnosis import diagnose
from hnf_attention.diagnosis.thresholds import THRESHOLDS
from hnf_attention.monitoring import monitor
from hnf_attention.report.page import limits
from hnf_attention.run_log import RunLog, RunLogWriter, export, writer
from hnf_attention.run_log.recording import Recording

WATCH = {"watch_logit": 40.0}


@pytest.fixture(params=["database", "fragments"])
def kind(request, monkeypatch):
    if request.param == "fragments":
        monkeypatch.setattr(writer, "network_file_system", lambda folder: "nfs4")
    return request.param


def at(step, thresholds=None, **about):
    return diagnose([snapshot(step, a={"heads": 2} | about)], thresholds=thresholds)


def write(path, *written):
    out = RunLogWriter(path)
    for diagnosis in written:
        out.write(diagnosis)
    out.close()
    return path


def told(path):
    with RunLog(path) as log:
        found = [(each.step, each.detail["values"]) for each in log.events if each.kind == "thresholds"]
        return found, log.thresholds


def lines(page, metric):
    found = json.loads(Parts(page.text).scripts["report"])
    (own,) = [each["limits"] for each in found["metrics"] if each["name"] == metric]
    return {each["name"]: (each["value"], each["source"]) for each in own}


def test_a_log_keeps_the_thresholds_that_differ_and_when_they_change(tmp_path, kind):
    as_table = {name: entry.value for name, entry in THRESHOLDS.items()}
    same = write(tmp_path / "same.db", at(10), at(20, as_table))
    assert told(same) == ([], {})
    steps = at(10, as_table | WATCH), at(20, WATCH), at(30), at(40, {"sink_mass": 0.5})
    path = write(tmp_path / "run.db", *steps)
    assert told(path) == ([(10, WATCH), (30, {}), (40, {"sink_mass": 0.5})], {"sink_mass": 0.5})


def test_a_resumed_run_tells_its_thresholds_once(tmp_path, kind):
    path = write(tmp_path / "run.db", at(10, WATCH), at(20, WATCH))
    write(path, at(20, WATCH), at(30, WATCH))
    assert told(path) == ([(10, WATCH)], WATCH)
    write(path, at(40))  # from now on the default ones
    write(path, at(50))
    assert told(path) == ([(10, WATCH), (40, {})], {})
    write(path, at(5, WATCH))  # all anew
    assert told(path) == ([(5, WATCH)], WATCH)


def test_a_process_that_does_its_first_log_step_again_keeps_its_thresholds(tmp_path, kind):
    path = write(tmp_path / "run.db", at(10, WATCH), at(20, WATCH), at(5, WATCH), at(10, WATCH))
    assert told(path) == ([(5, WATCH)], WATCH)


def test_a_monitor_s_thresholds_stay_while_judging_fails(tmp_path, monkeypatch):
    layer = torch.nn.MultiheadAttention(8, 2, batch_first=True)
    x = torch.randn(1, 20, 8)
    judge, calls = monitor.diagnose, []

    def second_fails(*given):
        calls.append(given)
        if len(calls) == 2:
            raise ZeroDivisionError("on purpose")
        return judge(*given)

    monkeypatch.setattr(monitor, "diagnose", second_fails)
    out = RunLogWriter(tmp_path / "run.db")
    watching = monitor.AttentionStabilityMonitor(layer, log_every=1, thresholds=WATCH, writers=[out])
    for _ in range(4):
        layer(x, x, x)[0].sum().backward()
        watching.on_step()
    watching.restore()
    out.close()
    assert len(calls) >= 3 and told(tmp_path / "run.db") == ([(1, WATCH)], WATCH)


@pytest.mark.parametrize("told_by_itself", ["thresholds", "issue"])
def test_an_event_of_a_kind_that_log_steps_tell_is_refused(tmp_path, told_by_itself):
    out = RunLogWriter(tmp_path / "run.db")
    with pytest.raises(ValueError, match="expected another kind of event than issue and thresholds, got"):
        out.event(12, told_by_itself, values=7)
    out.close()


def test_every_log_step_tells_its_thresholds_for_another_may_be_lost():
    recording = Recording()
    for step, own in ((10, WATCH), (20, WATCH), (30, {})):
        (event,) = recording.record(at(step, own), 0.0).events
        assert event == {"kind": "thresholds", "step": step, "values": own}


@pytest.mark.parametrize(
    "text", ["[", "7", '{"values": [1]}', '{"values": {"watch_logit": %s}}' % ("9" * 400)]
)
def test_a_damaged_account_counts_as_none(tmp_path, text):
    path = write(tmp_path / "run.db", at(10, WATCH))
    with closing(sqlite3.connect(path)) as file, file:
        file.execute("UPDATE events SET detail = ? WHERE kind = 'thresholds'", (text,))
    with RunLog(path) as log:
        assert log.thresholds == {}


def test_every_reader_takes_a_log_with_thresholds(tmp_path, capsys):
    path = write(tmp_path / "run.db", at(10, WATCH), at(20))
    with RunLog(path) as log:
        export.to_jsonl(log, tmp_path / "run.jsonl")
        page = report.html(log)
    exported = [json.loads(line) for line in (tmp_path / "run.jsonl").read_text().splitlines()]
    wanted = {"kind": "thresholds", "step": 10, "change": None, "values": WATCH}
    assert wanted in exported
    assert main(["watch", str(path), "--once"]) == 0
    assert "thresholds: values {'watch_logit': 40.0}" in capsys.readouterr().out
    (run,) = json.loads(Parts(page.text).scripts["report"])["runs"]
    assert [each["text"] for each in run["actions"]] == [
        "thresholds (watch_logit 40)",
        "thresholds (the default ones)",
    ]


def test_a_report_draws_the_thresholds_of_the_run(tmp_path):
    path = write(tmp_path / "run.db", at(10, {"alarm_logit": 70.0}), at(20, WATCH))
    with RunLog(path) as log:
        pages = report.html(log), report.html(at(20, WATCH))
    for page in pages:
        found = lines(page, "logit_range_max")
        assert found["watch"] == (80.0, "set by this run: watch_logit 40 to either side")
        assert found["alarm"] == (200.0, THRESHOLDS["alarm_logit"].source)  # the latest ones count


def test_marks_are_by_the_thresholds_of_the_run(tmp_path):
    heads = {"sink_mass": [0.5, 0.8]}
    others = {"sink_mass": 0.6, "dormant_sink": 0.7}
    path = write(tmp_path / "run.db", at(10, others, **heads))
    with RunLog(path) as log:
        parts = Parts(report.html(log, at(10, **heads)).text)
    marks = [unpacked(parts.scripts[f"plane-{number}-marks"], 1)[0].tolist() for number in (0, 1)]
    assert marks == [[0, 2 | 4], [2, 2]]


def test_a_line_that_differs_is_drawn_for_each_run(tmp_path):
    first = at(10, {"watch_logit": 40.0, "alarm_logit": 70.0})
    page = report.html(first, at(10, {"alarm_logit": 70.0}), names=["run-a", "run-b"])
    found = lines(page, "logit_range_max")
    assert list(found) == ["watch, run-a", "watch, run-b", "alarm", "loss suffers", "diverges"]
    assert (
        found["watch, run-a"] == (80.0, "set by this run: watch_logit 40 to either side")
        and found["watch, run-b"][0] == 120.0
    )
    assert found["alarm"] == (140.0, "set by this run: alarm_logit 70 to either side")
    rows = {row["name"]: row for row in json.loads(Parts(page.text).scripts["report"])["comparison"]}
    assert rows["threshold.watch_logit"] == {
        "name": "threshold.watch_logit",
        "first": "40.0",
        "second": "not given",
    }
    assert "threshold.alarm_logit" not in rows


def test_a_threshold_past_all_numbers_has_no_line():
    names = [each["name"] for each in limits.limits("logit_range_max", [("a", {"watch_logit": 1.7e308})])]
    assert names == ["alarm", "loss suffers", "diverges"]
