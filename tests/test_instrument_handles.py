"""Several handles of one model: one of each kind, side by side, and how they end."""

import logging

import pytest
import torch
from attention_models import LAYERS, Attention, HandWrittenAttention, Model, x
from torch import nn

import hnf_attention
from hnf_attention import AttentionAnalyzer, AttentionStabilityMonitor, instrument, restore


class Tool:
    """Something that is built on `instrument`."""

    def __init__(self, model, **options):
        self.restored = 0
        self.handle = instrument(model, holder=self, **options)

    def restore(self):
        self.restored += 1
        self.handle.restore()


class OtherTool(Tool):
    pass


@pytest.mark.parametrize("make", [instrument, Tool])
def test_a_new_handle_takes_over_from_one_of_its_kind(make, caplog):
    model = Model()
    first = make(model)
    with caplog.at_level(logging.WARNING, "hnf_attention"):
        second = make(model)
    assert "takes over" in caplog.text
    model(x())
    first, second = (getattr(handle, "handle", handle) for handle in (first, second))
    assert not first.latest and list(second.latest) == LAYERS
    second.restore()
    first.restore()
    model(x())
    assert "__call__" not in vars(Model) and not hnf_attention.instrumentation.observer.active


def test_the_holder_that_is_taken_over_is_told():
    model = Model()
    first, other = Tool(model), OtherTool(model)
    second = Tool(model)
    assert (first.restored, other.restored, second.restored) == (1, 0, 0)
    restore(model)
    assert (first.restored, other.restored, second.restored) == (1, 1, 1)


@pytest.mark.parametrize("attention", [Attention, HandWrittenAttention])
@pytest.mark.parametrize("modes", [("probe", "probe"), ("fused", "probe"), ("probe", "fused")])
def test_handles_of_different_kinds_measure_side_by_side(modes, attention):
    torch.manual_seed(0)
    model, inputs = nn.Sequential(attention(), attention()), x()
    with instrument(model) as alone:
        model(inputs)
    tools = [Tool(model, mode=modes[0]), OtherTool(model, mode=modes[1])]
    seen = []
    tools[1].handle.on_measure = seen.append
    model(inputs)
    assert [m.layer for m in seen] == list(tools[0].handle.latest) == ["0", "1"]
    for tool, mode in zip(tools, modes):
        fused = mode == "fused" and attention is Attention
        assert all(how.startswith("fused") == fused for how in tool.handle.coverage.measured.values())
    for measurement in seen:
        for rows in (tools[0].handle.latest[measurement.layer].rows, measurement.rows):
            torch.testing.assert_close(rows.entropy, alone.latest[measurement.layer].rows.entropy)
    tools[0].restore()
    model(inputs)
    assert len(seen) == 4
    tools[1].handle.measuring = False
    model(inputs)
    assert len(seen) == 4


def test_one_of_them_at_most_computes_outputs():
    model = Model()
    tool = Tool(model, mode="auto")
    with pytest.raises(ValueError, match="expected mode='probe' beside Tool in mode 'auto', got 'fused'"):
        instrument(model, mode="fused")
    with instrument(model):
        model(x())
    assert list(tool.handle.latest) == LAYERS
    tool.restore()


def test_an_analyzer_inside_a_monitored_run():
    model, inputs = Model(), x()
    with AttentionStabilityMonitor(model, log_every=1) as monitor:
        model(inputs)
        with AttentionAnalyzer(model, mode="probe") as analyzer:
            model(inputs)
        model(inputs)
        watched, analysed = monitor.on_step().stats, analyzer.diagnose().stats
    assert list(watched) == list(analysed) == LAYERS
    assert watched[LAYERS[0]].rows[0] == 3 * 40 and analysed[LAYERS[0]].rows[0] == 40


def test_a_new_monitor_takes_over_and_the_old_one_closes_its_writers():
    class Writer:
        closed = 0

        def write(self, _):
            raise AssertionError

        def close(self):
            self.closed += 1

    model, writer = Model(), Writer()
    old = AttentionStabilityMonitor(model, writers=[writer])
    with AttentionStabilityMonitor(model, log_every=1) as monitor:
        model(x())
        assert monitor.on_step() is not None and old.on_step() is None
    assert writer.closed == 1


@pytest.mark.parametrize("make", [instrument, AttentionAnalyzer, AttentionStabilityMonitor])
def test_a_handle_that_is_out_of_reach_is_ended_by_the_model(make):
    model, inputs = Model(), x()
    held = make(model)
    restore(model)
    assert "__call__" not in vars(Model) and not hnf_attention.instrumentation.observer.active
    with instrument(model) as handle:
        model(inputs)
    assert list(handle.latest) == LAYERS
    held.restore()
    restore(model)  # nothing to do


def test_what_measures_a_part_or_a_whole_is_ended_too():
    model = Model()
    for watched, given in ((model.blocks[0], model), (model, model.blocks[0])):
        instrumentation = instrument(watched)
        with pytest.raises(ValueError, match=r"hnf_attention.restore\(model\)"):
            instrument(given)
        restore(given)
        assert "restored" in repr(instrumentation)
    with pytest.raises(TypeError, match=r"torch.nn.Module, got str"):
        restore("model")


def test_a_cell_that_failed_keeps_its_handle_alive_and_runs_again():
    model = Model()

    def cell(inputs):
        analyzer = AttentionAnalyzer(model)
        model(inputs)
        return analyzer.diagnose()

    with pytest.raises(RuntimeError) as kept:
        cell(x(2, 20, 15))
    assert list(cell(x()).stats) == LAYERS and kept.tb is not None
    restore(model)


def test_wrapped_by_torch_compile_it_is_the_same_model():
    model = Model()
    first = instrument(model)
    second = instrument(torch.compile(model, backend="eager"))
    assert "restored" in repr(first) and "measuring" in repr(second)
    second.restore()
