"""Traces of steps with NaN and inf: cause, layer, head, row; what a trace leaves as it was; its reproduction."""

import copy
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from hnf_attention import AttentionStabilityMonitor, attention, trace_non_finite
from hnf_attention.diagnosis.triage import causes

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def bench(monkeypatch):
    """The faults that the benchmark injects: (faults, judge)."""
    if not (ROOT / "bench" / "validation" / "triage_faults.py").is_file():
        pytest.skip("the benchmarks are in the checkout only")
    monkeypatch.syspath_prepend(str(ROOT))
    from bench.validation import triage_causes, triage_faults

    return triage_faults.FAULTS, triage_causes.judge


QUICK = [
    ("fp16 product, plain", 2, 1),
    ("a backward kernel at fault", 0, 3),
]


@pytest.mark.parametrize("name, layer, head", QUICK, ids=[x[0] for x in QUICK])
def test_an_injected_fault_is_traced_to_layer_head_and_cause(bench, name, layer, head):
    found = bench[1](name, layer, head)
    assert found["right"], found


@pytest.mark.slow
@pytest.mark.parametrize("share", [pytest.param(1, marks=pytest.mark.exhaustive), 2])
def test_ninety_five_of_a_hundred_injected_faults_are_traced(bench, share):
    faults, judge = bench
    assert len(faults) >= 40
    rows = [judge(name, 1, 2) for name in list(faults)[::share]]
    missed = [row for row in rows if not row["right"]]
    assert len(missed) <= 0.05 * len(rows), missed


@pytest.mark.exhaustive
@pytest.mark.slow
def test_every_reproduction_shows_its_fault(bench, tmp_path, capsys):
    faults, judge = bench
    for number, name in enumerate(faults):
        folder = tmp_path / str(number)
        if name.startswith("loss scale"):
            continue  # its tensors are numbers of the scaler, which are finite
        judge(name, 1, 2, folder)
        runpy.run_path(str(folder / "reproduce.py"))
        assert "NOT FINITE" in capsys.readouterr().out, name


def broken():
    """A model of two layers, whose second one has a weight that float32 cannot multiply."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 4))
    with torch.no_grad():
        model[2].weight.fill_(3e38)
    return model


def step_of(model):
    return lambda: model(torch.full((3, 4), 10.0)).square().mean()


def test_an_overflow_that_double_precision_does_not_have_is_told():
    model = broken()
    trace = trace_non_finite(model, step_of(model), step=7)
    assert (trace.cause, trace.layer, trace.phase, trace.step) == (causes.ACTIVATION, "2", "forward", 7)
    assert trace.wide.dtype == "float64" and trace.wide.finite
    assert "float32 (3.4028e+38)" in trace.evidence and "at step 7" in str(trace)
    assert trace_non_finite(model, step_of(model), wide=False).wide is None


def everything(model, optimizer):
    state = copy.deepcopy([*model.state_dict().values(), optimizer.state_dict()])
    grads = [None if x.grad is None else x.grad.clone() for x in model.parameters()]
    return state, grads, torch.get_rng_state(), [x.data_ptr() for x in model.parameters()]


def test_a_trace_leaves_everything_as_it_was():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 1))
    optimizer = torch.optim.AdamW(model.parameters(), 0.1)
    inputs = torch.randn(5, 4)

    def step():
        optimizer.zero_grad()
        loss = model(inputs).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss * float("nan")

    step()  # a first step makes the optimizer's state
    before = everything(model, optimizer)
    trace = trace_non_finite(model, step, optimizer=optimizer)
    assert trace.cause == causes.WRITTEN
    after = everything(model, optimizer)
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    assert all(x.dtype == torch.float32 for x in model.parameters())


def test_a_closure_that_steps_by_itself_is_not_stepped_twice():
    model = nn.Linear(2, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    seen = []

    def step():
        optimizer.zero_grad()
        loss = model(torch.ones(1, 2)).sum() * torch.nan
        loss.backward()
        optimizer.step()
        seen.append(sum(bool(x.isnan().all()) for x in model.parameters()))
        return loss

    hook = optimizer.register_step_post_hook(lambda *_: seen.append("stepped"))
    trace = trace_non_finite(model, step, optimizer=optimizer, wide=False)
    hook.remove()
    assert trace.cause == causes.WRITTEN and seen.count("stepped") == 3 and seen.count(1) == 3


def test_a_closure_that_scales_by_itself_is_unscaled_and_stepped():
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=1e-40)

    def step():
        model(torch.ones(1, 2)).sum().backward()
        optimizer.zero_grad(set_to_none=False)  # which is no step
        loss = model(torch.ones(1, 2)).sum()
        scaler.scale(loss).backward()
        return loss

    trace = trace_non_finite(model, step, optimizer=optimizer, scaler=scaler, wide=False)
    assert trace.cause == causes.SCALER and trace.phase == "loss scaling"


def test_memory_that_another_kernel_writes_is_told():
    class Kernel(nn.Module):
        def forward(self, x):
            out = torch.empty_like(x, requires_grad=False)
            out.numpy()[:] = float("nan")  # no operator of PyTorch
            return x + out

    model = nn.Sequential(nn.Linear(4, 4), Kernel())
    trace = trace_non_finite(model, torch.ones(2, 4), torch.sum, wide=False)
    assert (trace.cause, trace.layer) == (
        causes.KERNEL,
        "1",
    ) and "outside of PyTorch's operators" in trace.evidence


def test_the_users_graph_can_still_go_back_after_a_trace():
    model = nn.Linear(4, 1)
    loss = model(torch.randn(2, 4)).square().mean()
    trace_non_finite(model, lambda: model(torch.randn(2, 4)).mean() / 0.0)
    loss.backward()  # raises if a weight that the graph saved counts as changed
    assert model.weight.grad is not None


def test_the_reproduction_is_one_row_of_the_operation(tmp_path, capsys):
    model = broken()
    trace = trace_non_finite(model, step_of(model), folder=tmp_path)
    assert trace.reproduction == tmp_path
    script = (tmp_path / "reproduce.py").read_text()
    assert len(script.splitlines()) <= 20 and trace.cause in script
    runpy.run_path(str(tmp_path / "reproduce.py"))
    said = capsys.readouterr().out
    assert "mat1: torch.float32 (1, 4), finite" in said and "result 0: NOT FINITE [-inf]" in said
    trace_non_finite(model, step_of(model), folder=tmp_path)  # its own files may be written again
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ValueError, match=r"expected an empty folder .* notes\.txt"):
        trace_non_finite(model, step_of(model), folder=tmp_path)


def test_a_reproduction_without_safetensors_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match=r"pip install 'hnf-attention\[huggingface\]'"):
        trace_non_finite(nn.Linear(1, 1), torch.ones(1), folder=tmp_path)


def test_a_finite_step_is_said_to_be_finite_with_what_passed():
    model = nn.Linear(4, 4)
    inputs = torch.ones(2, 4)
    trace = trace_non_finite(model, inputs, lambda out: torch.where(out < 9, out, inputs / 0.0).sum())
    assert not trace.found and trace.evidence.startswith("everything is finite, loss")
    assert "reached neither loss nor gradients; the first was aten.div" in trace.notes[0]
    assert trace.to_dict()["cause"] is None


def test_a_check_for_nan_that_ends_the_step_is_no_obstacle():
    model = broken()

    def step():
        loss = step_of(model)()
        if not loss.isfinite():
            raise FloatingPointError("loss is not finite")
        return loss

    trace = trace_non_finite(model, step)
    assert (trace.cause, trace.layer) == (causes.ACTIVATION, "2")
    assert trace.symptoms == ("the error that ended the step",)


def test_an_error_of_a_finite_step_comes_out():
    def step():
        raise KeyError("tokens")

    with pytest.raises(KeyError, match="tokens"):
        trace_non_finite(nn.Linear(1, 1), step)


class Checkpointed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.first, self.second, self.reentrant = nn.Linear(4, 4), nn.Linear(4, 4), reentrant
        self.second.register_forward_hook(lambda _m, _i, out: out + (out - out.detach()).abs().sqrt())

    def forward(self, x):
        return checkpoint(lambda y: self.second(self.first(y)), x, use_reentrant=self.reentrant).sum()


@pytest.mark.parametrize("reentrant", [False, True])
def test_the_backward_of_a_checkpoint_is_traced_to_its_module(reentrant):
    model = Checkpointed(reentrant)
    trace = trace_non_finite(model, torch.ones(2, 4, requires_grad=True))
    assert (trace.cause, trace.phase, trace.layer) == (causes.UNDEFINED, "backward", "second"), trace


@pytest.mark.parametrize(
    "arguments, said",
    [
        (dict(model=3), "expected model to be a torch.nn.Module, got int"),
        (dict(batch=3), "expected a batch .* or a callable without arguments .*, got int"),
        (dict(loss=3), "expected loss to be None or a callable"),
        (dict(optimizer=3), "expected optimizer to be a torch.optim.Optimizer, got int"),
        (dict(scaler=3), "expected scaler to be a torch.amp.GradScaler, got int"),
    ],
)
def test_wrong_arguments_are_refused(arguments, said):
    with pytest.raises(TypeError, match=said):
        trace_non_finite(**{"model": nn.Linear(1, 1), "batch": torch.ones(1), **arguments})


def test_a_monitor_that_computes_outputs_says_that_a_trace_runs_the_models_own():
    model = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    inputs = torch.full((1, 4, 32), torch.nan)
    with AttentionStabilityMonitor(model, mode="fused") as monitor:
        trace = monitor.trace(inputs, torch.sum, wide=False)
    assert trace.cause == causes.INPUT and "mode='fused'" in trace.notes[-1]


def test_a_monitor_traces_and_says_when_it_first_saw_it():
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 2)
    inputs = torch.randn(2, 12, 32)
    with AttentionStabilityMonitor(model, log_every=1) as monitor:
        model(inputs)
        monitor.on_step()
        with torch.no_grad():
            model.layers[1].self_attn.in_proj_weight[32 + 2 * 8 + 1, 3] = torch.nan  # a key of head 2
        model(inputs)
        monitor.on_step()
        snapshots = len(monitor.history)
        trace = monitor.trace(inputs, lambda out: out.square().mean())
        assert (trace.cause, trace.layer, trace.heads) == (causes.WEIGHT, "layers.1.self_attn", (2,))
        assert trace.step == 2 and trace.tensor == "layers.1.self_attn.in_proj_weight"
        assert "the monitor first saw it at step 2, in layer layers.1.self_attn" in trace.notes[-1]
        monitor.on_step()  # the forwards of the trace are no forwards of the training
        assert len(monitor.history) == snapshots


@torch.library.custom_op("test_triage::padded_attention", mutates_args=())
def padded_attention(query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Like PyTorch's memory-efficient kernel: the lse of rows that pad it is +inf."""
    lse = torch.full((query.shape[0], 32), torch.inf)
    lse[:, : query.shape[1]] = query.logsumexp(-1)
    return query.softmax(-1), lse


@torch.library.custom_op("test_triage::padded_attention_backward", mutates_args=())
def padded_attention_backward(
    grad_out: torch.Tensor, query: torch.Tensor, logsumexp: torch.Tensor
) -> torch.Tensor:
    return grad_out * query * logsumexp[:, : query.shape[1], None]


padded_attention.register_autograd(
    lambda ctx, grad_out, _: padded_attention_backward(grad_out, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(inputs[0], output[1]),
)


def test_the_padding_of_an_lse_is_no_origin():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].register_forward_hook(lambda _m, _i, out: out + (out - out.detach()).abs().sqrt())
    trace = trace_non_finite(
        model, torch.ones(2, 3, 4), lambda out: padded_attention(out)[0].sum(), wide=False
    )
    assert (trace.cause, trace.layer, trace.phase) == (causes.UNDEFINED, "0", "backward"), trace


class OwnAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.project = nn.Linear(32, 96)

    def forward(self, x):
        q, k, v = (y.unflatten(-1, (4, 8)).transpose(1, 2) for y in self.project(x).chunk(3, -1))
        return attention(q, k, v)[0].square().mean()


def test_a_product_beyond_float32_inside_this_packages_attention_is_no_fault_of_its_kernel():
    torch.manual_seed(0)
    model = OwnAttention()
    with torch.no_grad():
        model.project.weight[8:16] *= 1e20
        model.project.weight[40:48] *= 1e20
    trace = trace_non_finite(model, torch.randn(2, 12, 32), wide=False)
    assert (trace.cause, trace.layer, trace.heads) == (causes.PRODUCT, "", (1,)), trace


def test_what_nobody_was_seen_to_write_is_said_not_to_be_traced():
    model = nn.Linear(2, 1)
    unused = nn.Parameter(torch.full((1,), torch.nan))
    model.register_parameter("unused", unused)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    trace = trace_non_finite(model, lambda: model(torch.ones(1, 2)).sum(), optimizer=optimizer)
    assert trace.cause == causes.UNTRACED and trace.symptoms == ("weight unused",)
    assert "no operation was seen" in str(trace)


class MarkedParameter(nn.Parameter):
    """A subclass that computes as its base does, as quantised weights of other libraries are."""


def test_subclasses_of_parameters_are_looked_at():
    model = nn.Linear(4, 4)
    model.weight = MarkedParameter(torch.full((4, 4), torch.nan))
    trace = trace_non_finite(model, torch.ones(2, 4), torch.sum, wide=False)
    assert (trace.cause, trace.tensor) == (causes.WEIGHT, "weight")


@pytest.mark.slow
def test_a_reproduction_needs_torch_and_safetensors_only(tmp_path):
    model = broken()
    trace_non_finite(model, step_of(model), folder=tmp_path)
    command = [sys.executable, "-W", "error", str(tmp_path / "reproduce.py")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env={})
    assert done.returncode == 0 and "result 0: NOT FINITE [-inf]" in done.stdout, done.stderr


def test_a_closures_own_scaler_goes_on_as_it_was():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60)
    inputs = torch.ones(2, 4)

    def step():
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = model(inputs).sum()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        return loss

    step()
    scaler.update()
    before = scaler.state_dict()
    trace = trace_non_finite(model, step, optimizer=optimizer, scaler=scaler)
    assert trace.cause == causes.GRADIENT and trace.notes == () and trace.wide.finite, trace
    assert scaler.state_dict() == before
    step()  # raises if the scaler counts as stepped already
