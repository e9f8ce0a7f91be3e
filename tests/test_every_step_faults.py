"""Kept calls beside what models and users do: nothing of the run changes, and the right layer and step are named."""

from functools import partial

import numpy as np
import pytest
import torch
from compat_helpers import carried_by
from test_every_step import DEVICE, HEADS, WIDTH, Attention, Model, batch, diagnosis_of, train
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from hnf_attention import AttentionStabilityMonitor, compat, instrument
from hnf_attention.instrumentation import layer_state, shared_masks
from hnf_attention.instrumentation.call import Unmeasurable


def between(monitor, layer="layers.0", snapshot=-1):
    return monitor.history[snapshot].layers[layer].between_max_logit


def non_finite(monitor):
    """The one issue about NaN over all snapshots, but for those that follow."""
    issues = [issue for last in range(len(monitor.history)) for issue in diagnosis_of(monitor, last + 1)]
    (issue,) = [x for x in issues if x.issue_type == "non_finite" and x.severity != "note"]
    return issue


# Nothing of the run changes


def test_memory_that_a_module_frees_is_not_read():
    class Freed(nn.Module):
        """As FSDP does: the parameter's memory goes when its module has run, and its view was the query."""

        def __init__(self):
            super().__init__()
            self.latent, self.made = nn.Parameter(torch.randn(1, HEADS, 20, 8)), None

        def forward(self, x):
            key = x.unflatten(-1, (HEADS, 8)).transpose(1, 2)
            made = key * 1
            out = functional.scaled_dot_product_attention(self.latent.expand(2, -1, -1, -1), key, made)
            self.made = made
            return out

    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = Freed()

        def forward(self, x):
            out = self.block(x)
            for tensor in (self.block.latent.data, self.block.made):
                tensor.untyped_storage().resize_(0)
            return out

    model, seen = Root(), []
    with instrument(model) as handle:
        handle.measuring, handle.keeping = False, True
        handle.on_kept = seen.append
        model(torch.randn(2, 20, WIDTH, requires_grad=True))
    assert len(seen) == 1  # at once, before anything was freed


@carried_by("saves_elsewhere")
@pytest.mark.parametrize("policy", [CheckpointPolicy.MUST_SAVE, CheckpointPolicy.PREFER_RECOMPUTE])
def test_selective_checkpoints_count_the_same_operators(policy):
    def choose(_, operator, *args, **kwargs):
        mine = operator in (torch.ops.aten.bmm.default, torch.ops.aten.mul.Tensor)
        return policy if mine else CheckpointPolicy.PREFER_RECOMPUTE

    class Mixed(Attention):
        def forward(self, x):
            return super().forward(x) @ self.out.weight * 0.5

    def gradient(every_step):
        torch.manual_seed(0)
        layer, x = Mixed(), torch.randn(2, 24, WIDTH, requires_grad=True)

        class Root(nn.Module):
            def __init__(self):
                super().__init__()
                self.layer = layer

            def forward(self, x):
                contexts = partial(create_selective_checkpoint_contexts, choose)
                return checkpoint(self.layer, x, use_reentrant=False, context_fn=contexts)

        model = Root()
        with AttentionStabilityMonitor(model, log_every=100, every_step=every_step):
            model(x).square().sum().backward()
        return x.grad

    torch.testing.assert_close(gradient(True), gradient(False), rtol=0, atol=0)


def test_a_function_of_the_users_own_in_sdpas_place(monkeypatch):
    plain = functional.scaled_dot_product_attention

    def mine(*args, tau=1.0, **kwargs):
        return plain(*args, **kwargs) * tau

    monkeypatch.setattr(functional, "scaled_dot_product_attention", mine)

    class Uses(nn.Module):
        def forward(self, x):
            q = x.unflatten(-1, (HEADS, -1)).transpose(1, 2)
            return functional.scaled_dot_product_attention(q, q, q, tau=2.0)

    model = Uses()
    x = torch.randn(2, 24, WIDTH, requires_grad=True)
    expected = model(x)
    with AttentionStabilityMonitor(model, log_every=100):
        assert torch.equal(model(x), expected)


def test_a_default_device_changes_nothing():
    model = Model().to(DEVICE)
    with AttentionStabilityMonitor(model, log_every=3) as monitor, torch.device("meta"):
        train(model, monitor, 3)
    assert np.isfinite(between(monitor)).all()


def test_masks_of_many_layers_are_not_held():
    class Biased(nn.Module):
        def forward(self, x, bias):
            q = x.unflatten(-1, (HEADS, -1)).transpose(1, 2)
            return functional.scaled_dot_product_attention(q, q, q, bias)

    held = []

    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(Biased() for _ in range(6))

        def forward(self, x):
            for layer in self.layers:
                out = layer(x, torch.zeros(1, HEADS, 24, 24))
                held.append(len(shared_masks._thread.made))
            return out

    model = Root()
    with instrument(model), torch.no_grad():
        model(torch.randn(2, 24, WIDTH))
    assert max(held) <= shared_masks.MOST_MADE


def test_copies_of_autocast_are_handed_on_at_once():
    class Rotary(Attention):
        def forward(self, x):
            q, k, v = (
                layer(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v)
            )
            return functional.scaled_dot_product_attention(q.float() * 1.5, k, v)

    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(Rotary() for _ in range(3))

        def forward(self, x):
            return [layer(x) for layer in self.layers][-1]

    model, seen = Root().to(DEVICE), []
    with instrument(model) as handle:
        handle.measuring, handle.keeping = False, True
        handle.on_kept = lambda kept: seen.append([call.dtype for call in kept.calls])
        with torch.autocast(DEVICE, torch.bfloat16):
            model(batch())
    assert seen == [[torch.bfloat16]] * 3


# The right layer, step and forward


def test_layers_come_in_their_order_where_some_are_checkpointed():
    class Partly(Model):
        def forward(self, x):
            x = x + torch.nan_to_num(self.layers[0](x))
            x = x + torch.nan_to_num(checkpoint(self.layers[1], x, use_reentrant=False))
            return x + self.layers[2](x)

    model = Partly().to(DEVICE)
    with AttentionStabilityMonitor(model, log_every=4) as monitor:
        train(model, monitor, 4, {2: (0, "query", 1)})
        assert list(monitor.history[0].layers) == ["layers.0", "layers.1", "layers.2"]


def test_measured_steps_between_log_steps_are_looked_at_too():
    model = Model(layers=2).to(DEVICE)
    with AttentionStabilityMonitor(model, log_every=10, record_every=5) as monitor:
        train(model, monitor, 10, {5: (1, "key", 1)})
        issue = non_finite(monitor)
    assert (issue.layer, issue.head) == ("layers.1", 1) and "at step 5, in forward 5" in issue.evidence


def test_the_first_forward_of_a_step_comes_first():
    model = Model().to(DEVICE)
    with AttentionStabilityMonitor(model, log_every=5) as monitor:
        train(model, monitor, 2)
        for layer in (2, 0):  # two forwards of step 3
            model.layers[layer].spoil = ("value", 3)
            model(batch()).sum().backward()
            model.layers[layer].spoil = None
        monitor.on_step()
        train(model, monitor, 2)
        issue = non_finite(monitor)
    assert (issue.layer, issue.head) == ("layers.2", 3) and "at step 3, in forward 3" in issue.evidence


def test_evaluation_forwards_are_not_counted():
    model = Model().to(DEVICE)
    with AttentionStabilityMonitor(model, log_every=5) as monitor:
        for _ in range(2):
            with torch.no_grad():
                model(batch())
            train(model, monitor, 1)
        train(model, monitor, 3, {4: (1, "out", 0)})
        assert "at step 4, in forward 4" in non_finite(monitor).evidence


def test_steps_that_a_rollback_does_again_are_forgotten():
    model = Model().to(DEVICE)
    with AttentionStabilityMonitor(model, log_every=10) as monitor:
        train(model, monitor, 10)
        state = monitor.state_dict()
        train(model, monitor, 4, {13: (1, "key", 1)})
        monitor.load_state_dict(state)
        train(model, monitor, 10)
        assert not [issue for issue in diagnosis_of(monitor, 2) if issue.issue_type == "non_finite"]


def test_a_layer_that_skips_a_log_step_keeps_its_extremes():
    class Skips(Model):
        skip = False

        def forward(self, x):
            x = x + torch.nan_to_num(self.layers[0](x))
            return x if self.skip else x + torch.nan_to_num(self.layers[1](x))

    model = Skips(2).to(DEVICE)
    with AttentionStabilityMonitor(model, log_every=3) as monitor:
        train(model, monitor, 2, {2: (1, "query", 2)})
        model.skip = True
        train(model, monitor, 1)
        assert list(monitor.history[0].layers) == ["layers.0"]
        model.skip = False
        train(model, monitor, 3)
        assert monitor.history[1].layers["layers.1"].first_nonfinite_step[2] == 2


def test_a_log_step_without_training_shows_the_evaluation():
    model = Model(1).to(DEVICE)
    with AttentionStabilityMonitor(model, log_every=2) as monitor:
        train(model, monitor, 1)
        with torch.no_grad():
            model(batch())
        monitor.on_step()
        (snapshot,) = monitor.history
        assert not snapshot.training and snapshot.layers["layers.0"].rows.min() > 0
        assert np.isnan(between(monitor)).all()
        train(model, monitor, 2)
        assert np.isfinite(between(monitor)).all()


def test_a_query_mask_counts_from_the_step_it_is_set_in():
    model, given = Model(1).to(DEVICE), batch()
    loud = given.detach().clone()
    loud[:, 30:] *= 100
    with AttentionStabilityMonitor(model, log_every=6) as monitor:
        model(given).sum().backward()
        monitor.on_step()
        mask = torch.ones(2, 40, dtype=torch.bool, device=DEVICE)
        mask[:, 30:] = False
        for _ in range(5):
            monitor.instrumentation.query_mask = mask
            model(loud.requires_grad_()).sum().backward()
            monitor.on_step()
        stats = monitor.history[0].layers["layers.0"]
        assert (stats.between_max_logit < 2 * stats.max_logit).all()


@carried_by("version")
def test_a_mask_that_is_overwritten_between_layers():
    class Masked(nn.Module):
        def forward(self, q, mask):
            return functional.scaled_dot_product_attention(q, q, q, mask)

    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(Masked() for _ in range(2))

        def forward(self, x):
            q = x.unflatten(-1, (HEADS, -1)).transpose(1, 2)
            mask = torch.zeros(1, 1, 40, 40, dtype=torch.bool, device=x.device)
            mask[..., :20] = True
            out = self.layers[0](q, mask)
            mask.fill_(1)
            return out + self.layers[1](q, mask)

    model, given = Root(), batch()
    given.data[:, 20:] *= 30
    with AttentionStabilityMonitor(model, log_every=3) as monitor:
        for _ in range(3):
            model(given).sum().backward()
            monitor.on_step()
        stats = monitor.history[0].layers["layers.0"]
        taken = np.nan_to_num(stats.between_max_logit, nan=-np.inf)
        assert (taken <= stats.max_logit + 1e-4).all()


# It is on, or it is said


def test_it_goes_on_beside_a_handle_that_measures():
    model = Model(2).to(DEVICE)
    with instrument(model), AttentionStabilityMonitor(model, log_every=10) as monitor:
        train(model, monitor, 10, {4: (1, "key", 2)})
        issue = non_finite(monitor)
    assert (issue.layer, issue.head) == ("layers.1", 2) and "at step 4" in issue.evidence


def test_a_failure_that_passes_ends_nothing(monkeypatch):
    model, faults = Model(1).to(DEVICE), [RuntimeError("out of memory"), None]
    with AttentionStabilityMonitor(model, log_every=12) as monitor:
        record = monitor._recorder._extremes.record

        def fails(*args):
            fault = faults.pop(0) if faults else None
            if fault is not None:
                raise fault
            record(*args)

        monkeypatch.setattr(monitor._recorder._extremes, "record", fails)
        train(model, monitor, 12, {9: (0, "query", 1)})
        assert "at step 9" in non_finite(monitor).evidence


def test_layers_rest_longer_each_time_and_unmeasurable_ones_for_good():
    layers = layer_state.KeptLayers()
    tried = []
    for call in range(20):
        if not layers.rests("a"):
            tried.append(call)
            layers.fail("a", ValueError("made up"))
    assert tried == [0, 1, 3, 7, 15] and layers.reasons == {"a": "ValueError: made up"}
    layers.succeed("a")
    assert not layers.reasons and not layers.rests("a")
    layers.fail("b", Unmeasurable("never", lasting=True))
    assert all(layers.rests("b") for _ in range(200))


def test_a_monitor_after_another_one_has_its_own_extremes():
    model = Model(1).to(DEVICE)
    with instrument(model) as handle:
        handle.measuring = False
        for _ in range(4):
            with AttentionStabilityMonitor(model, log_every=3) as monitor:
                train(model, monitor, 3)
                assert np.isfinite(between(monitor)).all()
            del monitor


@carried_by("current_stream")
def test_the_current_stream_has_a_number():
    assert compat.current_stream(torch.device("cpu")) == 0
    if torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
        with torch.cuda.stream(torch.cuda.Stream()) as _:
            assert compat.current_stream(device) == torch.cuda.current_stream().cuda_stream
