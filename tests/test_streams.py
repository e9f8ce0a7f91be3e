"""Accumulators that several CUDA streams use: each waits for the one before, and captures are settled."""

import numpy as np
import pytest
import torch
from test_every_step import DEVICE, Model, batch, train

from hnf_attention import AttentionStabilityMonitor
from hnf_attention.instrumentation import watched
from hnf_attention.monitoring import accumulators, streams
from hnf_attention.monitoring.accumulators import Kind, Lane

CPU = torch.device("cpu")


@pytest.fixture
def fake(monkeypatch):
    """Streams that are numbers. fake.now: the current one. fake.waits: (who waits, for whom)."""

    class Fake:
        now, waits, captures = 1, [], False

    Fake.waits = []
    monkeypatch.setattr(streams.compat, "current_stream", lambda device: Fake.now)
    monkeypatch.setattr(streams, "wait_for", lambda stream, device: Fake.waits.append((Fake.now, stream)))
    for module in (streams, accumulators):
        monkeypatch.setattr(module, "is_captured", lambda device: Fake.captures)
    monkeypatch.setattr(watched, "captured", lambda: Fake.captures)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: Fake.waits.append("device"))
    return Fake


def kind(layer):
    return Kind(layer, 0, True, 2, 8, torch.float32)


def test_a_stream_waits_for_the_one_that_used_an_accumulator_last(fake):
    lane = Lane(reversible=True)
    lane.accumulator((kind("a"), CPU))
    fake.now = 2
    lane.accumulator((kind("b"), CPU))  # another accumulator: both streams go on side by side
    assert fake.waits == []
    lane.accumulator((kind("a"), CPU))
    assert fake.waits == [(2, 1)]
    fake.now = 3
    lane.end(failed=False)
    assert fake.waits == [(2, 1), (3, 2)]  # once for both
    fake.now = 1
    lane.settle()
    lane.reset()
    assert fake.waits[2:] == [(1, 3)]
    fake.now = 2
    lane.accumulator((kind("b"), CPU))
    assert fake.waits[3:] == [(2, 1)]


def test_a_first_call_inside_a_capture_is_refused_and_later_ones_are_settled(fake):
    lane = Lane(reversible=True)
    fake.captures = True
    with pytest.raises(accumulators.Unmeasurable, match="inside the capture of a CUDA graph"):
        lane.accumulator((kind("a"), CPU))
    assert not lane.working and not lane.kept
    fake.captures = False
    lane.accumulator((kind("a"), CPU))
    lane.settle()
    assert fake.waits == []
    fake.captures, fake.now = True, 7
    lane.accumulator((kind("a"), CPU))
    fake.captures, fake.now = False, 1
    assert fake.waits == []  # a capture orders nothing: its replays are settled
    lane.settle()
    lane.reset()
    assert fake.waits == ["device", "device"]


def test_a_refused_capture_is_said_in_the_coverage(fake):
    model = Model(1).to(DEVICE)
    with AttentionStabilityMonitor(model, log_every=1) as monitor:
        fake.captures = True
        model(batch())
        fake.captures = False
        (reason,) = monitor.instrumentation.coverage.not_measured.values()
        assert "run the model once before" in reason
        train(model, monitor, 1)
        assert monitor.history[0].layers["layers.0"].rows.tolist() == [80] * 4


@pytest.mark.gpu
def test_a_layer_on_two_streams_loses_no_update():
    model, x = Model(2).cuda(), batch(900)
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with AttentionStabilityMonitor(model, log_every=1) as monitor, torch.no_grad():
        for _ in range(20):
            model(x)
            with torch.cuda.stream(side):
                torch.cuda._sleep(1_000_000)
                model(x)
            model(x)
            with torch.cuda.stream(side):
                model(x)  # which is still to be read
            monitor.on_step()
    assert {int(n) for each in monitor.history for n in each.layers["layers.0"].rows} == {4 * 2 * 900}


@pytest.mark.gpu
def test_replays_on_another_stream_are_read_whole():
    model, x = Model(2).cuda(), batch(900).detach()
    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.no_grad():
        model(x)  # as every capture needs, monitored or not
    with AttentionStabilityMonitor(model, log_every=1) as monitor, torch.no_grad():
        with torch.cuda.graph(graph):
            model(x)
        assert "run the model once before" in str(monitor.instrumentation.coverage)
        model(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            model(x)
        monitor.on_step()
        for _ in range(5):
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(30):
                    graph.replay()
            monitor.on_step()
    rows = [stats.rows for each in monitor.history[1:] for stats in each.layers.values()]
    np.testing.assert_array_equal(rows, 30 * 2 * 900)
