"""The steps that are not measured: their extremes, from calls that are kept until their forward ends."""

import gc

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from hnf_attention import AttentionStabilityMonitor, instrument
from hnf_attention.instrumentation import observer

WIDTH, HEADS = 32, 4
ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"


class Attention(nn.Module):
    """spoil: (tensor, head) that holds NaN in the next forward. kv_heads: of grouped queries."""

    def __init__(self, kv_heads=HEADS):
        super().__init__()
        self.kv_heads = kv_heads
        self.q = nn.Linear(WIDTH, WIDTH)
        self.k, self.v = (nn.Linear(WIDTH, WIDTH * kv_heads // HEADS) for _ in range(2))
        self.out = nn.Linear(WIDTH, WIDTH)
        self.spoil = None

    def forward(self, x):
        q, k, v = (
            layer(x).unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2) for layer in (self.q, self.k, self.v)
        )
        tensors, mask = {"query": q, "key": k, "value": v}, None
        if self.spoil is not None:
            name, head = self.spoil
            if name == "out":  # born in the scores: a NaN in an additive mask
                mask = torch.zeros(1, HEADS, x.shape[1], x.shape[1], device=x.device)
                mask[:, head, 5, 2] = torch.nan
            else:
                tensors[name] = tensors[name].clone()
                tensors[name][1, head, 5, 3] = torch.nan
        q, k, v = tensors.values()
        causal, gqa = mask is None, self.kv_heads != HEADS
        out = functional.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=gqa)
        return self.out(out.transpose(1, 2).flatten(2))


class Model(nn.Module):
    def __init__(self, layers=3, recompute=None, **options):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Attention(**options) for _ in range(layers))
        self.recompute = recompute  # None, or use_reentrant of the checkpoint around each layer

    def forward(self, x):
        for layer in self.layers:
            y = (
                layer(x)
                if self.recompute is None
                else checkpoint(layer, x, use_reentrant=self.recompute, preserve_rng_state=False)
            )
            x = x + torch.nan_to_num(y)  # what breaks one layer does not reach the next
        return x


def batch(length=40):
    return torch.randn(2, length, WIDTH, device=DEVICE, requires_grad=True)


def train(model, monitor, steps, spoil=None):
    """Run steps; spoil: {step: (layer, tensor, head)}. Returns the last diagnosis."""
    diagnosis = None
    for step in range(monitor.step + 1, monitor.step + steps + 1):
        if spoil and step in spoil:
            layer, *what = spoil[step]
            model.layers[layer].spoil = what
        model(batch()).square().mean().backward()
        for layer in model.layers:
            layer.spoil = None
        model.zero_grad()
        diagnosis = monitor.on_step() or diagnosis
    return diagnosis


@pytest.mark.parametrize("name", ["query", "key", "value", "out"])
@pytest.mark.parametrize(
    "log_every, step", [(1, 3), (10, 4), (10, 10), pytest.param(100, 57, marks=pytest.mark.slow)]
)
def test_a_nan_is_named_right_at_any_cadence(name, log_every, step):
    model = Model(layers=2).to(DEVICE)
    with AttentionStabilityMonitor(model, log_every=log_every) as monitor:
        train(model, monitor, max(log_every, 10), {step: (1, name, 2)})
        issues = [
            issue
            for snapshot in range(len(monitor.history))
            for issue in diagnosis_of(monitor, snapshot + 1)
            if issue.issue_type == "non_finite"
        ]
        (issue,) = issues
        assert (issue.layer, issue.head) == ("layers.1", 2)
        if step % log_every:
            stats = monitor.history[-1].layers["layers.1"]
            assert f"at step {step}, in forward {step}" in issue.evidence and issue.severity == "warning"
            for other in ("query", "key", "value", "out"):
                first = getattr(stats, f"first_nonfinite_{other}")
                assert (first[2] == step) == (other in (name, "out")), other
                assert np.isnan(np.delete(first, 2)).all()
            assert stats.first_nonfinite_step[2] == stats.first_nonfinite_forward[2] == step
            assert np.isnan(monitor.history[-1].layers["layers.0"].first_nonfinite_step).all()


def diagnosis_of(monitor, snapshots):
    from hnf_attention.diagnosis import diagnose

    return diagnose(monitor.history[:snapshots]).issues


def test_nan_that_stays_is_an_error_with_the_step_it_began_in():
    model = Model().to(DEVICE)
    with AttentionStabilityMonitor(model, log_every=10) as monitor:
        train(model, monitor, 10)
        spoil = {step: (1, "key", 0) for step in range(14, 21)}
        diagnosis = train(model, monitor, 10, spoil | {15: (0, "value", 1), 20: (0, "value", 1)})
    (error,) = diagnosis.errors
    assert error.layer == "layers.1" and error.head == 0 and "keys and outputs of head 0" in error.evidence
    assert "at step 14, in forward 14" in error.evidence and "origin is not known" not in error.evidence
    assert "first at step 14" in error.headline and "layers.0" in error.evidence


@pytest.mark.parametrize("options", [{}, {"kv_heads": 2}, {"recompute": True}, {"recompute": False}])
def test_largest_scores_are_lower_bounds_and_come_close(options):
    model = Model(**options).to(DEVICE)
    given = batch(100)
    with AttentionStabilityMonitor(model, log_every=9) as monitor:
        for _ in range(9):
            model(given).sum().backward()
            monitor.on_step()
    for stats in monitor.history[0].layers.values():
        between = stats.between_max_logit
        assert (between <= stats.max_logit + 1e-5).all() and (between > 0.5 * stats.max_logit).all()
        assert (stats.between_logit_range <= stats.logit_range_max + 1e-5).all()
        np.testing.assert_allclose(between, stats.max_logit, rtol=1e-4)  # eight forwards cover both blocks


@pytest.mark.parametrize("recompute", [None, True, False])
def test_outputs_and_gradients_are_the_same_bits(recompute):
    def run(every_step):
        model = Model(recompute=recompute).to(DEVICE)
        torch.manual_seed(1)
        with AttentionStabilityMonitor(model, log_every=100, every_step=every_step) as monitor:
            x = batch()
            out = model(x)
            out.square().sum().backward()
            monitor.on_step()
        return [out, x.grad, *(p.grad for p in model.parameters())]

    for one, other in zip(run(True), run(False), strict=True):
        assert torch.equal(one, other)


def test_nothing_is_kept_where_nobody_wants_it():
    gc.collect()  # of monitors of other tests
    before = observer.keeping | observer.active
    model = Model().to(DEVICE)
    with AttentionStabilityMonitor(model, log_every=100, every_step=False) as monitor:
        assert observer.keeping | observer.active == before
        train(model, monitor, 1)
    with AttentionStabilityMonitor(model, log_every=2) as monitor:
        assert observer.keeping and not observer.active
        with monitor.paused():
            assert not observer.keeping
            model(batch())
        monitor.on_step()
        assert observer.active and not observer.keeping
        train(model, monitor, 1)
        (snapshot,) = monitor.history
        assert all(np.isnan(x.between_max_logit).all() for x in snapshot.layers.values())
    assert not observer.keeping and not observer.active


def test_evaluation_is_left_out():
    model = Model().to(DEVICE)
    with AttentionStabilityMonitor(model, log_every=3) as monitor:
        with torch.no_grad():
            model.layers[0].spoil = ("query", 1)
            model(batch())
            model.layers[0].spoil = None
        train(model, monitor, 3)
    assert np.isnan(monitor.history[0].layers["layers.0"].first_nonfinite_step).all()


def test_tensors_live_no_longer_than_their_forward():
    model, handle = Model().to(DEVICE), []
    with instrument(model) as instrumentation:
        instrumentation.measuring, instrumentation.keeping = False, True
        instrumentation.on_kept = lambda kept: handle.append([len(kept.calls), kept.tensors[0][0].data_ptr()])
        out = model(batch())
        assert handle == [[3, handle[0][1]]]  # all calls together
        del out
        with torch.autograd.graph.save_on_cpu():
            model(batch())
        assert [number for number, _ in handle[1:]] == [1, 1, 1]  # autograd keeps them elsewhere
        model.requires_grad_(False)
        model(batch().detach())
        assert [number for number, _ in handle[4:]] == [1, 1, 1]


def test_calls_that_were_overwritten_are_left_out():
    class Overwrites(Model):
        def forward(self, x):
            q = k = v = self.layers[0].q(x).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            out = functional.scaled_dot_product_attention(q, k, v)
            v.detach().zero_()  # it shares its version with v
            return out

    model, seen = Overwrites(1).to(DEVICE), []
    with instrument(model) as instrumentation:
        instrumentation.measuring, instrumentation.keeping = False, True
        instrumentation.on_kept = lambda kept: seen.append(kept)
        model(batch())
    assert not seen


def test_a_layer_that_cannot_be_kept_says_so():
    model = Model().to(DEVICE)
    with AttentionStabilityMonitor(model, log_every=2) as monitor:
        monitor.instrumentation.on_kept = lambda kept: 1 / 0
        train(model, monitor, 2)
        coverage = monitor.instrumentation.coverage
    assert "extremes at measured steps only: ZeroDivisionError" in coverage.measured["layers.0"]
    assert len(monitor.history) == 1


def test_shared_modules_have_their_calls_apart():
    class Shared(Model):
        def forward(self, x):
            for _ in range(3):
                x = x + self.layers[0](x)
                self.layers[0].spoil = None
            return x

    model = Shared(1).to(DEVICE)
    with AttentionStabilityMonitor(model, log_every=4) as monitor:
        train(model, monitor, 4, {2: (0, "query", 3)})
    layers = monitor.history[0].layers
    assert list(layers) == ["layers.0#0", "layers.0#1", "layers.0#2"]
    assert layers["layers.0#0"].first_nonfinite_step[3] == 2


def test_descriptions_are_made_once(monkeypatch):
    from hnf_attention.instrumentation import measurer

    made = []
    describe = measurer.Measurer.describe_kept
    monkeypatch.setattr(
        measurer.Measurer, "describe_kept", lambda self, *args: made.append(args[0]) or describe(self, *args)
    )
    model = Model().to(DEVICE)
    with AttentionStabilityMonitor(model, log_every=100) as monitor:
        train(model, monitor, 5)
        assert made == ["layers.0", "layers.1", "layers.2"]
        model(batch(50)).sum().backward()
        assert len(made) == 6  # another length


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_heads_keep_their_name(dtype):
    model, given = Model().to(DEVICE), batch()
    with AttentionStabilityMonitor(model, log_every=3) as monitor:
        for _ in range(3):
            with torch.autocast(DEVICE, dtype):
                model(given).float().sum().backward()
            monitor.on_step()
    for stats in monitor.history[0].layers.values():
        assert stats.dtype == str(dtype).removeprefix("torch.")
        np.testing.assert_allclose(stats.between_max_logit, stats.max_logit, rtol=0.02)
