"""`doctor --warm`: the calls that it makes are those of a run, and on a card a run then compiles nothing."""

import argparse

import numpy as np
import pytest
import torch

from hnf_attention import AttentionStabilityMonitor, attention
from hnf_attention.cli.doctor import command, warm
from hnf_attention.cli.main import main
from hnf_attention.cli.parser import make_parser
from hnf_attention.reference.extremes import new_result

SHAPE = warm.Shape(4, 2, 16, torch.float32, 70, True)


def options(*arguments):
    return make_parser().parse_args(["doctor", "--warm", *arguments])


def test_it_makes_a_plain_call_and_one_under_each_kind_of_monitor(monkeypatch):
    calls, monitors, in_graphs = [], [], []
    run = warm.graphed.GraphedCall.run
    monkeypatch.setattr(
        warm.graphed.GraphedCall, "run", lambda *args: in_graphs.append(args[1]) or run(*args)
    )

    class Monitor(AttentionStabilityMonitor):
        def __init__(self, model, **keywords):
            monitors.append((keywords["mode"], keywords.get("sample")))
            super().__init__(model, **keywords)

        def on_step(self):
            diagnosis = super().on_step()
            if self.step == 1:
                assert diagnosis is None  # and its extremes were taken
            else:
                (stats,) = diagnosis.stats.values()
                assert np.isfinite(stats.between_max_logit).all() and stats.rows.min() > 0
            return diagnosis

    def plain(*tensors, **keywords):
        calls.append((tuple(x.shape for x in tensors), tensors[0].dtype, keywords))
        return attention(*tensors, **keywords)

    monkeypatch.setattr(warm, "AttentionStabilityMonitor", Monitor)
    monkeypatch.setattr(warm, "attention", plain)
    assert warm.warm(SHAPE, torch.device("cpu")) > 0
    keys = (1, 2, 70, 16)
    assert calls == [(((1, 4, 70, 16), keys, keys), torch.float32, {"is_causal": True})]
    (state,) = in_graphs
    assert state.accumulator[0].abs().sum() > 0 and (state.result[0] > new_result(4, "cpu")[0]).all()
    assert monitors == [("probe", None), ("fused", None), ("probe", 16)]


def test_shapes_are_those_that_are_asked_for():
    assert len(list(warm.shapes(options()))) == 2 * 2 * 2
    found = list(
        warm.shapes(options("--heads", "8", "--kv-heads", "2", "--head-dim", "96", "--length", "512"))
    )
    assert found == [warm.Shape(8, 2, 96, torch.bfloat16, 512, causal) for causal in (True, False)]
    assert str(found[0]) == "bfloat16, 8/2 heads of 96, 512 tokens, causal"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--heads", "4"], "--heads is an option of --warm, which was not given"),
        (["--kv-heads", "4"], "--kv-heads is an option of --warm, which was not given"),
        (["--warm", "--heads", "0"], "--heads"),
    ],
)
def test_options_that_fit_no_call_are_refused(arguments, message, capsys):
    assert main(["doctor", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_it_is_refused_where_nothing_is_compiled(capsys):
    assert main(["doctor", "--warm"]) == 2
    assert "--warm needs a CUDA card and Triton" in capsys.readouterr().err


def test_it_says_how_long_it_took_and_where_the_kernels_lie(monkeypatch, capsys, tmp_path):
    pytest.importorskip("triton", reason="Triton kernels need Linux")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(warm, "warm", lambda shape, device: 1.5)
    given = argparse.Namespace(heads=2, kv_heads=None, head_dim=[64], dtype=None, length=[128])
    document = command._warm(command.for_people(None), given)
    assert document["cache"] == str(tmp_path) and list(document["seconds"].values()) == [1.5, 1.5]
    assert "3.0 s in all; kept in" in capsys.readouterr().out


@pytest.mark.gpu
def test_a_warm_shape_compiles_nothing_at_another_length():
    from hnf_attention.kernels.shared import launch

    def warmed(*lengths):
        """How many kernels are compiled after these lengths."""
        for length in lengths:
            warm.warm(warm.Shape(4, 2, 64, torch.bfloat16, length, True), torch.device("cuda", 0))
        return len(launch._compiled)

    # Of a length that 128 divides and of one that 16 does not divide, as without options.
    assert warmed(256, 200) == warmed(384, 328, 320)
