"""Faults that were found by breaking things on purpose, each with its own test."""

import logging
import signal
import threading
import time

import pytest
import torch
from attention_models import Model as Plain
from faults import FaultInjector, Model, train
from heads import head_stats
from torch.nn import functional

from hnf_attention import AttentionAnalyzer, AttentionStabilityMonitor, errors, instrument
from hnf_attention.diagnosis import AttentionDiagnosis
from hnf_attention.instrumentation import handle, observer
from hnf_attention.instrumentation.interceptors import products, softmax
from hnf_attention.instrumentation.patches import Patch, all_or_none, release_all
from hnf_attention.monitoring import accumulators, monitor, process_groups
from hnf_attention.monitoring.parts import Parts
from hnf_attention.run_log import RunLog, RunLogWriter, writer

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def nothing_reported(monkeypatch):
    monkeypatch.setattr(errors, "_reported", set())


def at(step):
    return AttentionDiagnosis([], {"a": head_stats(2, max_logit=float(step))}, step)


def fail(*_, **__):
    raise RuntimeError("on purpose")


# `instrument` that fails


def patched():
    """The functions that instrumenting replaces, and who is known."""
    names = ("softmax", "matmul", "bmm", "einsum")
    functions = [functional.scaled_dot_product_attention, functional.multi_head_attention_forward]
    functions += [getattr(torch, name) for name in names]
    return (
        functions,
        list(observer.modules()),
        set(observer.active),
        set(observer.keeping),
        vars(Plain).copy(),
    )


@pytest.mark.parametrize("place", ["sdpa", "multihead", "softmax", "products", "flex", "xformers"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_instrument_that_fails_leaves_nothing_while_its_error_is_kept(place, error, monkeypatch):
    def stops(*_):
        raise error("on purpose")

    before, model = patched(), Plain()
    monkeypatch.setattr(getattr(handle, place), "install", stops)
    with pytest.raises(error) as kept:
        instrument(model)
    assert patched() == before and kept.value.__traceback__ is not None  # which keeps the handle alive
    monkeypatch.undo()
    with instrument(model) as made:
        model(torch.randn(2, 20, 16))
        assert made.coverage.measured


def test_a_library_that_is_patched_half_way_is_put_back(monkeypatch):
    before, made = patched(), []
    everywhere = Patch.everywhere

    def third_fails(*args):
        if len(made) == 2:
            raise RuntimeError("on purpose")
        made.append(args)
        return everywhere(*args)

    monkeypatch.setattr(Patch, "everywhere", staticmethod(third_fails))
    for library in (products, softmax):
        made.clear()
        with pytest.raises(RuntimeError), all_or_none():
            library.install([])
        assert len(made) == 2 and patched() == before


def test_patches_of_an_inner_part_and_of_another_thread_are_not_mixed_up():
    before = patched()
    with pytest.raises(RuntimeError), all_or_none():
        with all_or_none():
            products.install([])
        softmax.install([])
        raise RuntimeError("on purpose")
    assert patched() == before

    inside, installed, kept = threading.Event(), threading.Event(), []

    def other():
        inside.wait(20)
        with all_or_none():
            kept.extend(softmax.install([]))
        installed.set()

    thread = threading.Thread(target=other)
    thread.start()
    with pytest.raises(RuntimeError), all_or_none():
        inside.set()
        installed.wait(20)
        raise RuntimeError("on purpose")
    thread.join()
    assert patched() != before
    release_all(kept)
    assert patched() == before


@pytest.mark.parametrize("part", ["Recorder", "Treatment", "resolve"])
def test_a_monitor_that_cannot_be_made_leaves_nothing(part, monkeypatch):
    before, model = patched(), Plain()
    monkeypatch.setattr(monitor, part, fail)
    with pytest.raises(RuntimeError) as kept:
        AttentionStabilityMonitor(model)
    assert patched() == before and kept.value.__traceback__ is not None


def test_an_analyzer_that_cannot_be_made_leaves_nothing(monkeypatch):
    before, model = patched(), Plain()
    monkeypatch.setattr("hnf_attention.monitoring.analyzer.Recorder", fail)
    with pytest.raises(RuntimeError) as kept:
        AttentionAnalyzer(model)
    assert patched() == before and kept.value.__traceback__ is not None


# Around a call


def test_the_search_for_a_layer_may_fail_too(monkeypatch):
    model, x = Plain(), torch.randn(2, 20, 16)
    expected = model(x)
    with instrument(model) as made:
        monkeypatch.setattr(observer, "running_owner", fail)
        assert torch.equal(model(x), expected)
        assert not made.coverage.measured


def test_two_threads_train_under_one_monitor_with_a_fault_in_one(monkeypatch):
    """Another thread evaluates a copy of the weights with the same modules, while the first one trains."""
    plain, found = train(monitored=False), []
    stop, errors_there, lock = threading.Event(), [], threading.Lock()

    def evaluate(model, step):
        if step == 3:
            lock.acquire()  # the fault is this thread's alone: each one lengthens the rest that the layer takes
        if step == 5:
            lock.release()
        if step != 1:
            return

        def run():
            try:
                while not stop.is_set():
                    with lock, torch.no_grad():
                        model(torch.zeros(1, 3, 16))
            except Exception as error:
                errors_there.append(error)

        thread = threading.Thread(target=run)
        found.append(thread)
        thread.start()

    try:
        with FaultInjector().fail("fold", 4) as injector:
            run = train(injector=injector, before_step=evaluate)
    finally:
        stop.set()
        found[0].join()
    assert not errors_there and run.error is None and run.same_as(plain)
    assert run.snapshots[-1] == 8 and not observer.active


def test_lanes_are_free_after_a_reading_that_fails(monkeypatch):
    lanes, settle = accumulators.Lanes(), accumulators.Lane.settle
    users = [type("Forward", (), {"failed": False})() for _ in range(3)]
    made = [lanes.of(None), lanes.of(users[0])]
    for lane in made:
        lanes.release(lane)

    def second_fails(lane):
        if lane is made[1]:
            raise RuntimeError("on purpose")
        settle(lane)

    monkeypatch.setattr(accumulators.Lane, "settle", second_fails)
    with pytest.raises(RuntimeError), lanes.to_read():
        pass
    assert made[0].forward is None and made[1].forward is None
    assert lanes.of(users[1]) is made[1] and lanes.of(None) is made[0]


def test_a_failure_of_many_layers_is_said_once(monkeypatch, caplog):
    class Deep(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = torch.nn.ModuleList(Plain() for _ in range(4))

        def forward(self, x):
            for block in self.blocks:
                x = block(x)
            return x

    model = Deep()
    with instrument(model) as made, caplog.at_level(logging.WARNING, "hnf_attention"):
        monkeypatch.setattr("hnf_attention.engine.api.attend", fail)
        model(torch.randn(2, 20, 16))
        assert len(caplog.records) == 1
        assert len([x for x in made.coverage.not_measured.values() if "on purpose" in x]) == 8


# The run log


def test_the_error_of_an_enumeration_is_of_no_handler():
    with pytest.raises(ValueError) as kept:
        signal.Signals(12345)
    errors.let_out(kept.value)  # SIG_DFL is a member of one


class TimeLimit(Exception):
    pass


@pytest.fixture
def interrupted():
    """Raises what the user's signal handler raises."""

    def handler(number, frame):
        raise TimeLimit

    handlers = {signal.SIGUSR1: handler, signal.SIGINT: signal.default_int_handler}
    before = {number: signal.signal(number, each) for number, each in handlers.items()}
    yield signal.raise_signal
    for number, old in before.items():
        signal.signal(number, old)


def library(interrupted, number):
    """What hides the error within an error of its own, and that within another one."""
    try:
        try:
            interrupted(number)
        except BaseException:
            raise RuntimeError("interrupted") from None
    except RuntimeError as error:
        raise ValueError("the call failed") from error


@pytest.mark.parametrize(
    ("number", "kind"), [(signal.SIGUSR1, TimeLimit), (signal.SIGINT, KeyboardInterrupt)]
)
def test_the_error_of_a_handler_comes_out_of_a_librarys_own_error(interrupted, number, kind):
    with pytest.raises(kind):
        Parts(1).run("part", library, interrupted, number)


def test_an_error_of_a_handler_that_the_user_handles_does_not_come_back(interrupted):
    parts = Parts(1)
    try:
        interrupted(signal.SIGUSR1)
    except TimeLimit:  # the last steps of a run whose time is up
        parts.run("part", fail)
    assert "on purpose" in parts.off["part"].reason


def test_a_step_of_several_processes_lets_the_error_of_a_handler_out(interrupted, monkeypatch):
    monkeypatch.setattr(process_groups.dist, "get_rank", lambda: 0)
    groups = process_groups.ProcessGroups.__new__(process_groups.ProcessGroups)
    for name in ("batch", "heads", "queries"):
        object.__setattr__(groups, name, None)
    with pytest.raises(TimeLimit):
        groups.combine(lambda: library(interrupted, signal.SIGUSR1))
    with pytest.raises(process_groups.SharedFault, match="on purpose"):
        groups.combine(fail)


@pytest.mark.parametrize("error", [RuntimeError("a record"), KeyError("layout"), OverflowError("a step")])
def test_a_log_step_that_cannot_be_written_does_not_hold_up_the_next(error, tmp_path, monkeypatch, caplog):
    add = writer._Database.add

    def adds(sink, number, record):
        if record.step == 2:
            raise error
        add(sink, number, record)

    monkeypatch.setattr(writer._Database, "add", adds)
    out = RunLogWriter(tmp_path / "run.db")
    for step in (1, 2, 3, 4):
        out.write(at(step))
    out.close()
    with RunLog(tmp_path / "run.db") as log:
        assert log.steps.tolist() == [1, 3, 4]
    assert [record.getMessage() for record in caplog.records] == ["the run log leaves log step 2 out"]


def test_a_run_log_that_cannot_be_made_smaller_goes_on(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(writer._Database, "shrink", fail)
    out = RunLogWriter(tmp_path / "run.db")
    for step in (1, 2, 3):
        out.write(at(step))
    out.close()
    with RunLog(tmp_path / "run.db") as log:
        assert log.steps.tolist() == [1, 2, 3]
    assert len(caplog.records) == 1 and "could not be made smaller" in caplog.text


@pytest.mark.parametrize("limit", ["MOST_IN_LINE", "MOST_LOG_STEPS_IN_LINE"])
def test_what_waits_for_a_disk_that_hangs_has_a_bound(limit, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(writer, limit, 5)
    hangs, begun, add = threading.Event(), threading.Event(), writer._Database.add

    def adds(*args):
        begun.set()
        hangs.wait(20)
        add(*args)

    monkeypatch.setattr(writer._Database, "add", adds)
    out = RunLogWriter(tmp_path / "run.db")
    out.write(at(1))
    assert begun.wait(20)
    began = time.monotonic()
    for step in range(2, 40):
        out.write(at(step))
    assert time.monotonic() - began < 5 and out._thread.waiting.qsize() == 5
    if limit == "MOST_LOG_STEPS_IN_LINE":
        out.note(39, loss=1.0)  # numbers of steps are small: more of them wait
        assert out._thread.waiting.qsize() == 6
    hangs.set()
    out.close()
    with RunLog(tmp_path / "run.db") as log:
        assert log.steps.tolist() == [1, 2, 3, 4, 5, 6]
    assert ["hangs" in r.getMessage() or "33 items" in r.getMessage() for r in caplog.records] == [True, True]


@pytest.mark.parametrize("kind", ["database", "fragments"])
def test_a_clock_that_jumps_back_loses_no_step(kind, tmp_path, monkeypatch):
    """A run is resumed on a machine whose clock is behind: its log steps replace those done again, no others."""
    if kind == "fragments":
        monkeypatch.setattr(writer, "network_file_system", lambda folder: "nfs4")
    now = [2e9]
    monkeypatch.setattr(writer.time, "time", lambda: now[0])
    for steps, clock in ((range(1, 11), 2e9), (range(8, 16), 2e9 - 3600.0), (range(14, 20), 2e9 - 1e6)):
        now[0] = clock
        out = RunLogWriter(tmp_path / "run.db")
        for step in steps:
            out.write(at(step))
        out.close()
    with RunLog(tmp_path / "run.db") as log:
        assert log.steps.tolist() == list(range(1, 20))
        assert [session["started"] for session in log.sessions] == [2e9, 2e9 - 3600.0, 2e9 - 1e6]


def test_a_clock_that_jumps_in_the_middle_of_a_run_changes_nothing(tmp_path, monkeypatch):
    jumps = iter([2e9, 2e9, 1e9, 3e9, -5.0, 1e300, 2e9])
    monkeypatch.setattr(writer.time, "time", lambda: next(jumps, 0.0))
    plain = train(monitored=False)
    out = RunLogWriter(tmp_path / "run.db")
    run = train(writers=[out])
    out.close()
    assert run.error is None and run.same_as(plain) and not run.said
    with RunLog(tmp_path / "run.db") as log:
        assert [record.step for record in log.records()] == [2, 4, 6, 8]


def test_a_model_without_data_for_a_while_is_said_once(caplog):
    model = Model()
    with AttentionStabilityMonitor(model, log_every=1) as watching:
        for _ in range(3):
            assert watching.on_step() is None
        model(torch.randn(2, 12, 16))
        assert watching.on_step() is not None
    assert len(caplog.records) == 1
