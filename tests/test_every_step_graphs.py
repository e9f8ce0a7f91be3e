"""Graphs of monitored models beside other graphs, handles and copies of the same model."""

import copy
import pickle

import pytest
import torch
from test_every_step import DEVICE, batch
from test_every_step_compiled import LAYERS, Model, afresh, compiled, graphs, train  # noqa: F401

from hnf_attention import AttentionStabilityMonitor, instrument


@pytest.mark.slow
def test_another_handle_gets_each_call_and_the_monitor_still_its_own():
    model, x = Model().to(DEVICE), batch(24)
    run = compiled(model)
    with AttentionStabilityMonitor(run, log_every=1) as monitor:
        train(run, monitor, 2, x)
        for _ in range(2):
            with instrument(model) as handle:
                train(run, monitor, 1, x)
                assert list(handle.latest) == ["layers.0", "layers.1"]
            train(run, monitor, 1, x)
        assert graphs() == 2
        handle = monitor.instrumentation
        handle.query_mask = torch.arange(24)[None].expand(2, -1) < 20
        train(run, monitor, 1, x)
        handle.query_mask = None
        train(run, monitor, 1, x)
    assert graphs() == 2
    rows = [int(each.layers["layers.0"].rows[0]) for each in monitor.history]
    assert rows == [48, 48, 48, 48, 48, 48, 40, 48]


@pytest.mark.slow
def test_calls_of_a_shared_block_are_one_layer_and_said_to_be():
    class Shared(Model):
        def forward(self, x):
            for _ in range(3):
                x = x + self.layers[0](x)
            return x

    model, x = Shared().to(DEVICE), batch(24)
    model.layers[0].compile(backend="aot_eager", fullgraph=True)
    with AttentionStabilityMonitor(model, log_every=2) as monitor:
        train(model, monitor, 2, x)
        assert "calls in compiled graphs together" in monitor.instrumentation.coverage.measured["layers.0"]
    assert list(monitor.history[0].layers) == ["layers.0"]
    assert monitor.history[0].layers["layers.0"].rows.tolist() == [3 * 48] * 4


@pytest.mark.slow
def test_copies_carry_nothing():
    model, x = Model().to(DEVICE), batch(24)
    run = compiled(model)
    with AttentionStabilityMonitor(run, log_every=1) as monitor:
        train(run, monitor, 1, x)
        size = len(pickle.dumps(model))
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert all(vars(module).get("_hnf_attention_layer") is None for module in other.modules())
            other(x)
        train(run, monitor, 1, x)
    assert size < 4 * sum(p.nbytes for p in model.parameters())
    assert [int(each.layers["layers.0"].rows[0]) for each in monitor.history] == [48, 48]


@pytest.mark.slow
@pytest.mark.parametrize("by", ["monitor", "handle"])
def test_a_graph_of_an_equal_model_that_nobody_measures_is_not_run_instead(by):
    other, model, x = Model().to(DEVICE), Model().to(DEVICE), batch(24)
    runs = [compiled(one) for one in (other, model)]
    if by == "handle":
        with instrument(Model()):
            runs[0](x)
            with instrument(model) as handle:
                runs[1](x)
                assert list(handle.latest) == LAYERS
    else:
        with AttentionStabilityMonitor(model, log_every=1) as monitor:
            runs[0](x)
            runs[1](x)
            assert list(monitor.on_step().stats) == LAYERS
    assert graphs() == 2
