"""Monitored models in CUDA graphs: nothing is skipped or cut, numbers are exact, and replays obey the control."""

import numpy as np
import pytest
import torch
from test_every_step_compiled import TENSORS, Model, diagnosis_of, graphs, train
from torch import nn
from torch._dynamo.utils import counters
from torch.nn import functional

from hnf_attention import AttentionStabilityMonitor
from hnf_attention.engine.call import check
from hnf_attention.reference import extremes as reference_extremes
from hnf_attention.reference.attention import attention
from hnf_attention.reference.context import Context, largest
from hnf_attention.reference.fold import fold_rows, new_accumulator
from hnf_attention.reference.measured import measure, shared_key
from hnf_attention.statistics.fields import NUM_FOLDED, NUM_SUMS, SUM_FIELDS

pytestmark = [
    pytest.mark.gpu,
    # PyTorch's own words, while it compiles whatever model.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning"),
]
SEQUENCES = SUM_FIELDS.index("sequences")
MODES = ("default", "reduce-overhead")


@pytest.fixture(autouse=True)
def afresh():
    torch._dynamo.reset()
    counters.clear()


def whole(mode):
    """No graph was compiled for nothing, none was skipped, and none was cut."""
    assert counters["inductor"]["cudagraph_skips"] == 0
    assert counters["inductor"]["cudagraph_partitions"] in (0, counters["stats"]["unique_graphs"])
    if mode == "reduce-overhead":
        assert counters["inductor"]["cudagraph_recorded_non_static_inputs"] > 0


class Bare(nn.Module):
    """Attention without anything around it, so that its tensors are known."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, q, k, v):
        gqa = q.shape[1] != k.shape[1]
        out = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)
        return out * self.gain


def expected(q, k, v, out):
    """What one call folds into an empty accumulator, in fp64: (NUM_FOLDED, H)."""
    q, k, v, out = (x.detach().double().cpu() for x in (q, k, v, out))
    options = check(
        q, k, v, attn_mask=None, is_causal=True, scale=None, window_size=None, softcap=None, sinks=None
    )
    rows = attention(q, k, None, options)[1]
    shared = shared_key(q, k, rows, options, None)
    beside = measure(q, k, rows, options, Context(None, None, shared, largest(v), largest(out)))
    accumulator = new_accumulator(q.shape[1], "cpu")
    fold_rows(accumulator, rows, beside)
    return accumulator.numpy(), options


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("sizes", [(2, 4, 2, 300, 64), (1, 3, 3, 128, 40)])
def test_a_graph_folds_what_the_reference_folds(mode, dtype, sizes):
    model = Bare().cuda()
    run = torch.compile(model, mode=mode, fullgraph=True)
    with AttentionStabilityMonitor(run, log_every=10, record_every=5) as monitor:
        check_folds(run, model, monitor, sizes, dtype)
    whole(mode)


def check_folds(run, model, monitor, sizes, dtype):
    """Ten steps, of which the fifth and the last are measured, against the reference."""
    batch, heads, kv_heads, length, dim = sizes
    torch.manual_seed(0)
    total, largest_seen = None, []
    for step in range(1, 11):
        q = torch.randn(batch, heads, length, dim, device="cuda", dtype=dtype)
        k, v = (torch.randn(batch, kv_heads, length, dim, device="cuda", dtype=dtype) for _ in range(2))
        model.zero_grad()
        out = run(q, k, v)
        out.float().sum().backward()
        folded, options = expected(q, k, v, out)
        if step % 5 == 0:
            total = (
                folded
                if total is None
                else np.concatenate(
                    [
                        total[:NUM_SUMS] + folded[:NUM_SUMS],
                        np.maximum(total, folded)[NUM_SUMS:],
                    ]
                )
            )
        if step != 10:
            result = reference_extremes.new_result(heads, torch.device("cpu"))
            one = [x.detach().cpu() for x in (q, k, v, out)]
            reference_extremes.raise_result(result, *one, options, None, step, 0, rows=length)
            largest_seen.append(reference_extremes.decoded(result.numpy())[:2])
        monitor.on_step()
    (stats,) = monitor.history[-1].layers.values()
    loose = 2e-2 if dtype == torch.bfloat16 else 1e-3
    np.testing.assert_allclose(stats.values[:NUM_FOLDED], total, rtol=loose, atol=loose)
    upper = np.max(largest_seen, 0)
    for found, most in zip((stats.between_max_logit, stats.between_logit_range), upper):
        assert (found <= most + loose).all() and (found > 0.5 * most).all()
    assert stats.rows.tolist() == [2 * batch * length] * heads


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("record_every", [None, 1, 3])
def test_bits_stay_and_one_graph_serves_every_step(mode, record_every):
    def run_steps(monitored):
        model = Model().cuda()
        run = torch.compile(model, mode=mode, fullgraph=True)
        x = torch.ones(2, 200, 32, device="cuda")
        monitor, found = None, []
        if monitored:
            monitor = AttentionStabilityMonitor(run, log_every=6, record_every=record_every or 6)
        for _ in range(7):
            out = run(x)
            out.square().sum().backward()
            found += [out.detach().clone(), *(p.grad.detach().clone() for p in model.parameters())]
            model.zero_grad()
            if monitor:
                monitor.on_step()
        if monitor:
            measured = {None: 1, 1: 6, 3: 2}[record_every]
            (snapshot,) = monitor.history
            assert [stats.rows.tolist() for stats in snapshot.layers.values()] == [[measured * 400] * 4] * 2
            assert snapshot.forwards.training == measured
            monitor.restore()
        return found

    plain = run_steps(False)
    known = graphs()
    for one, other in zip(run_steps(True), plain, strict=True):
        assert torch.equal(one, other)
    assert known == graphs() - known == 1
    whole(mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("log_every", [1, 10, 100])
def test_a_nan_is_named_right_at_any_cadence_in_a_graph(mode, log_every):
    model, x = Model().cuda(), torch.randn(2, 70, 32, device="cuda", requires_grad=True)
    run = torch.compile(model, mode=mode, fullgraph=True)
    first = {name: 13 + 11 * place for place, name in enumerate(TENSORS)}
    spoil = {step: (1, name, place) for place, (name, step) in enumerate(first.items())}
    with AttentionStabilityMonitor(run, log_every=log_every) as monitor:
        train(run, monitor, max(50, log_every), x, spoil, model)
        for place, (name, step) in enumerate(first.items()):
            stats = monitor.history[(step - 1) // log_every].layers["layers.1"]
            if log_every == 1:  # there are no steps in between: the readings name them
                (issue,) = [x for x in diagnosis_of(monitor, step) if x.head == place]
                assert (issue.issue_type, issue.layer) == ("non_finite", "layers.1"), (name, issue)
                continue
            for other in TENSORS:
                found = getattr(stats, f"first_nonfinite_{other}")[place]
                assert (found == step) == (other in (name, "out")), (name, other, found)
            assert stats.first_nonfinite_step[place] == step
    whole(mode)


def test_monitors_come_and_go_and_lengths_change():
    model = Model().cuda()
    run = torch.compile(model, mode="reduce-overhead", fullgraph=True, dynamic=False)
    for length in (70, 130, 70):
        x = torch.randn(2, length, 32, device="cuda", requires_grad=True)
        for _ in range(3):
            run(x).square().mean().backward()
            model.zero_grad()
            x.grad = None
        with AttentionStabilityMonitor(run, log_every=4) as monitor:
            train(run, monitor, 8, x)
            with monitor.paused():
                run(x).square().mean().backward()
                model.zero_grad()
                x.grad = None
            train(run, monitor, 4, x)
        assert [int(each.layers["layers.0"].rows[0]) for each in monitor.history] == [2 * length] * 3
    assert graphs() == 4
    assert counters["inductor"]["cudagraph_skips"] == 0


def test_blocks_in_graphs_of_their_own_and_their_second_forwards():
    def rows(recompute, compiles):
        model = Model(recompute).cuda()
        for layer in model.layers if compiles else ():
            layer.compile(mode="reduce-overhead" if recompute is None else "default", fullgraph=True)
        x = torch.randn(2, 70, 32, device="cuda", requires_grad=True)
        with AttentionStabilityMonitor(model, log_every=3, record_every=1) as monitor:
            for _ in range(9):
                torch.compiler.cudagraph_mark_step_begin()
                model(x).square().mean().backward()
                model.zero_grad()
                x.grad = None
                monitor.on_step()
        return [
            [int(s.rows[0]), int(s.values[SEQUENCES, 0])]
            for each in monitor.history
            for s in each.layers.values()
        ]

    for recompute in (None, False):
        assert rows(recompute, True) == rows(recompute, False)


def test_measuring_leaves_nothing_in_memory():
    model = Model().cuda()
    run = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    x = torch.randn(2, 70, 32, device="cuda", requires_grad=True)
    with AttentionStabilityMonitor(run, log_every=5, record_every=1) as monitor:
        train(run, monitor, 10, x)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        train(run, monitor, 20, x)
        torch.cuda.synchronize()
        assert torch.cuda.memory_allocated() <= before + 2**16
