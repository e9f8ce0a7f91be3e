"""A monitor that is given good states: what it keeps, proposes and carries out, and what it says became of it."""

import json
import logging

import pytest
import torch
from heads import snapshot
from odd_layers import Fused
from torch import nn

from hnf_attention import AttentionStabilityMonitor, apply_intervention
from hnf_attention.diagnosis import diagnose
from hnf_attention.interventions import Applied, FollowUp, GoodStates
from hnf_attention.interventions.scaling import LayerScaling, ScaleHeads

X = torch.randn(2, 24, 32, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Two layers of attention and what a gain of QK-norm needs: a group of vectors in the optimizer."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.a, self.b = nn.LayerNorm(32), Fused(), Fused()

    def forward(self, x):
        return self.b(self.a(self.norm(x)))


class Run:
    """A run whose scores grow by a factor a step, as if it were unstable, until QK-norm holds them."""

    def __init__(self, growth=1.0, every=5, keep=10, scheduled=True, **options):
        self.model = Net()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, weight_decay=0.0)
        self.growth = growth
        self.scheduler = (
            torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: 1.0) if scheduled else None
        )
        self.states = GoodStates(self.model, self.optimizer, every, keep, scheduler=self.scheduler)
        options = {"log_every": 5, "good_states": self.states, **options}
        self.monitor = AttentionStabilityMonitor(self.model, **options)

    def step(self):
        self.optimizer.zero_grad()
        self.model(X).square().mean().backward()
        self.optimizer.step()
        if self.scheduler is not None:
            self.scheduler.step()
        with torch.no_grad():
            for layer in (self.model.a, self.model.b):
                layer.qkv.weight[:64] *= self.growth
        return self.monitor.on_step()

    def until(self, step):
        for _ in range(step - self.monitor.step):
            self.step()

    @property
    def rate(self):
        return self.optimizer.param_groups[0]["lr"]


def test_the_monitor_keeps_the_states_that_it_was_given():
    run = Run(every=10, keep=5)
    run.until(23)
    assert run.states.steps == [0, 10, 20] and run.states.step == 23
    assert repr(run.monitor).endswith("0 interventions applied")


def test_states_of_another_run_are_refused():
    model, other = Net(), Net()
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(ValueError, match="good_states of the monitored Net, got those of another Net"):
        AttentionStabilityMonitor(other, good_states=GoodStates(model, optimizer))
    with pytest.raises(TypeError, match="good_states to be a GoodStates or None, got AdamW"):
        AttentionStabilityMonitor(model, good_states=optimizer)
    with pytest.raises(ValueError, match="that begin at step 100, as the monitor, got 0"):
        AttentionStabilityMonitor(model, step=100, good_states=GoodStates(model, optimizer))
    with AttentionStabilityMonitor(
        model, step=7, good_states=GoodStates(model, optimizer, step=7)
    ) as monitor:
        assert monitor.step == 7  # what was refused before has left the model free


def test_a_resumed_run_forgets_the_states_from_before_its_checkpoint():
    run = Run()
    run.until(10)
    checkpoint = run.monitor.state_dict()
    again = Run()
    again.monitor.load_state_dict(checkpoint)
    assert again.states.steps == [] and again.states.step == 10
    again.step()
    assert again.states.steps == [11]


def test_a_restart_is_carried_out_kept_and_accounted_for(caplog):
    run = Run(growth=1.04, auto_intervene=True)
    while not run.monitor.applied:
        run.step()
    (done,) = run.monitor.applied
    alarm = run.monitor.step
    assert [action.name for action in done.actions] == ["rewind", "qk_norm", "reduce_lr"]
    rate = pytest.approx(1e-3 * done.intervention["then"][-1]["factor"])
    assert done.outcome == "open" and run.rate == rate and 1e-4 <= run.rate <= 5e-4
    run.until(alarm + 45)
    assert done.outcome == "open"
    run.step(), run.until(alarm + 50)
    assert done.outcome == "kept" and len(run.monitor.applied) == 1
    assert done.account[0].startswith(f"intervened at step {alarm}: rewind: back to the state of step")
    assert (
        f"at step {alarm + 50} the intervention of step {alarm} is kept: no error in the 50"
        in done.account[1]
    )
    assert all(sentence in caplog.text for sentence in done.account)
    assert run.rate == rate  # its schedule has not taken the cut back
    assert [shot.step for shot in run.monitor.history if shot.jumped] == [alarm + 5]


@pytest.mark.slow
def test_a_restart_that_was_not_enough_is_escalated(caplog):
    """Gains that grow all the same: the second restart lowers the rate again, below the first one's."""
    run = Run(growth=1.04, auto_intervene=True)
    while len(run.monitor.applied) < 2 and run.monitor.step < 400:
        run.step()
        with torch.no_grad():
            for name, gain in run.model.named_parameters():
                if "qk_norm" in name:
                    gain *= 1.04
    first, second = run.monitor.applied
    assert first.outcome == "escalated" and "not enough after" in first.account[-1]
    assert [action.name for action in second.actions] == ["rewind", "reduce_lr"]
    factor = first.intervention["then"][-1]["factor"]
    assert run.rate == pytest.approx(1e-3 * factor * 0.25) and not run.monitor.status.off


@pytest.mark.slow
@pytest.mark.parametrize("scheduled", [True, False])
def test_a_second_restart_from_a_state_before_the_first_cuts_the_rate_further(scheduled):
    """With a scheduler, the state brings back the rate that it had: the cut has to hold that of the first restart."""
    run = Run(every=50, keep=4, scheduled=scheduled)
    run.until(100)
    grown = [snapshot(10 * s, a={"max_logit": 5 + 20_000 * (s / 10) ** 2}) for s in range(1, 11)]
    shift = lambda by: [snapshot(x.step + by, **x.layers) for x in grown]  # noqa: E731
    policy = run.monitor._treatment.policy
    factors = []
    for by in (0, 70):  # back to step 50 both times: nothing was kept since
        wanted = policy.propose(diagnose(shift(by)))
        factors.append(wanted["then"][-1]["factor"])
        run.states._slots = [slot for slot in run.states._slots if slot.step <= 50]
    assert factors == ([0.25, 0.0625] if scheduled else [0.25, 0.25])


@pytest.mark.slow
def test_nan_soon_after_a_restart_is_answered_at_once():
    run = Run(auto_intervene=True)
    run.until(50)
    for _ in range(2):
        with torch.no_grad():
            run.model.a.qkv.weight[3] = torch.nan
        while run.monitor.step % 5 or not run.model.a.qkv.weight.isfinite().all():
            run.step()
        assert run.model.a.qkv.weight.isfinite().all()
        run.step()
    first, second = run.monitor.applied
    assert first.outcome == "escalated" and second.intervention["before"] - first.intervention["before"] <= 10


@pytest.mark.slow
def test_without_states_the_rates_are_left_alone():
    run = Run(growth=1.04, auto_intervene=True, good_states=None)
    run.states.remove()
    del run.states
    while not run.monitor.applied:
        run.step()
    assert run.rate == 1e-3 and run.monitor.applied[0].intervention["action"] == "qk_clip"


@pytest.mark.slow
def test_clips_that_follow_each_other_are_one_story():
    run = Run(growth=1.15, auto_intervene=True, good_states=None)
    run.states.remove()
    del run.states
    run.until(60)
    outcomes = [done.outcome for done in run.monitor.applied]
    assert len(outcomes) > 2 and set(outcomes[:-1]) == {"repeated"} and outcomes[-1] == "open"


def follow(actions, **layers):
    """What a follow-up says at a reading one step after it was carried out."""
    done = Applied({"action": "x", "reason": "y"}, "x: done", actions)
    first = diagnose([snapshot(10, **{name: {"max_logit": 200.0} for name in layers})])
    found = FollowUp(done, first)
    found.look(first)
    assert done.outcome == "open"
    found.look(diagnose([snapshot(11, **layers)]))
    return done


@pytest.mark.parametrize("measured, outcome", [(30.0, "open"), (100.0, "open"), (199.0, "reverted")])
def test_a_clip_without_effect_is_taken_back(measured, outcome):
    model = nn.ModuleDict({"a": Fused()})
    before = model["a"].qkv.weight.clone()
    plan = [LayerScaling("a", torch.full((4,), 0.4), torch.full((4,), 0.375))]
    action = ScaleHeads("qk_clip", model, plan, {"a": [200.0] * 4}, {"a": [30.0] * 4})
    action.apply()
    done = follow([action], a={"max_logit": measured})
    assert done.outcome == outcome and torch.equal(model["a"].qkv.weight, before) == (outcome == "reverted")
    assert len(done.account) == 1 + (outcome == "reverted")


@pytest.mark.parametrize("sharpness", [1.0, 16.0])
def test_qk_norm_that_the_keys_do_not_obey_is_taken_away(sharpness):
    """The scale of the scores is not known from a model, and plays no part."""
    run = Run()
    run.model.a.options["scale"] = sharpness * 8**-0.5
    run.until(5)
    done = apply_intervention(run.optimizer, {"action": "qk_norm", "reason": "a test"}, run.model)
    found = FollowUp(done, diagnose(run.monitor.history))
    run.until(10)
    found.look(diagnose(run.monitor.history))
    assert done.outcome == "open" and done.actions[0].applied
    with torch.no_grad():
        for gain in done.actions[0].started.gains:
            gain /= 3  # what was measured is now three times what the gains give
    found.look(diagnose(run.monitor.history))
    assert done.outcome == "reverted" and not done.actions[0].applied and "keys of length" in done.account[-1]
    assert not [name for name, _ in run.model.named_parameters() if "qk_norm" in name]


def test_a_cut_of_the_learning_rate_begins_new_trends_and_a_schedule_does_not():
    run = Run(scheduled=False)
    run.until(5)
    run.optimizer.param_groups[0]["lr"] *= 0.9
    run.until(10)
    run.optimizer.param_groups[0]["lr"] *= 0.25
    run.until(20)
    assert [shot.jumped for shot in run.monitor.history] == [False, False, True, False]


def test_trends_begin_anew_after_a_rewind():
    """A rewind to scores that are large but steady is no growth."""
    rising = [snapshot(10 * s, a={"max_logit": 9.0 * s}) for s in range(1, 8)]
    after = [snapshot(80 + 10 * s, a={"max_logit": 60.0}) for s in range(5)]
    assert diagnose([*rising, *after[:1]]).issues
    object.__setattr__(after[0], "jumped", True)
    assert not diagnose([*rising, *after[:1]]).issues
    assert not diagnose([*rising, *after]).has_issues()


def test_logging_goes_on_when_a_state_cannot_be_kept(monkeypatch, caplog):
    run = Run()
    monkeypatch.setattr(run.states, "on_step", lambda step: 1 / 0)
    with caplog.at_level(logging.WARNING):
        run.until(10)
    assert run.monitor.status.off["good_states"].failures and len(run.monitor.history) == 2


def test_a_checkpoint_of_the_monitor_keeps_what_rewinds_gave_up():
    run = Run()
    run.until(60)
    assert run.states.rewind(before=60) == 20 and run.states.done == 20
    run.until(63)
    saved = json.loads(json.dumps(run.monitor.state_dict()))
    resumed = Run()
    resumed.monitor.load_state_dict(saved)
    assert (resumed.states.step, resumed.states.done) == (63, 23)
    resumed.until(65)
    assert resumed.states.done == 25
    for without in ({**saved, "done": None}, {k: v for k, v in saved.items() if k != "done"}):
        other = Run()  # its checkpoint is of a run without good states, or of an older version
        other.monitor.load_state_dict(without)
        assert (other.states.step, other.states.done) == (63, 63)
