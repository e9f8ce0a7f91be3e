"""Graphs of monitored models beside other graphs, handles and copies of the same model."""

import copy
import pickle

import pytest
import torch
from test_every_step import DEVICE, HEADS, WIDTH, batch
from test_every_step_compiled import LAYERS, Model, afresh, compiled, graphs, train  # noqa: F401
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

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


class OtherHeads(nn.Module):
    """Values have fewer heads than keys, which scaled_dot_product_attention takes."""

    def __init__(self):
        super().__init__()
        self.q = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        q = self.q(x).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        return scaled_dot_product_attention(q, q, q[:, :1]).transpose(1, 2).flatten(2)


@pytest.mark.slow
def test_values_with_heads_of_their_own_are_listed():
    model, x = OtherHeads().to(DEVICE), batch(24)
    run = compiled(model)
    with AttentionStabilityMonitor(run, log_every=2) as monitor:
        train(run, monitor, 2, x)
        (reason,) = monitor.instrumentation.coverage.not_measured.values()
    assert "4 key heads and 1 value heads" in reason and not monitor.history
