"""Every action previews, applies, verifies and reverts, alone and together with others."""

import copy

import pytest
import torch
from attention_layers import PlainBlock, changed, weights
from leftovers import leave_nothing_behind  # noqa: F401
from odd_layers import Fused
from torch import nn

from hnf_attention import AttentionStabilityMonitor, apply_intervention
from hnf_attention.interventions import GoodStates, plan_intervention

X = torch.randn(2, 20, 32, generator=torch.Generator().manual_seed(0))
SIZES = {"0": [120.0, 10.0, 90.0, 31.0]}
WANTED = {
    "reduce_lr": {"action": "reduce_lr", "factor": 0.3},
    "increase_dropout": {"action": "increase_dropout", "layer": "1.attention"},
    "qk_clip": {"action": "qk_clip", "threshold": 30.0, "layers": SIZES, "lr_factor": 0.7},
    "temperature": {"action": "temperature", "layers": {"0": [3.0, 1.0, 1.0, 7.0]}},
    "standing_qk_clip": {"action": "standing_qk_clip", "threshold": 30.0},
    "qk_norm": {"action": "qk_norm", "layers": ["0"]},
    "rewind": {"action": "rewind", "before": 60},
}


class WithDropout(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True, dropout=0.1)

    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)[0]


class Run:
    """A run of a few steps, with a scheduler and kept states."""

    def __init__(self, dtype=torch.float32, foreach=False):
        torch.manual_seed(0)
        self.model = nn.Sequential(Fused(), WithDropout()).to(dtype)
        self.x = X.to(dtype)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2, foreach=foreach)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: 0.99**step)
        self.states = GoodStates(self.model, self.optimizer)
        self.step()

    def step(self):
        self.optimizer.zero_grad()
        self.model(self.x).square().mean().backward()
        self.optimizer.step()
        self.scheduler.step()

    def numbers(self):
        """All that an action may change."""
        groups = [{k: v for k, v in g.items() if k != "params"} for g in self.optimizer.param_groups]
        sizes = [len(group["params"]) for group in self.optimizer.param_groups]
        state = self.optimizer.state_dict()["state"]
        found = (weights(self.model), groups, sizes, state, self.scheduler.base_lrs)
        return copy.deepcopy((*found, self.model[1].attention.dropout))

    def apply(self, wanted):
        return apply_intervention(self.optimizer, wanted, self.model, scheduler=self.scheduler)


def assert_same(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
@pytest.mark.parametrize("action", WANTED)
def test_an_action_previews_applies_and_reverts_exactly(action, dtype):
    run = Run(dtype, foreach=dtype == torch.float32)
    before = run.numbers()
    planned = plan_intervention(run.optimizer, WANTED[action], run.model, scheduler=run.scheduler)
    said = [one.preview() for one in planned]
    assert_same(run.numbers(), before)
    assert all(text for text, _ in said) and not any(one.applied for one in planned)
    texts = [one.apply() for one in planned]
    assert texts == [text for text, _ in said] and all(one.applied for one in planned)
    again = [one.apply() for one in planned]
    assert all("in force already" in text for text in again)
    for one in reversed(planned):
        one.revert()
        one.revert()
    assert_same(run.numbers(), before)


def test_all_of_them_together_revert_exactly():
    run = Run()
    before = run.numbers()
    first, *others = [WANTED[name] for name in ("rewind", "qk_norm", "reduce_lr", "qk_clip", "temperature")]
    applied = run.apply({**first, "then": others})
    assert applied.description.startswith(
        "rewind: back to the state of step 0, 60 steps before the alarm; QK-norm in 0"
    )
    assert run.optimizer.param_groups[0]["lr"] == pytest.approx(0.0099 * 0.3 * 0.7)
    applied.revert()
    assert_same(run.numbers(), before)
    assert repr(applied).endswith(", reverted)")


def test_scalings_of_the_same_weights_revert_exactly_one_after_the_other():
    run = Run()
    seen = [run.numbers()]
    done = []
    for factor in (3.0, 1.7, 0.9):
        done.append(run.apply({"action": "temperature", "layers": {"0": [factor] * 4}}))
        seen.append(run.numbers())
    done.pop().revert()
    assert_same(run.numbers(), seen[2])
    done.append(run.apply({"action": "temperature", "layers": {"0": [1.1] * 4}}))
    for expected in (seen[2], seen[1], seen[0]):
        done.pop().revert()
        assert_same(run.numbers(), expected)


def test_what_was_learnt_since_is_kept():
    run = Run()
    old = weights(run.model)
    applied = run.apply({"action": "temperature", "layers": {"0": [4.0] * 4}})
    run.step()
    step = weights(run.model)
    applied.revert()
    now = weights(run.model)
    assert torch.equal(now["0.qkv.weight"][:32], step["0.qkv.weight"][:32] * 4)
    assert torch.equal(now["0.qkv.weight"][32:], step["0.qkv.weight"][32:])
    assert not torch.equal(now["0.qkv.weight"][:32], old["0.qkv.weight"][:32])


def test_old_weights_are_let_go_once_training_went_on():
    run = Run()
    first = run.apply({"action": "temperature", "layers": {"0": [4.0] * 4}})
    assert first.actions[0]._layers[0].old is not None
    run.step()
    run.apply({"action": "temperature", "layers": {"0": [2.0] * 4}})
    assert first.actions[0]._layers[0].old is None


def verdicts(model, applied, run):
    with AttentionStabilityMonitor(model, log_every=1) as monitor:
        run()
        return applied.verify(monitor.on_step().stats)


def test_a_clip_is_compared_with_the_next_reading():
    torch.manual_seed(0)
    model = nn.Sequential(Fused())
    with torch.no_grad():
        model[0].qkv.weight[:64].mul_(12)
    with AttentionStabilityMonitor(model, log_every=1) as monitor:
        model(X).sum().backward()
        sizes = monitor.on_step().stats["0"].max_abs_logit.tolist()
    wanted = {"action": "qk_clip", "threshold": 30.0, "layers": {"0": sizes}}
    applied = apply_intervention(None, wanted, model)
    (verdict,) = verdicts(model, applied, lambda: model(X).sum().backward())
    assert verdict.holds and "30.0 nats were predicted, 30.0 measured" in verdict.text
    with torch.no_grad():
        model[0].qkv.weight[:32].mul_(2)
    (verdict,) = verdicts(model, applied, lambda: model(X).sum().backward())
    assert verdict.holds is False and "30.0 nats were predicted, 60." in verdict.text


def test_the_others_are_compared_as_far_as_a_reading_shows_them():
    run = Run()
    forward = lambda: run.step()  # noqa: E731
    for name, text in (
        ("reduce_lr", "learning rates are"),
        ("increase_dropout", "attention dropout is 0.2, set to 0.2"),
        ("standing_qk_clip", " nats in 0, threshold 30"),
        ("qk_norm", "0: keys of length"),
    ):
        applied = run.apply(WANTED[name])
        run.step()
        (verdict,) = verdicts(run.model, applied, forward)
        assert verdict.holds and text in verdict.text, name
        applied.revert()
    applied = run.apply(WANTED["rewind"])
    assert applied.verify({})[0] == (None, "the run went on from step 0")
    (verdict,) = run.apply(WANTED["qk_norm"]).verify({})
    assert verdict == (None, "the gains are not measured yet")


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"action": "rewind", "before": "now"}, "'before' to be the step of the alarm, .*got 'now'"),
        ({"action": "rewind", "before": -1}, "'before' to be the step of the alarm, .*got -1"),
        ({"action": "qk_norm", "layers": "0"}, "'layers' to be a list of names of modules, got '0'"),
        ({"action": "qk_norm", "layers": ["7"]}, "names of modules of the model"),
        ({"action": "qk_norm", "most": 0}, "most to be a number > 0, got 0"),
        ({"action": "standing_qk_clip", "threshold": -1}, "'threshold' to be a number > 0, got -1"),
        ({"action": "standing_qk_clip", "measure": "abs"}, "'measure' in .* got 'abs'"),
        ({"action": "reduce_lr", "factor": 0.5, "then": {}}, "'then' to be a list of interventions"),
        ({"action": "reduce_lr", "factor": 0.5, "then": [{"action": "x"}]}, "got 'x'"),
    ],
)
def test_wrong_items_change_nothing(wanted, message):
    run = Run()
    before = run.numbers()
    with pytest.raises(ValueError, match=message):
        run.apply(wanted)
    assert_same(run.numbers(), before)


def test_a_fault_in_the_last_action_takes_back_all(monkeypatch):
    run = Run()
    before = run.numbers()

    def fail(*_):
        raise RuntimeError("planted")

    from hnf_attention.interventions.learning_rate import ReduceRate

    monkeypatch.setattr(ReduceRate, "_do", fail)
    first, *others = [WANTED[name] for name in ("rewind", "qk_norm", "temperature", "reduce_lr")]
    with pytest.raises(RuntimeError, match="planted"):
        run.apply({**first, "then": others})
    assert_same(run.numbers(), before)


def test_a_run_without_kept_states_is_told_of_its_own_checkpoints():
    model = nn.ModuleDict({"attn": PlainBlock("qkv")})
    before = weights(model)
    with pytest.raises(
        ValueError, match="checkpoint of your own that is at least 40 steps older than step 1,300"
    ):
        apply_intervention(None, {"action": "rewind", "before": 1300}, model)
    for action in ("qk_norm", "standing_qk_clip"):
        with pytest.raises(ValueError, match="expected an optimizer"):
            apply_intervention(None, {"action": action}, model)
    assert not changed(before, weights(model))
