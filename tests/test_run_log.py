"""What a run log holds is what was written: in a database, in fragments, after a restart and while it grows."""

import json
import logging
import sqlite3

import numpy as np
import pytest
import torch
from heads import diagnoses, head_stats, snapshot
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from hnf_attention import errors
from hnf_attention.diagnosis import AttentionDiagnosis, diagnose
from hnf_attention.run_log import (
    BadLog,
    RunLog,
    RunLogWriter,
    blocks,
    database,
    fragments,
    metrics,
    writer,
)


@pytest.fixture(params=["database", "fragments"])
def kind(request, monkeypatch):
    if request.param == "fragments":
        monkeypatch.setattr(writer, "network_file_system", lambda folder: "nfs4")
    return request.param


def write(path, written, **options):
    out = RunLogWriter(path, **options)
    for diagnosis in written:
        out.write(diagnosis)
    out.close()


def at(step, **layers):
    return diagnose([snapshot(step, **layers)])


def test_everything_is_read_back(tmp_path, kind):
    path, written = tmp_path / "run.db", diagnoses()
    with_numbers = RunLogWriter(path, about={"model": "tiny"})
    for diagnosis in written:
        with_numbers.note(diagnosis.step, loss=1 / diagnosis.step, grad_norm=float("nan"))
        with_numbers.event(diagnosis.step, "intervention", action="qk_clip", factor=np.float32(0.5))
        with_numbers.write(diagnosis)
    assert with_numbers.flush()
    with RunLog(path) as log:
        assert log.steps.tolist() == [x.step for x in written]
        assert log.layers == {name: stats.num_heads for name, stats in written[0].stats.items()}
        for name in metrics.NAMES:
            for layer in log.layers:
                wanted = [getattr(x.stats[layer], name) for x in written]
                np.testing.assert_allclose(log.metric(name, layer), wanted, rtol=2**-12, err_msg=name)
        steps, values = log.scalars()["loss"]
        assert steps.tolist() == [10, 20, 30] and values.tolist() == [1 / 10, 1 / 20, 1 / 30]
        assert np.isnan(log.scalars()["grad_norm"][1]).all()
        happened = [event for event in log.events if event.kind == "intervention"]
        assert [(x.step, x.detail["action"], x.detail["factor"]) for x in happened] == [
            (step, "qk_clip", 0.5) for step in (10, 20, 30)
        ]
        changes = [(event.step, event.change) for event in log.events if event.kind == "issue"]
        assert changes == [(10, "new")] * len(written[0].issues)
        assert log.events[0].detail["evidence"] == written[0].issues[0].evidence
        (session,) = log.sessions
        assert session["run"] == {"model": "tiny"} and session["environment"]["versions"]["torch"]
    with_numbers.close()


def test_what_comes_after_the_last_log_step_is_kept(tmp_path, kind):
    out = RunLogWriter(tmp_path / "run.db")
    out.note(9, loss=2.0)
    out.event(9, "intervention", action="first")
    out.write(diagnoses()[0])
    out.note(12, loss=1.0)
    out.event(12, "intervention", action="second")
    out.close()
    with RunLog(tmp_path / "run.db") as log:
        assert log.steps.tolist() == [10]
        assert log.scalars()["loss"][1].tolist() == [2.0, 1.0]
        done = [event for event in log.events if event.kind == "intervention"]
        assert [(event.step, event.detail["action"]) for event in done] == [(9, "first"), (12, "second")]
        assert {event.step for event in log.events if event.kind == "issue"} == {10}


def test_a_run_without_a_log_step_keeps_its_numbers(tmp_path, kind):
    out = RunLogWriter(tmp_path / "run.db")
    out.note(2, loss=3.0)
    out.note(3, loss=2.0)
    out.event(2, "intervention", action="first")
    out.close()
    with RunLog(tmp_path / "run.db") as log:
        assert log.steps.tolist() == [] and log.layers == {} and log.issues == [] and not list(log.records())
        assert [x.tolist() for x in log.scalars()["loss"]] == [[2, 3], [3.0, 2.0]]
        assert [(event.step, event.detail["action"]) for event in log.events] == [(2, "first")]
        assert len(log.sessions) == 1
    write(tmp_path / "run.db", diagnoses())  # the run begins anew, or goes on
    with RunLog(tmp_path / "run.db") as log:
        assert log.steps.tolist() == [10, 20, 30] and log.scalars()["loss"][0].tolist() == [2, 3]


def test_what_happens_while_a_log_step_waits_is_kept(tmp_path, kind):
    out = RunLogWriter(tmp_path / "run.db")
    first, second, _ = diagnoses()
    out.event(12, "intervention", action="early")  # before the thread has written step 10
    out.write(first)
    out.write(second)
    out.close()
    with RunLog(tmp_path / "run.db") as log:
        assert [event.step for event in log.events if event.kind == "intervention"] == [12]


def test_a_resumed_run_that_notes_less_replaces_all_that_it_does_again(tmp_path, kind):
    path = tmp_path / "run.db"
    for noted, value in ((range(1, 31), 1.0), ((12, 22), 2.0)):  # at last from a checkpoint after step 11
        out = RunLogWriter(path)
        for step in noted:
            out.note(step, loss=value)
        out.note(0, parameters=value)
        for step in (10, 15, 30) if value == 1.0 else (30,):
            out.write(at(step, a={}))
        out.close()
    with RunLog(path) as log:
        assert log.steps.tolist() == [10, 30] and log.scalars()["parameters"][1].tolist() == [2.0]
        steps, values = log.scalars()["loss"]
        assert steps.tolist() == [*range(1, 12), 12, 22] and values.tolist() == [1.0] * 11 + [2.0] * 2


def test_what_is_added_to_a_run_that_was_leaves_the_rest(tmp_path, kind):
    path = tmp_path / "run.db"
    write(path, diagnoses())
    with RunLog(path) as log:
        told = [event for event in log.events]
    for action in ("first", "second"):
        out = RunLogWriter(path)
        out.event(15, "remark", action=action)
        out.note(0, parameters=1.0)
        out.close()
    with RunLog(path) as log:
        assert log.steps.tolist() == [10, 20, 30]
        assert [event for event in log.events if event.kind == "issue"] == told
        assert [x.detail["action"] for x in log.events if x.kind == "remark"] == ["first", "second"]


def test_log_steps_without_layers_keep_their_events(tmp_path, kind):
    out = RunLogWriter(tmp_path / "run.db")
    for step in (10, 20, 30):
        out.event(step, "checkpoint")
        out.write(AttentionDiagnosis([], {}, step))
    out.close()
    with RunLog(tmp_path / "run.db") as log:
        assert [event.step for event in log.events] == [10, 20, 30]


def test_numbers_of_other_libraries_are_steps(tmp_path, kind):
    out = RunLogWriter(tmp_path / "run.db")
    out.note(np.int64(9), loss=1.0)
    out.event(torch.tensor(9), "checkpoint")
    out.write(diagnoses()[0])
    for tell in (lambda: out.note(9.5, loss=1.0), lambda: out.event("9", "checkpoint")):
        with pytest.raises(TypeError):
            tell()
    out.close()
    with RunLog(tmp_path / "run.db") as log:
        assert log.steps.tolist() == [10] and log.scalars()["loss"][0].tolist() == [9]
        assert [event.step for event in log.events if event.kind == "checkpoint"] == [9]


def test_a_first_log_step_is_written_where_earlier_issues_cannot_be_read(tmp_path, monkeypatch, caplog):
    def busy(*_):
        raise sqlite3.OperationalError("database is locked")

    monkeypatch.setattr(database, "active_issues", busy)
    monkeypatch.setattr(errors, "_reported", set())
    write(tmp_path / "run.db", diagnoses())
    with RunLog(tmp_path / "run.db") as log:
        assert log.steps.tolist() == [10, 20, 30]
    assert "could not be read, and count as new" in caplog.text


def test_issues_come_and_go(tmp_path):
    steps = [at(step, a={"max_logit": 2000.0 if step < 5 else 5.0}) for step in range(1, 12)]
    write(tmp_path / "run.db", steps)
    with RunLog(tmp_path / "run.db") as log:
        assert {event.change for event in log.events} == {"new", "gone"} and not log.issues
    write(tmp_path / "other.db", steps[:4])
    with RunLog(tmp_path / "other.db") as log:
        assert {issue["layer"] for issue in log.issues} == {"a"}


def test_a_resumed_run_goes_on_without_duplicates(tmp_path, kind):
    path = tmp_path / "run.db"
    first = RunLogWriter(path)
    for step in range(10, 60, 10):
        first.note(step - 5, loss=1.0)
        first.note(step, loss=1.0)
        first.write(at(step, a={"max_logit": 2000.0}))
    first.close()
    second = RunLogWriter(path)
    for step in (30, 40):  # from a checkpoint after step 25
        second.note(step, loss=2.0)
        second.write(at(step, a={"max_logit": 2000.0}))
    second.close()
    with RunLog(path) as log:
        assert log.steps.tolist() == [10, 20, 30, 40] and len(log.sessions) == 2
        steps, values = log.scalars()["loss"]
        assert steps.tolist() == [5, 10, 15, 20, 25, 30, 40]
        assert values.tolist() == [1, 1, 1, 1, 1, 2, 2]
        if kind == "database":  # the issues were there before
            assert [event.step for event in log.events] == [10] * len(log.issues)


def test_fragments_are_taken_in_once_and_half_lines_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "network_file_system", lambda folder: "lustre")
    path = tmp_path / "run.db"
    write(path, diagnoses())
    (file,) = fragments.folder_of(path).iterdir()
    assert not path.exists()
    with RunLog(path) as log:
        events = log.events
        log.refresh()
        assert log.events == events and log.steps.tolist() == [10, 20, 30]
    file.write_bytes(file.read_bytes()[:-50])
    with RunLog(path) as log:
        assert log.steps.tolist() == [10, 20]


def test_it_is_read_while_it_grows(tmp_path):
    out = RunLogWriter(tmp_path / "run.db")
    with RunLog(tmp_path / "run.db") as log:
        assert not len(log.steps) and not log.issues and not log.not_measured
        for count, diagnosis in enumerate(diagnoses(), 1):
            out.write(diagnosis)
            assert out.flush() and len(log.steps) == count
        assert [record.step for record in log.records(after=10)] == [20, 30]
    out.close()
    out.write(diagnoses()[2])  # as a second training with the same writer does
    out.close()
    with RunLog(tmp_path / "run.db") as log:
        assert log.steps.tolist() == [10, 20, 30] and len(log.sessions) == 2


@pytest.mark.slow
def test_a_large_log_is_thinned_and_keeps_its_extremes(tmp_path):
    path, rng = tmp_path / "run.db", np.random.default_rng(0)
    peaks = rng.uniform(1, 50, 300).astype(np.float32)
    peaks[17] = 1e6
    spread = rng.uniform(0.5, 1, (300, 96))
    stats = [{"a": head_stats(96, max_logit=peak, normalized_entropy=x)} for peak, x in zip(peaks, spread)]
    write(path, [AttentionDiagnosis([], x, step) for step, x in enumerate(stats, 1)], max_bytes=1 << 17)
    assert path.stat().st_size < 1 << 18
    with RunLog(path) as log:
        steps = log.steps
        assert 10 < len(steps) < 250 and steps[-1] == 300
        assert steps[-20:].tolist() == list(range(281, 301))  # the young ones are whole
        largest = log.metric("max_logit", "a").max(1)
        for record, value in zip(log.records(), largest):
            part = peaks[record.first_step - 1 : record.step]
            assert value == pytest.approx(part.max(), rel=2**-12)
        assert sum(record.step - record.first_step + 1 for record in log.records()) == 300


def test_a_disk_that_is_full_for_a_while_costs_nothing(tmp_path, caplog, monkeypatch):
    out = RunLogWriter(tmp_path / "run.db")
    add, full = database.add, []

    def limited(*args):
        if full:
            raise sqlite3.OperationalError("database or disk is full")
        add(*args)

    monkeypatch.setattr(database, "add", limited)
    first, second, third = diagnoses()
    with caplog.at_level(logging.WARNING, "hnf_attention"):
        full.append(True)
        out.write(first)
        out.write(second)
        assert not out.flush() and "2 waiting" in repr(out)
        full.clear()
        out.write(third)
        assert out.flush() and "3 log steps written" in repr(out)
    out.close()
    assert [record.getMessage().partition(" (")[0] for record in caplog.records] == [
        "the run log cannot be written now",
        "the run log is written again",
    ]
    with RunLog(tmp_path / "run.db") as log:
        assert log.steps.tolist() == [10, 20, 30]


def test_what_waits_has_a_bound(tmp_path, caplog, monkeypatch):
    def add(*_):
        raise OSError("away")

    monkeypatch.setattr(database, "add", add)
    monkeypatch.setattr(writer, "MOST_WAITING", 2)
    out = RunLogWriter(tmp_path / "run.db")
    for diagnosis in (*diagnoses(), *diagnoses()):
        out.write(diagnosis)
    assert not out.flush() and "2 waiting" in repr(out)
    out.close()
    assert "2 log steps that could not be written" in caplog.records[-1].getMessage()


numbers = arrays.arrays(
    np.float32, st.tuples(st.integers(0, 5), st.integers(0, 7)), elements=st.floats(width=32)
)


@settings(max_examples=30, deadline=None)
@given(numbers)
def test_blocks_keep_every_number(table):
    found = blocks.decode(blocks.encode(table), *table.shape)
    np.testing.assert_array_equal(np.isnan(found), np.isnan(table))
    whole = np.isfinite(table) & (np.abs(table) > 1e-37)
    np.testing.assert_array_equal(found[np.isinf(table)], table[np.isinf(table)])
    np.testing.assert_allclose(found[whole], table[whole], rtol=2**-12)
    assert np.abs(found[~whole & np.isfinite(table)]).max(initial=0) <= 1.01e-37


@pytest.mark.parametrize("change", ["cut", "longer", "other", "huge"])
def test_damaged_blocks_are_refused(change):
    block = blocks.encode(np.ones((3, 4), np.float32))
    rows = 1 << 40 if change == "huge" else 3
    block = {
        "cut": block[:-9],
        "longer": blocks.encode(np.ones((300, 400), np.float32)),
        "other": b"no block",
    }.get(change, block)
    with pytest.raises(BadLog, match="expected"):
        blocks.decode(block, rows, 4)


@pytest.mark.parametrize("content", [b"no database at all, but a text" * 99, "other", "newer"])
def test_files_that_are_no_run_log_are_left_alone(tmp_path, content):
    path = tmp_path / "run.db"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        with sqlite3.connect(path) as connection:
            connection.execute("CREATE TABLE mine (x)")
            if content == "newer":
                connection.execute(f"PRAGMA application_id = {database.APPLICATION}")
                connection.execute(f"PRAGMA user_version = {database.VERSION + 1}")
        connection.close()
    before = path.read_bytes()
    for use in (RunLog, RunLogWriter):
        with pytest.raises(BadLog, match="expected a run log"):
            use(path)
    assert path.read_bytes() == before


def test_hostile_contents_are_refused(tmp_path):
    path = tmp_path / "run.db"
    write(path, diagnoses())
    for table, column, value in (
        ("snapshots", "block", b"\x00" * 9),
        ("snapshots", "forwards", "[]"),
        (
            "layouts",
            "described",
            json.dumps({"metrics": ["max_logit"], "layers": [["a", 1 << 60, 1, "x", 1]]}),
        ),
        ("layouts", "described", "[" * 100_000),
        ("snapshots", "not_measured", "7"),
    ):
        with sqlite3.connect(path) as connection:
            (kept,) = connection.execute(f"SELECT {column} FROM {table}").fetchone()
            connection.execute(f"UPDATE {table} SET {column} = ?", (value,))
        with RunLog(path) as log, pytest.raises(BadLog):
            log.not_measured  # noqa: B018
            log.metric("max_logit", next(iter(log.layers)))
        with sqlite3.connect(path) as connection:
            connection.execute(f"UPDATE {table} SET {column} = ?", (kept,))
        connection.close()


def test_there_has_to_be_a_log(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing.db"):
        RunLog(tmp_path / "nothing.db")
    with pytest.raises(ValueError, match="max_bytes to be an int >= 1, got 0"):
        RunLogWriter(tmp_path / "run.db", max_bytes=0)
    with pytest.raises(TypeError, match="expected about to be a dict, got str"):
        RunLogWriter(tmp_path / "run.db", about="7B")
    (tmp_path / "run.db").mkdir()
    with pytest.raises(OSError, match=r"expected a run log, got the folder .*run.db"):
        RunLogWriter(tmp_path / "run.db")
    with pytest.raises(BadLog, match=r"expected a run log, got the folder .*run.db"):
        RunLog(tmp_path / "run.db")
