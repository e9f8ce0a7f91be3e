"""Instrumented models on a real card: fused by default, exact, and without host synchronisation."""

import pytest
import torch
from cases import CASES
from torch.nn.functional import cross_entropy

from hnf_attention import AttentionStabilityMonitor, ProcessGroups, instrument
from hnf_attention.cli.demo.model import GPT
from hnf_attention.engine import api, engines, fold
from hnf_attention.engine.card import card_of
from hnf_attention.monitoring.recorder import Recorder

pytestmark = pytest.mark.gpu


def _gpt():
    torch.manual_seed(0)
    return GPT(layers=2, width=128, heads=4, context=96, sharpness=1.0).cuda()


def _batch():
    return torch.randint(0, 256, (3, 96), device="cuda")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_fused_is_as_exact_as_the_plain_model(dtype):
    model, tokens = _gpt(), _batch()
    with torch.no_grad():
        exact = model.double()(tokens)
        model = model.to(dtype)
        plain = model(tokens)
        with instrument(model, "fused") as instrumentation:
            ours = model(tokens)
            latest = instrumentation.latest
    assert all("fused" in how for how in instrumentation.coverage.measured.values())
    assert len(latest) == 2 and all(m.dtype == dtype for m in latest.values())
    norm = exact.norm()
    error, theirs = (ours.double() - exact).norm() / norm, (plain.double() - exact).norm() / norm
    assert error <= 2 * theirs + torch.finfo(dtype).eps / 2


def test_auto_fuses_what_was_measured_and_says_why_it_probes_else():
    torch.manual_seed(0)
    model = GPT(layers=2, width=128, heads=2, context=96, sharpness=1.0).cuda()
    card = card_of(torch.device("cuda", 0))
    for dtype in (torch.bfloat16, torch.float32):
        with instrument(model.to(dtype), "auto") as instrumentation, torch.no_grad():
            model(_batch())
        found = set(instrumentation.coverage.measured.values())
        if card.capability == engines.MEASURED_CAPABILITY and dtype == torch.bfloat16:
            assert all(how.startswith("fused") for how in found)
        else:
            assert all(how.startswith("probe: fused attention: ") for how in found)


def test_probe_is_bit_identical_and_agrees_with_fused():
    model, tokens = _gpt().to(torch.bfloat16), _batch()
    with torch.no_grad():
        plain = model(tokens)
        with instrument(model, "probe") as probe:
            assert torch.equal(model(tokens), plain)
        with instrument(model, "fused") as fused:
            model(tokens)
    name = next(iter(probe.latest))  # later layers see inputs that the fused output rounded differently
    for field in ("lse", "entropy", "max_logit", "min_logit"):
        torch.testing.assert_close(
            getattr(probe.latest[name].rows, field), getattr(fused.latest[name].rows, field)
        )


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_checkpointed_block_is_recorded_once_and_its_gradient_is_right(use_reentrant):
    model, tokens = _gpt(), _batch()
    seen = []

    def loss():
        x = model.bytes(tokens) + model.positions.weight
        for block in model.blocks:
            x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=use_reentrant)
        return model.head(model.norm(x)).float().square().mean()

    loss().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    with instrument(model, "fused") as instrumentation:
        instrumentation.on_measure = lambda measurement: seen.append(measurement.layer)
        loss().backward()
    assert len(seen) == 2 and len(set(seen)) == 2
    for parameter, wanted in zip(model.parameters(), expected):
        torch.testing.assert_close(parameter.grad, wanted, rtol=2e-3, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")
def test_nothing_waits_for_the_device_between_log_steps():
    model = _gpt().to(torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    batches = [_batch() for _ in range(8)]

    def step(tokens):
        loss = cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    monitor = AttentionStabilityMonitor(model, log_every=4, record_every=1)
    results = []
    for index, tokens in enumerate(batches):
        quiet = index not in (0, 3, 7)  # the first compiles, the others are log steps
        torch.cuda.set_sync_debug_mode("error" if quiet else "default")
        try:
            step(tokens)
            results.append(monitor.on_step())
        finally:
            torch.cuda.set_sync_debug_mode("default")
    monitor.restore()
    assert [r is not None for r in results] == [False, False, False, True] * 2
    stats = next(iter(results[-1].stats.values()))
    assert stats.rows.tolist() == [4 * 3 * 95] * 4
    assert stats.nonfinite_rows.sum() == 0


def test_the_last_snapshot_equals_the_same_run_on_the_cpu():
    model, tokens = _gpt(), _batch()
    snapshots = []
    for device in ("cuda", "cpu"):
        monitor = AttentionStabilityMonitor(model.to(device), log_every=1)
        with torch.no_grad():
            model(tokens.to(device))
        snapshots.append(monitor.on_step().stats)
        monitor.restore()
    for ours, theirs in zip(snapshots[0].values(), snapshots[1].values()):
        torch.testing.assert_close(
            torch.from_numpy(ours.values), torch.from_numpy(theirs.values), rtol=1e-3, atol=1e-3
        )


def _captured(run):
    """A graph of `run()`, which has run before on the side stream, as capturing wants it, and its result."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()
    return graph, result


@pytest.mark.parametrize("name", ["causal", "everything"])
def test_forward_and_fold_replay_in_a_captured_graph(name):
    case = CASES[name]
    tensors = case.tensors(torch.bfloat16, "cuda")
    q, k, v = tensors[:3]
    options = case.options(*tensors)
    accumulator = fold.new_accumulator(q.shape[1], q.device)
    blank = accumulator.clone()

    def run(into=accumulator):
        out, rows = api.attend(q, k, v, options)
        fold.fold(into, q, k, rows, options)
        return out

    graph, out = _captured(run)
    accumulator.copy_(blank)
    expected = blank.clone()
    for _ in range(3):
        q.normal_()
        graph.replay()
        assert torch.equal(out, run(expected))
    assert torch.equal(accumulator, expected) and not torch.equal(accumulator, blank)


def test_a_recorded_forward_of_a_model_replays_in_a_captured_graph():
    model, tokens = _gpt().to(torch.bfloat16), _batch()
    with instrument(model) as instrumentation, torch.no_grad():
        recorder = Recorder(instrumentation, log_every=100, record_every=1)
        graph, _ = _captured(lambda: model(tokens))
        recorder.read()  # what ran outside of the graph
        for _ in range(3):
            graph.replay()
        stats = recorder.read()
    assert len(stats.layers) == 2
    assert all(layer.rows.tolist() == [3 * 3 * 96] * 4 for layer in stats.layers.values())


def test_snapshots_go_through_nccl(tmp_path):
    store, device = f"file://{tmp_path}/store", torch.device("cuda", 0)
    torch.cuda.set_device(device)  # as a launcher's processes do
    torch.distributed.init_process_group("nccl", init_method=store, rank=0, world_size=1, device_id=device)
    try:
        mesh = torch.distributed.init_device_mesh("cuda", (1, 1, 1), mesh_dim_names=("dp", "cp", "tp"))
        model, tokens = _gpt(), _batch()
        snapshots = []
        for ranks in (None, ProcessGroups.of_mesh(mesh, heads="tp", queries="cp")):
            with AttentionStabilityMonitor(model, log_every=1, ranks=ranks) as monitor, torch.no_grad():
                model(tokens)
                snapshots.append(monitor.on_step().stats)
    finally:
        torch.distributed.destroy_process_group()
    alone, together = snapshots
    assert list(alone) == list(together)
    for ours, theirs in zip(together.values(), alone.values()):
        torch.testing.assert_close(torch.from_numpy(ours.values), torch.from_numpy(theirs.values))
