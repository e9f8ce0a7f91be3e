"""When a run is restarted, from which state, and how it goes on."""

from dataclasses import replace

import pytest
import torch
from heads import snapshot
from test_policy import growing
from torch import nn

from hnf_attention import AttentionStabilityMonitor, apply_intervention
from hnf_attention.diagnosis import diagnose
from hnf_attention.interventions import GoodStates, InterventionPolicy
from hnf_attention.statistics.heads import Snapshot


class Attends(nn.Module):
    """One layer by scaled_dot_product_attention, with a norm for the optimizer's group of vectors."""

    def __init__(self):
        super().__init__()
        self.norm, self.qkv = nn.LayerNorm(32), nn.Linear(32, 96)

    def forward(self, x):
        q, k, v = (y.unflatten(-1, (4, 8)).transpose(1, 2) for y in self.qkv(self.norm(x)).chunk(3, -1))
        return nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Root(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = Attends()

    def forward(self, x):
        return self.a(x)


def _kept(steps=(0, 50, 100)):
    """A model, its optimizer and its good states, one every 50 steps; the weights differ from state to state."""
    model = Root()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    states = GoodStates(model, optimizer, every=50, keep=3)
    for step in steps[1:]:
        with torch.no_grad():
            model.a.qkv.weight.fill_(step)
        states.on_step(step)
    return model, optimizer, states


def _steps(history, last):
    """The history with its last snapshot at that step."""
    return [Snapshot(shot.step * last // history[-1].step, shot.layers) for shot in history]


def test_with_good_states_an_error_is_answered_by_a_restart():
    model, optimizer, states = _kept()
    policy = InterventionPolicy(model)
    diagnosis = diagnose(_steps(growing(a=20_000.0), 120))  # the alarm is at step 120
    wanted = policy.propose(diagnosis)
    assert wanted["action"] == "rewind" and wanted["before"] == 120 and "laboratory" in wanted["reason"]
    assert [step["action"] for step in wanted["then"]] == ["qk_norm", "reduce_lr"]
    assert policy.propose(diagnosis) == wanted  # asked again about the same diagnosis
    applied = apply_intervention(optimizer, wanted)
    model(torch.randn(2, 6, 32))
    assert (model.a.qkv.weight == 50).all() and optimizer.param_groups[0]["lr"] == pytest.approx(3e-3)
    assert len(optimizer.param_groups[0]["params"]) == 6  # the gains are among them
    later = diagnose(_steps(growing(a=20_000.0), 130))
    assert policy.propose(later) is None  # too soon
    applied.revert()
    assert (model.a.qkv.weight == 100).all() and optimizer.param_groups[0]["lr"] == 1e-2
    del states


CALM = [snapshot(10 * step, a={"max_logit": 5.0}) for step in range(1, 11)]


@pytest.mark.parametrize(
    "first, last, before, factor",
    [
        (None, 120, 120, 0.3),  # the error is the first that is seen
        (95, 120, 95, 0.2375),  # a warning at step 95: back to the state of step 50, not to that of 80
        (30, 120, 30, 0.1),  # back to step 0
        (None, 1_000, 1_000, 0.5),
    ],
)
def test_it_goes_back_to_before_the_first_warning_and_is_the_slower_the_sooner_that_came(
    first, last, before, factor
):
    model, _, states = _kept()
    policy = InterventionPolicy(model)
    policy.see(diagnose(_steps(CALM, 10)))
    if first is not None:
        rising = [snapshot(10 * s, a={"max_logit": (2 + 0.52 * s) ** 2}) for s in range(1, 11)]
        policy.see(diagnose(_steps(rising, first)))
    wanted = policy.propose(diagnose(_steps(growing(a=20_000.0), last)))
    assert wanted["before"] == before and wanted["then"][-1]["factor"] == pytest.approx(factor)
    normed = [step["action"] for step in wanted["then"]] == ["qk_norm", "reduce_lr"]
    assert normed == (states.chosen(before) > 0)


def test_a_warning_that_went_by_does_not_count():
    model, _, states = _kept()
    policy = InterventionPolicy(model)
    policy.see(diagnose(_steps(growing(a=20_000.0), 60)))
    policy.see(diagnose(_steps(CALM, 80)))
    assert policy.propose(diagnose(_steps(growing(a=20_000.0), 120)))["before"] == 120
    del states


def test_without_a_state_from_before_the_warning_it_goes_back_to_before_the_error():
    model, _, states = _kept()
    states._slots = [slot for slot in states._slots if slot.step == 50]
    policy = InterventionPolicy(model)
    policy.see(diagnose(_steps(growing(a=20_000.0), 80)))
    wanted = policy.propose(diagnose(_steps(growing(a=20_000.0), 120)))
    assert wanted["before"] == 120 and wanted["then"][-1]["factor"] == pytest.approx(0.2)


def test_a_run_that_was_taken_back_to_its_start_is_normed_at_its_second_restart():
    model, _, states = _kept((0,))
    policy = InterventionPolicy(model)
    found = [policy.propose(diagnose(_steps(growing(a=20_000.0), last))) for last in (30, 100)]
    assert [[step["action"] for step in x["then"]] for x in found] == [
        ["reduce_lr"],
        ["qk_norm", "reduce_lr"],
    ]
    assert [x["then"][-1]["factor"] for x in found] == [0.1, 0.25]
    del states


def test_restarts_of_an_earlier_version_count():
    model, _, states = _kept()
    found = []
    for earlier in ([], [10], [10, 20, 30]):
        policy = InterventionPolicy(model)
        policy.load_state_dict(policy.state_dict() | {"restarts": earlier})
        wanted = policy.propose(diagnose(_steps(growing(a=20_000.0), 120)))
        found.append(([x["action"] for x in wanted.get("then", [])], wanted["action"]))
    assert found == [
        (["qk_norm", "reduce_lr"], "rewind"),
        (["reduce_lr"], "rewind"),
        ([], "qk_clip"),
    ]
    del states


def test_what_could_not_be_judged_or_is_old_does_not_end_a_trouble():
    model, _, states = _kept()
    policy = InterventionPolicy(model)
    policy.see(diagnose(_steps(growing(a=20_000.0), 60)))
    policy.see(replace(diagnose(_steps(CALM, 70)), not_judged={"growth": "a fault"}))
    evaluation = [replace(shot, training=False) for shot in _steps(CALM, 80)]
    policy.see(diagnose(evaluation))
    policy.see(diagnose(_steps(CALM, 40)))
    assert policy.propose(diagnose(_steps(growing(a=20_000.0), 120)))["before"] == 60
    del states


def test_it_does_not_give_up_a_long_run_for_a_warning_of_long_ago():
    model, _, states = _kept((0, 50, 100))
    policy = InterventionPolicy(model)
    policy.see(diagnose(_steps(growing(a=20_000.0), 60)))
    assert policy.propose(diagnose(_steps(growing(a=20_000.0), 10_000)))["before"] == 9_500
    del states


@pytest.mark.parametrize("scheduled", [False, True])
def test_the_rate_that_a_restart_left_is_cut_again_where_the_state_brings_the_older_one_back(scheduled):
    model, optimizer, _ = _kept()
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0) if scheduled else None
    states = GoodStates(model, optimizer, every=50, keep=3, scheduler=scheduler)
    policy = InterventionPolicy(model)
    found = [policy.propose(diagnose(_steps(growing(a=20_000.0), last))) for last in (120, 300)]
    assert [x["then"][-1]["factor"] for x in found] == pytest.approx([0.3, 0.3 / 4 if scheduled else 1 / 4])
    del states


def test_a_monitor_tells_its_policy_of_every_diagnosis(monkeypatch):
    model, optimizer, states = _kept((0,))
    seen = []
    monitor = AttentionStabilityMonitor(model, log_every=1, good_states=states)
    monkeypatch.setattr(monitor._treatment.policy, "see", lambda diagnosis: seen.append(diagnosis.step))
    for _ in range(3):
        model(torch.randn(2, 20, 32)).sum().backward()
        optimizer.step()
        monitor.on_step()
    monitor.restore()
    assert seen == [1, 2, 3]


def test_a_second_restart_lowers_the_rate_again_and_there_are_three_at_most():
    model, _, states = _kept()
    policy = InterventionPolicy(model)
    found = []
    for last in (120, 300, 600, 1200):
        wanted = policy.propose(diagnose(_steps(growing(a=20_000.0), last)))
        found.append([step["action"] for step in wanted.get("then", [])])
        loaded = InterventionPolicy(model)
        loaded.load_state_dict(policy.state_dict())
        policy = loaded
    assert found == [["qk_norm", "reduce_lr"], ["reduce_lr"], ["reduce_lr"], []]
    del states


def test_warnings_and_runs_without_a_state_old_enough_are_not_restarted():
    model, _, states = _kept((0,))
    assert InterventionPolicy(model).propose(diagnose(growing(a=20_000.0))) is not None  # back to step 0
    model, _, states = _kept()
    states._slots = [slot for slot in states._slots if slot.step == 100]
    wanted = InterventionPolicy(model).propose(diagnose(_steps(growing(a=20_000.0), 120)))
    assert wanted is None or wanted["action"] != "rewind"
    history = [snapshot(10 * s, first={"max_logit": 5.0}, a={"max_logit": 12.0 * s}) for s in range(1, 11)]
    assert diagnose(history).warnings and not diagnose(history).errors
    assert InterventionPolicy(model).propose(diagnose(history)) is None


def test_nan_is_answered_by_a_restart_where_training_may_have_made_it():
    model, _, states = _kept()
    broken = [snapshot(s, a={"max_logit": 5.0}) for s in range(1, 10)]
    broken.append(snapshot(10, a={"max_logit": 5.0, "nonfinite_rows": 3}))
    wanted = InterventionPolicy(model).propose(diagnose(_steps(broken, 120)))
    assert wanted["action"] == "rewind" and [x["action"] for x in wanted["then"]] == ["qk_norm", "reduce_lr"]
    del states


def test_after_three_restarts_the_usual_fixes_are_proposed():
    model, _, states = _kept()
    policy = InterventionPolicy(model)
    found = [
        policy.propose(diagnose(_steps(growing(a=20_000.0), last))) for last in (120, 300, 600, 630, 1200)
    ]
    assert [x and x["action"] for x in found] == ["rewind", "rewind", "rewind", None, "qk_clip"]
    del states
