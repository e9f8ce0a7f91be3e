"""What every drop-in module promises beside its numbers: compilation, checkpoints, threads, copies, monitors."""

import copy
import pickle
import threading

import pytest
import torch
from compat_helpers import compiled
from torch import nn
from torch._dynamo.exc import Unsupported
from torch.utils.checkpoint import checkpoint

from hnf_attention import AttentionStabilityMonitor, apply_intervention, instrument
from hnf_attention.nn import GroupedQueryAttention, MultiheadAttention, QKNorm, ScaledDotProductAttention

B, M, E = 2, 7, 16


class Layer(nn.Module):
    """A drop-in as a layer of a model: one argument, one result."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.project = kind, nn.Linear(E, E)
        if kind == "sdpa":
            self.attention = ScaledDotProductAttention()
        elif kind == "grouped":
            norm = QKNorm(unit_offset=True)
            options = {"qk_norm": norm, "softcap": 5.0, "sinks": True, "window_size": 4}
            self.attention = GroupedQueryAttention(E, 4, 2, **options)
        else:
            self.attention = MultiheadAttention(E, 4, batch_first=True, dropout=0.2 * (kind == "dropout"))

    def forward(self, x):
        x = self.project(x)
        if self.kind == "sdpa":
            q = x.unflatten(-1, (4, 4)).transpose(1, 2)
            return self.attention(q, q, q, is_causal=True).transpose(1, 2).flatten(2)
        if self.kind == "grouped":
            return self.attention(x)
        return self.attention(x, x, x, need_weights=self.kind == "weights")[0]

    @property
    def rows(self):
        return self.attention.row_stats


KINDS = ["sdpa", "grouped", "multihead", "weights", "dropout"]
#: To compile one takes seconds.
compiled_kinds = pytest.mark.parametrize(
    "kind", [pytest.param(x, marks=[pytest.mark.exhaustive] if x != "grouped" else []) for x in KINDS]
)
every_kind = pytest.mark.parametrize(
    "kind", [pytest.param(x, marks=[] if x in ("grouped", "multihead") else pytest.mark.slow) for x in KINDS]
)


def layer(kind):
    torch.manual_seed(0)
    return Layer(kind), torch.randn(B, M, E, requires_grad=True)


def step(model, x, *parameters):
    torch.manual_seed(1)
    out = model(x)
    return out, *torch.autograd.grad(out.square().sum(), [x, *parameters])


@pytest.mark.slow
@compiled_kinds
def test_it_compiles_in_one_graph_and_keeps_its_statistics(kind):
    model, x = layer(kind)
    expected, rows = step(model, x, *model.parameters()), model.rows
    fast = compiled(model, backend="aot_eager")
    torch.testing.assert_close(step(fast, x, *model.parameters()), expected)
    assert model.rows is not rows and not model.rows.entropy.requires_grad
    torch.testing.assert_close(model.rows.entropy, rows.entropy)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(2):
            before = model.rows
            fast(x)
            assert model.rows is not before


@pytest.mark.slow
@compiled_kinds
def test_a_compiled_one_hands_its_statistics_to_a_monitor(kind):
    model, x = layer(kind)
    fast = compiled(model, backend="aot_eager")
    with instrument(fast) as handle:
        fast(x.detach())
        assert torch.equal(handle.latest["attention"].rows.entropy, model.rows.entropy)
        assert handle.coverage.measured["attention"].startswith("fused (hnf_attention.nn.")
        assert not handle.coverage.not_measured


@every_kind
def test_it_hands_its_statistics_to_instrument(kind, monkeypatch):
    model, x = layer(kind)
    expected = step(model, x, *model.parameters())
    for mode in ("probe", "fused", "auto"):
        with instrument(model, mode) as handle:
            monkeypatch.setattr(handle, "_probe", None)  # nothing has to be measured a second time
            found = step(model, x, *model.parameters())
            assert all(map(torch.equal, found, expected))
            assert handle.latest["attention"].rows.entropy is model.rows.entropy
            assert handle.coverage.measured["attention"].startswith("fused (hnf_attention.nn.")
            assert not handle.coverage.not_measured


@every_kind
def test_a_monitor_judges_its_heads_at_every_step(kind):
    model, x = layer(kind)
    monitor = AttentionStabilityMonitor(model, log_every=2)
    for number in range(4):
        model(x).sum().backward()
        diagnosis = monitor.on_step()
        assert (diagnosis is None) == (number % 2 == 0)
    layers = diagnosis.to_dict()["layers"]
    assert list(layers) == ["attention"] and len(layers["attention"]["rows"]) == 4
    monitor.restore()


@every_kind
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_checkpoint_gives_the_same_gradients_and_leaves_the_statistics(kind, use_reentrant):
    model, x = layer(kind)
    expected = step(model, x)
    model.project.weight.grad = None
    torch.manual_seed(1)
    out = checkpoint(model, x, use_reentrant=use_reentrant)
    rows = model.rows
    x.grad = None
    out.square().sum().backward()
    assert torch.equal(out, expected[0])
    torch.testing.assert_close(x.grad, expected[1])
    assert model.rows is rows


@pytest.mark.slow
@compiled_kinds
def test_a_checkpoint_in_one_compiled_graph_needs_an_option_of_dynamos(kind):
    expected = layer(kind)[0].eval()(layer(kind)[1])
    model, x = layer(kind)
    model.eval()
    with pytest.raises(Unsupported, match="skip_fwd_side_effects_in_bwd_under_checkpoint"):
        compiled(lambda x: checkpoint(model, x, use_reentrant=False))(x)
    with torch._dynamo.config.patch(skip_fwd_side_effects_in_bwd_under_checkpoint=True):
        out = compiled(lambda x: checkpoint(model, x, use_reentrant=False))(x)
    out.square().sum().backward()
    torch.testing.assert_close(out, expected)
    assert model.rows is not None and x.grad is not None


@every_kind
def test_copies_and_pickles_leave_the_statistics_behind(kind):
    model, x = layer(kind)
    model.eval()
    out = model(x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert model.rows is not None and other.rows is None
        assert torch.equal(other(x), out) and other.rows is not None


@every_kind
def test_threads_do_not_see_each_other(kind):
    models = [layer(kind)[0].eval() for _ in range(3)]
    inputs = [torch.randn(B, M + i, E, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    expected = [model(x) for model, x in zip(models, inputs)]
    found = [None] * 3

    def work(i):
        for _ in range(5):
            found[i] = models[i](inputs[i])

    with instrument(models[0]) as handle:
        threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert handle.latest["attention"].rows.lse.shape == (B, 4, M)
    assert all(map(torch.equal, found, expected))
    assert [model.rows.lse.shape[2] for model in models] == [M, M + 1, M + 2]


@every_kind
def test_autocast_takes_the_dtype_that_pytorch_would(kind):
    model, x = layer(kind)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x)
        out.float().sum().backward()
    assert out.dtype == torch.bfloat16 and model.rows.lse.dtype == torch.float32
    assert x.grad.dtype == torch.float32 and x.grad.isfinite().all()


@pytest.mark.parametrize("kind", ["sdpa", "grouped", "multihead"])
def test_a_transform_of_torch_func_keeps_no_statistics(kind):
    model, x = layer(kind)
    model(x)
    batch = torch.stack([x, 2 * x]).detach()
    torch.testing.assert_close(torch.func.vmap(model)(batch), torch.stack([model(x), model(2 * x)]))
    torch.func.vmap(model)(batch)
    assert model.rows is None


@every_kind
def test_no_grad_and_inference_keep_statistics(kind):
    model, x = layer(kind)
    model.eval()
    expected = model(x)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            torch.testing.assert_close(model(x), expected)
        assert model.rows is not None


@pytest.mark.parametrize("kind", ["sdpa", "multihead"])
def test_a_change_of_its_calls_is_made(kind):
    """A soft-cap takes the place of the module's own attention, and is what is measured."""
    model, x = layer(kind)
    nn.init.normal_(model.project.weight, std=3.0)
    before = model(x)
    action = {"action": "softcap", "layers": ["attention"], "cap": 0.5}
    applied = apply_intervention([], action, model=model)
    with instrument(model) as handle:
        capped = model(x)
        rows = handle.latest["attention"].rows
        assert rows.max_logit.max() <= 0.5 and not torch.equal(capped, before)
    assert model.rows is None  # another function computed the call
    applied.revert()
    assert torch.equal(model(x), before) and model.rows is not None


@pytest.mark.parametrize("kind", ["sdpa", "grouped", "multihead"])
def test_tensors_without_numbers_have_no_statistics(kind):
    model = layer(kind)[0].to("meta")
    assert model(torch.empty(B, M, E, device="meta")).shape == (B, M, E)
    assert model.rows is None


@pytest.mark.parametrize("kind", ["sdpa", "multihead", "grouped"])
def test_the_ring_of_context_parallel_computes_its_attention(kind, monkeypatch):
    """Keys of other processes would be missing without it: it puts a function of its own in the place of SDPA."""
    (model, x), functional, rung = layer(kind), nn.functional, []
    expected, original = model(x), functional.scaled_dot_product_attention

    def ring(*args, **kwargs):
        rung.append(kwargs)
        return original(*args, **kwargs)

    ring.__module__ = "torch.distributed.tensor.experimental._attention"
    monkeypatch.setattr(functional, "scaled_dot_product_attention", ring)
    if kind == "grouped":
        with pytest.raises(
            RuntimeError, match="inside context_parallel, .* got some in hnf_attention.nn.Grouped"
        ):
            model(x)
    else:
        torch.testing.assert_close(model(x), expected)
        assert len(rung) == 1 and model.rows is None
