"""Monitors of compiled models: a graph measures each step itself, and gives what an eager model gives."""

import copy

import numpy as np
import pytest
import torch
import transformers
from attention_layers import LLAMA, TOKENS
from compat_helpers import carried_by
from test_every_step import DEVICE, HEADS, WIDTH, batch, diagnosis_of
from torch import nn
from torch._dynamo.utils import counters
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from hnf_attention import AttentionStabilityMonitor

pytestmark = [
    # PyTorch's own words, while it compiles whatever model.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]
LAYERS = ["layers.0", "layers.1"]
TENSORS = ("query", "key", "value", "out")


class Attention(nn.Module):
    """spoil: what is added to q, k and v; no graph is compiled again for it."""

    def __init__(self, kv_heads=HEADS):
        super().__init__()
        self.kv_heads = kv_heads
        self.qkv = nn.Linear(WIDTH, WIDTH + 2 * WIDTH * kv_heads // HEADS)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.mask = None
        self.register_buffer("spoil", torch.zeros(3, HEADS, 1, 1))

    def forward(self, x):
        width = WIDTH * self.kv_heads // HEADS
        q, k, v = (
            y.unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2)
            for y in self.qkv(x).split((WIDTH, width, width), -1)
        )
        q = q + self.spoil[0]
        k, v = (y + self.spoil[i, :: HEADS // self.kv_heads] for i, y in ((1, k), (2, v)))
        gqa, causal = self.kv_heads != HEADS, self.mask is None
        out = functional.scaled_dot_product_attention(q, k, v, self.mask, is_causal=causal, enable_gqa=gqa)
        return self.out(out.transpose(1, 2).flatten(2))


class WrittenAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        q = self.q(x).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        return (torch.softmax(q @ q.mT, -1) @ q).transpose(1, 2).flatten(2)


class Model(nn.Module):
    def __init__(self, recompute=None, **options):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Attention(**options) for _ in range(2))
        self.recompute = recompute

    def forward(self, x):
        for layer in self.layers:
            y = layer(x) if self.recompute is None else checkpoint(layer, x, use_reentrant=self.recompute)
            x = x + torch.nan_to_num(y)  # what breaks one layer does not reach the next
        return x

    def spoil(self, layer=0, name=None, head=0):
        """Break a tensor of a head, None for none."""
        with torch.no_grad():
            for each in self.layers:
                each.spoil.zero_()
            if name == "out":  # the scores overflow
                self.layers[layer].spoil[:2, head] = 1e30
            elif name is not None:
                self.layers[layer].spoil[TENSORS.index(name), head] = torch.nan


@pytest.fixture(autouse=True)
def afresh():
    torch._dynamo.reset()
    counters.clear()


def compiled(function, backend="aot_eager", **options):
    return torch.compile(function, backend=backend, fullgraph=True, **options)


def graphs():
    return counters["stats"]["unique_graphs"]


def train(run, monitor, steps, x, spoil=None, model=None):
    """Run steps. spoil: {step: (layer, tensor, head)} of `model`.

    Gradients are given back each time: those of a CUDA graph are overwritten by its next replay.
    """
    for step in range(monitor.step + 1, monitor.step + steps + 1):
        if spoil:
            model.spoil(*spoil.get(step, ()))
        run(x).float().square().mean().backward()
        monitor.model.zero_grad()
        if x is not None:
            x.grad = None
        monitor.on_step()


def snapshot(run, x, steps=5, **options):
    with AttentionStabilityMonitor(run, log_every=steps, **options) as monitor:
        train(run, monitor, steps, x)
    return monitor.history[-1]


def same(some, others, rtol=1e-4):
    assert list(some.layers) == list(others.layers)
    assert some.forwards == others.forwards
    for name, stats in some.layers.items():
        assert stats.dtype == others.layers[name].dtype
        np.testing.assert_allclose(stats.values, others.layers[name].values, rtol=rtol, atol=rtol)


@pytest.mark.slow
@carried_by("example_of", "items")
def test_a_graph_gives_what_the_model_gives():
    model, x = Model().to(DEVICE), batch(100)
    run = compiled(model)
    same(snapshot(run, x), snapshot(model, x))
    with torch._dynamo.config.patch(error_on_recompile=True):
        again = snapshot(run, x, steps=3, record_every=1)  # with the graph of before
    same(again, snapshot(model, x, steps=3, record_every=1))
    assert again.forwards.training == 3 and graphs() == 1
    assert not any("_hnf_attention_layer" in vars(module) for module in model.modules())


def mask_of(kind, length):
    causal = torch.ones(length, length, dtype=torch.bool, device=DEVICE).tril()
    if kind == "bool":
        return causal
    if kind == "additive":
        least = torch.finfo(torch.float32).min
        return torch.zeros(length, length, device=DEVICE).masked_fill(~causal, least)[None, None]
    if kind == "padded":
        keys = torch.arange(length, device=DEVICE) < length - torch.tensor([[0], [9]], device=DEVICE)
        return causal & keys[:, None, None]
    return None


@pytest.mark.slow
@carried_by("mark_static")  # two graphs for "dynamic" without it: the accumulator has a size of 70, too
@pytest.mark.parametrize(
    "kind",
    ["grouped", "autocast", "blocks", "checkpoint", "reentrant", "dynamic", "bool", "additive", "padded"],
)
def test_every_kind_gives_what_the_model_gives(kind):
    recompute = {"checkpoint": False, "reentrant": True}.get(kind)
    model, x = Model(recompute, kv_heads=2 if kind == "grouped" else HEADS).to(DEVICE), batch(70)
    for layer in model.layers:
        layer.mask = mask_of(kind, 70)
    plain = copy.deepcopy(model)
    run = model
    if kind == "blocks" or recompute is not None:
        for layer in model.layers:
            layer.compile(backend="aot_eager", fullgraph=True)
    else:
        run = compiled(model, dynamic=kind == "dynamic")
    with torch.autocast(DEVICE, torch.bfloat16, enabled=kind == "autocast"):
        same(snapshot(run, x, record_every=2), snapshot(plain, x, record_every=2), rtol=1e-3)
        if kind == "dynamic":
            same(snapshot(run, batch(33)), snapshot(plain, batch(33)), rtol=10)
            assert graphs() == 1
    assert graphs() <= {"blocks": 2, "checkpoint": 2, "reentrant": 3}.get(kind, 1)


@pytest.mark.slow
def test_hugging_face_with_grouped_heads_and_padding():
    config = copy.deepcopy(LLAMA)
    config._attn_implementation = "sdpa"
    model, tokens = transformers.LlamaModel(config).to(DEVICE), TOKENS.to(DEVICE)
    mask = torch.ones_like(tokens)
    mask[0, 15:] = 0

    def run(call):
        def forward(_):
            return call(tokens, attention_mask=mask, use_cache=False).last_hidden_state

        with AttentionStabilityMonitor(model, log_every=3) as monitor:
            train(forward, monitor, 3, None)
            measured = monitor.instrumentation.coverage.measured
        assert set(measured.values()) == {"probe (transformers sdpa)"}
        return monitor.history[-1]

    same(run(compiled(model)), run(model))


@pytest.mark.slow
def test_the_second_forward_of_a_checkpoint_in_a_graph_is_not_measured():
    model, x = Model(recompute=False).to(DEVICE), batch(70)
    same(snapshot(compiled(model, "aot_eager_decomp_partition"), x), snapshot(Model(False).to(DEVICE), x))


@pytest.mark.parametrize(
    "log_every", [10, pytest.param(1, marks=pytest.mark.slow), pytest.param(100, marks=pytest.mark.slow)]
)
def test_a_nan_is_named_right_at_any_cadence_in_a_graph(log_every):
    model, x = Model().to(DEVICE), batch(24)
    run = compiled(model)
    first = {name: 13 + 11 * place for place, name in enumerate(TENSORS)}  # 13, 24, 35, 46
    spoil = {step: (1, name, place) for place, (name, step) in enumerate(first.items())}
    with AttentionStabilityMonitor(run, log_every=log_every) as monitor:
        train(run, monitor, max(50, log_every), x, spoil, model)
    assert graphs() == 1
    if log_every == 1:  # there are no steps in between: the readings name them
        for place, (name, step) in enumerate(first.items()):
            (issue,) = [
                x for x in diagnosis_of(monitor, step) if x.issue_type == "non_finite" and x.head == place
            ]
            assert issue.layer == "layers.1" and f"step {step}" in issue.evidence, (name, issue.evidence)
        return
    for place, (name, step) in enumerate(first.items()):
        stats = monitor.history[(step - 1) // log_every].layers["layers.1"]
        for other in TENSORS:
            found = getattr(stats, f"first_nonfinite_{other}")[place]
            assert (found == step) == (other in (name, "out")), (name, other, found)
        assert stats.first_nonfinite_step[place] == step
    for each in monitor.history:
        assert np.isnan(each.layers["layers.0"].first_nonfinite_step).all()


@pytest.mark.slow
def test_evaluation_and_failed_forwards_are_left_out():
    model, x = Model().to(DEVICE), batch(24)
    run = compiled(model)

    class Fails(nn.Module):
        def __init__(self):
            super().__init__()
            self.model, self.fail = run, False

        def forward(self, x):
            out = self.model(x)
            if self.fail:
                raise ValueError("out of luck")
            return out

    whole = Fails()
    with AttentionStabilityMonitor(whole, log_every=1) as monitor:
        train(whole, monitor, 1, x)
        with torch.no_grad():
            whole(2 * x)
        whole.fail = True
        with pytest.raises(ValueError, match="out of luck"):
            whole(3 * x)
        whole.fail = False
        train(whole, monitor, 1, x)
        with torch.no_grad():
            whole(2 * x)
        monitor.on_step()
    first, second, evaluation = monitor.history
    assert tuple(second.forwards) == (1, 1, 1) and tuple(evaluation.forwards) == (0, 1, 0)
    for name, stats in first.layers.items():
        np.testing.assert_array_equal(stats.values, second.layers[name].values)
    assert not evaluation.training and list(evaluation.layers) == list(first.layers)


@pytest.mark.slow
def test_a_compiled_training_step_is_measured_without_a_forward_that_is_told_of():
    model, x = Model().to(DEVICE), batch(24)

    def loss(x):
        return model(x).square().mean()

    run = compiled(loss)
    with AttentionStabilityMonitor(model, log_every=4) as monitor:
        for step in range(1, 9):
            model.spoil(0, "key" if step == 6 else None, 3)
            run(x).backward()
            with torch.no_grad():
                run(7 * x)
            monitor.on_step()
        assert "without grad" in monitor.instrumentation.coverage.measured["layers.0"]
    first, second = monitor.history
    assert first.forwards == (1, 1, 0) and first.layers["layers.0"].rows.tolist() == [48] * 4
    assert np.isfinite(first.layers["layers.0"].between_max_logit).all()
    stats = second.layers["layers.0"]
    assert stats.first_nonfinite_step[3] == 6 and stats.first_nonfinite_key[3] == 6


@pytest.mark.slow
def test_what_a_graph_cannot_measure_itself_is_measured_as_before_and_said():
    model, x = Model().to(DEVICE), batch(24)
    model.layers[1] = WrittenAttention().to(DEVICE)
    run = compiled(model)
    for _ in range(2):  # also by a graph from before
        with AttentionStabilityMonitor(run, log_every=3) as monitor:
            train(run, monitor, 3, x)
            measured = monitor.instrumentation.coverage.measured
        assert (
            "extremes at measured steps only: a compiled graph calls it by another function"
            in measured["layers.1"]
        )
        assert "extremes" not in measured["layers.0"]
        first, second = (monitor.history[0].layers[name] for name in ("layers.0", "layers.1"))
        assert np.isfinite(first.between_max_logit).all() and np.isnan(second.between_max_logit).all()
        assert first.rows.sum() == second.rows.sum() > 0
    assert graphs() == 1


@pytest.mark.slow
@pytest.mark.parametrize("every_step", [True, False])
def test_outputs_and_gradients_are_the_same_bits(every_step):
    def numbers(monitored):
        model, x = Model().to(DEVICE), torch.ones(2, 40, WIDTH, device=DEVICE)
        run = compiled(model, "inductor")
        found = []
        with torch.no_grad():
            found.append(run(x))
        if monitored:
            monitored = AttentionStabilityMonitor(run, log_every=2, every_step=every_step)
        for _ in range(3):
            out = run(x)
            out.square().sum().backward()
            found += [out.detach(), *(p.grad.clone() for p in model.parameters())]
            if monitored:
                monitored.on_step()
        if monitored:
            monitored.restore()
        return found

    for one, other in zip(numbers(True), numbers(False), strict=True):
        assert torch.equal(one, other)
