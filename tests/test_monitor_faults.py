"""Faults inside the measuring of a training run: none comes out of `on_step`, and none lasts longer than its cause."""

import pytest
import torch
from attention_models import Attention

from hnf_attention import AttentionStabilityMonitor, instrument
from hnf_attention.instrumentation import Instrumentation, observer
from hnf_attention.monitoring.accumulators import Kind, Lane


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Attention()


@pytest.fixture
def x(model):
    return torch.randn(2, 5, 16)


def test_a_coverage_that_cannot_be_read_ends_no_step(model, x, monkeypatch):
    def fail(handle):
        raise RuntimeError("dictionary changed size during iteration")

    monitor = AttentionStabilityMonitor(model, log_every=1)
    model(x)
    with monkeypatch.context() as patch:
        patch.setattr(Instrumentation, "coverage", property(fail))
        diagnosis = monitor.on_step()
        assert diagnosis is not None and diagnosis.healthy is None and "coverage" in monitor.status.off
    model(x)
    assert monitor.on_step() is not None and monitor.status


def test_layers_that_another_thread_adds_meanwhile_do_not_disturb_the_coverage(model, x, monkeypatch):
    with instrument(model) as handle:
        model(x)
        before = dict(handle._measured)

        def add(*_):
            for kept in (handle._measured, handle._problems):
                kept[f"new {len(kept)}"] = ""
            handle._doubts[f"new {len(handle._doubts)}", "kind"] = ""
            return ""

        monkeypatch.setattr(handle, "_remarks", add)
        assert set(handle.coverage.measured) == set(before)


def test_memory_that_runs_out_for_an_accumulator_leaves_the_lane_usable(monkeypatch):
    made = Lane._new
    left = iter([None, MemoryError("out of memory for the second")])

    def once(lane, place):
        error = next(left, None)
        if error is not None:
            raise error
        return made(lane, place)

    lane = Lane(reversible=True)
    place = Kind("a", 0, True, 2, 8, torch.float32), torch.device("cpu")
    monkeypatch.setattr(Lane, "_new", once)
    with pytest.raises(MemoryError):
        lane.accumulator(place)
    lane.end(failed=False)
    lane.accumulator(place).fill_(1.0)
    lane.end(failed=False)
    assert (lane.kept[place] == 1.0).all()


def test_a_fault_of_measuring_is_in_the_status_until_the_layer_is_measured_again(model, x, monkeypatch):
    def fail(*_):
        raise MemoryError("out of memory")

    monitor = AttentionStabilityMonitor(model, log_every=1)
    with monkeypatch.context() as patch:
        patch.setattr(Lane, "_new", fail)
        model(x)
    assert monitor.on_step() is None and not monitor.status
    assert "layer (the model itself): measuring failed: MemoryError: out of memory" in str(monitor.status)
    model(x)
    assert monitor.on_step() is not None and str(monitor.status) == "all parts work"


@pytest.mark.parametrize("part", ["recording", "notes"])
def test_restore_ends_what_rests_after_a_fault(part, model, x, monkeypatch):
    kept = []

    class Writer:
        def write(self, diagnosis):
            pass

        def note(self, step, **scalars):
            kept.append(step)

        def event(self, *args, **detail):
            pass

    monitor = AttentionStabilityMonitor(model, log_every=1, writers=[Writer()])

    def fail():
        raise RuntimeError("on purpose")

    where = {"recording": (monitor._recorder, "read"), "notes": (monitor._notes, "hand_over")}[part]
    with monkeypatch.context() as patch:
        patch.setattr(*where, fail)
        model(x).sum().backward()
        monitor.on_step(loss=1.0)
    assert part in monitor.status.off
    monitor.restore()
    monitor.on_step()
    assert kept == [1] and not observer.active and not observer.keeping
