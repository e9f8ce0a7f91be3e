"""What a monitor hands to writers that keep more than diagnoses."""

import gc
import logging
import os
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import pytest
import torch
from attention_models import Model, x
from torch._subclasses import FakeTensorMode

from hnf_attention import AttentionStabilityMonitor
from hnf_attention.monitoring.notes import Notes
from hnf_attention.run_log import RunLog, RunLogWriter


class Keeper:
    def __init__(self):
        self.notes, self.events = [], []

    def write(self, diagnosis):
        self.notes.append(diagnosis.step)

    def note(self, step, **scalars):
        self.notes.append((step, scalars))

    def event(self, step, kind, **detail):
        self.events.append((step, kind, detail))


def test_losses_reach_a_run_log(tmp_path):
    model, out = Model(), RunLogWriter(tmp_path / "run.db")
    with AttentionStabilityMonitor(model, log_every=2, writers=[out]) as monitor:
        for step in range(1, 6):
            loss = model(x()).sum()
            loss.backward()
            monitor.on_step(loss=loss.detach() * 0 + step, grad_norm=None if step == 3 else step / 2)
    with RunLog(tmp_path / "run.db") as log:
        assert log.steps.tolist() == [2, 4]
        steps, values = log.scalars()["loss"]
        assert steps.tolist() == [1, 2, 3, 4, 5] and values.tolist() == [1, 2, 3, 4, 5]
        assert log.scalars()["grad_norm"][0].tolist() == [1, 2, 4, 5]


def test_they_come_before_the_diagnosis_and_are_copies():
    keeper, loss = Keeper(), torch.tensor(1.0)
    model = Model()
    with AttentionStabilityMonitor(model, log_every=2, writers=[keeper]) as monitor:
        for _ in range(2):
            model(x()).sum().backward()
            monitor.on_step(loss)
            loss.add_(1.0)  # as a replay of a CUDA graph writes over it
    assert keeper.notes == [(1, {"loss": 1.0}), (2, {"loss": 2.0}), 2]


def test_a_run_that_ends_before_its_first_log_step_keeps_its_losses(tmp_path):
    out = RunLogWriter(tmp_path / "run.db")
    monitor = AttentionStabilityMonitor(Model(), writers=[out])
    for step in (1, 2):
        monitor.on_step(loss=torch.tensor(1.0 / step))
    del monitor  # as at the end of a process that never called restore()
    gc.collect()
    out.close()
    with RunLog(tmp_path / "run.db") as log:
        assert [x.tolist() for x in log.scalars()["loss"]] == [[1, 2], [1.0, 0.5]]


class Run:
    """What holds itself, as a trainer does whose callbacks know it."""

    def __init__(self, out, model):
        self.monitor = AttentionStabilityMonitor(model, log_every=2, writers=[out], on_alert=self.alert)

    def alert(self, issues):
        pass


@pytest.mark.parametrize("kept", [True, False], ids=["the writer is kept", "the writer goes, too"])
@pytest.mark.parametrize("steps", [1, 3], ids=["before the first log step", "after one"])
def test_a_monitor_in_a_reference_cycle_keeps_its_losses(tmp_path, kept, steps):
    model, out = Model(), RunLogWriter(tmp_path / "run.db")
    writers = [out] if kept else []
    run = Run(out, model)
    out.event(1, "told at first")
    for step in range(1, steps + 1):
        model(x()).sum().backward()
        run.monitor.on_step(loss=torch.tensor(1.0 / step))
    out.event(steps, "told at last")
    del run, out
    with torch.device("meta"), FakeTensorMode():  # which the collector may interrupt
        gc.collect()
    for writer in writers:
        writer.close()
    assert not [thread for thread in threading.enumerate() if "run log" in thread.name]
    with RunLog(tmp_path / "run.db") as log:
        assert log.scalars()["loss"][0].tolist() == list(range(1, steps + 1))
        told = [(event.step, event.kind) for event in log.events if event.kind.startswith("told")]
        assert told == [(1, "told at first"), (steps, "told at last")]
        assert len(log.steps) == steps // 2 and len(log.sessions) == 1


def test_a_monitor_that_its_writer_knows_goes_away_with_it():
    keeper = Keeper()
    keeper.monitor = AttentionStabilityMonitor(Model(), writers=[keeper])
    gone = weakref.ref(keeper.monitor)
    del keeper
    gc.collect()
    assert gone() is None


class Broken(Keeper):
    def note(self, *_, **__):
        raise OSError("on purpose")

    event = note


def test_a_writer_that_fails_keeps_nothing_from_the_others():
    class Done:
        intervention, outcome, account = {"action": "qk_clip"}, "open", ["clipped"]

    before, after = Keeper(), Keeper()
    notes = Notes([before, Broken(), after])
    for tell in (notes.hand_over, lambda: notes.account(1, [Done])):
        notes.keep(1, {"loss": 1.0, "grad_norm": torch.tensor(2.0)})
        with pytest.raises(OSError):
            tell()
    notes.account(2, [Done])  # which was told
    for each in (before, after):
        assert each.notes == [(1, {"loss": 1.0}), (1, {"grad_norm": 2.0})] and len(each.events) == 1


REUSED = """
import sys
from attention_models import Model, x
from hnf_attention import AttentionStabilityMonitor
from hnf_attention.run_log import RunLogWriter

out, model = RunLogWriter(sys.argv[1]), Model()
with AttentionStabilityMonitor(model, log_every=2, writers=[out]):
    pass
monitor = AttentionStabilityMonitor(model, log_every=2, writers=[out])
for step in range(3):
    model(x()).sum().backward()
    monitor.on_step(loss=1.0)
"""


@pytest.mark.slow
def test_a_writer_that_was_closed_once_ends_after_its_next_monitor(tmp_path):
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    run = [sys.executable, "-c", REUSED, str(tmp_path / "run.db")]
    done = subprocess.run(run, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with RunLog(tmp_path / "run.db") as log:
        assert log.scalars()["loss"][0].tolist() == [1, 2, 3]
        assert len(log.sessions) == 2  # and none of a thread that was started at the end of the process


def test_nothing_is_kept_where_no_writer_keeps_it():
    notes = Notes([lambda diagnosis: None])
    notes.keep(1, {"loss": torch.tensor(1.0)})
    assert not notes._kept


@pytest.mark.parametrize("loss", [torch.zeros(3), "low", [1.0]])
def test_a_loss_that_is_no_number_ends_nothing(loss, caplog):
    keeper, model = Keeper(), Model()
    with (
        caplog.at_level(logging.WARNING, "hnf_attention"),
        AttentionStabilityMonitor(model, log_every=1, writers=[keeper]) as monitor,
    ):
        model(x()).sum().backward()
        assert monitor.on_step(loss) is not None and "scalars" in monitor.status.off
    assert keeper.notes == [1] and "expected loss to be" in caplog.text


def test_each_sentence_of_an_account_is_told_once():
    class Done:
        intervention, outcome, account = {"action": "qk_clip"}, "open", ["clipped"]

    keeper, done = Keeper(), Done()
    notes = Notes([keeper])
    notes.account(10, [done])
    done.account.append("it helped")
    done.outcome = "kept"
    notes.account(20, [done])
    notes.account(30, [done])
    assert keeper.events == [
        (10, "intervention", {"action": "qk_clip", "outcome": "open", "text": "clipped"}),
        (20, "intervention", {"action": "qk_clip", "outcome": "kept", "text": "it helped"}),
    ]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="fork is POSIX's")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_process_leaves_the_losses_to_the_other_one():
    keeper = Keeper()
    monitor = AttentionStabilityMonitor(Model(), log_every=100, writers=[keeper])
    monitor.on_step(loss=1.5)
    monitor.instrumentation.restore()  # the model does not hold the monitor any more
    child = os.fork()
    if not child:
        del monitor
        gc.collect()  # runs what the end of the process runs
        os._exit(len(keeper.notes))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    del monitor
    gc.collect()
    assert keeper.notes == [(1, {"loss": 1.5})]
