"""Rewind: the state that comes back, what stays, what is refused, and the memory it takes."""

import copy
import logging

import pytest
import torch
from attention_layers import changed, weights
from odd_layers import Fused
from torch import nn

from hnf_attention.interventions import GoodStates, name_checkpoint, start_qk_norm

X = torch.randn(2, 20, 32, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.norm = Fused(), nn.BatchNorm1d(20)  # which has buffers that a forward writes to

    def forward(self, x):
        return self.norm(self.attention(x))


def training(build=lambda m: torch.optim.AdamW(m.parameters(), lr=1e-2), **options):
    torch.manual_seed(0)
    model = Net()
    optimizer = build(model)
    return model, optimizer, GoodStates(model, optimizer, **{"every": 5, "keep": 3, "margin": 7, **options})


def train(model, optimizer, states, steps, after=None):
    for step in steps:
        for one in optimizer if isinstance(optimizer, list) else [optimizer]:
            one.zero_grad()
        model(X * (1 + step / 10)).square().mean().backward()
        for one in optimizer if isinstance(optimizer, list) else [optimizer]:
            one.step()
        states.on_step(step)
        if after is not None:
            after[step] = copy.deepcopy((model.state_dict(), states_of(optimizer)))


def states_of(optimizer):
    return [one.state_dict()["state"] for one in (optimizer if isinstance(optimizer, list) else [optimizer])]


OPTIMIZERS = {
    "adamw": lambda m: torch.optim.AdamW(m.parameters(), lr=1e-2),
    "adamw, foreach": lambda m: torch.optim.AdamW(m.parameters(), lr=1e-2, foreach=True),
    "adamw, fused, amsgrad": lambda m: torch.optim.AdamW(m.parameters(), lr=1e-2, fused=True, amsgrad=True),
    "sgd, momentum": lambda m: torch.optim.SGD(m.parameters(), lr=1e-2, momentum=0.9),
    "adagrad": lambda m: torch.optim.Adagrad(m.parameters(), lr=1e-2),
    "muon and adamw": lambda m: [
        torch.optim.Muon([p for p in m.parameters() if p.dim() == 2], lr=1e-2),
        torch.optim.AdamW([p for p in m.parameters() if p.dim() != 2], lr=1e-2),
    ],
}


QUICK = ("adamw, foreach", "muon and adamw")


@pytest.mark.parametrize(
    "build",
    [pytest.param(b, marks=() if n in QUICK else pytest.mark.slow, id=n) for n, b in OPTIMIZERS.items()],
)
def test_a_rewind_restores_every_number_in_place_and_the_run_repeats_itself(build):
    model, optimizer, states = training(build)
    seen = {}
    train(model, optimizer, states, range(1, 19), seen)
    tensors = {n: (id(p), p.data_ptr()) for n, p in model.named_parameters()}
    assert states.steps == [5, 10, 15]
    assert states.rewind(before=18) == 10
    assert {n: (id(p), p.data_ptr()) for n, p in model.named_parameters()} == tensors
    now = (model.state_dict(), states_of(optimizer))
    torch.testing.assert_close(now, seen[10], rtol=0, atol=0)
    train(model, optimizer, states, range(11, 19))
    torch.testing.assert_close((model.state_dict(), states_of(optimizer)), seen[18], rtol=0, atol=0)
    assert states.steps == [5, 10, 15]


def test_revert_takes_a_rewind_back_exactly():
    model, optimizer, states = training()
    seen = {}
    train(model, optimizer, states, range(1, 19), seen)
    states.rewind(before=18)
    assert states.revert() == 18
    torch.testing.assert_close((model.state_dict(), states_of(optimizer)), seen[18], rtol=0, atol=0)
    with pytest.raises(ValueError, match="a rewind to take back, got none"):
        states.revert()


def test_done_counts_the_steps_behind_the_weights_through_rewinds_and_reverts():
    model, optimizer, states = training(step=100)
    train(model, optimizer, states, range(101, 119))
    assert (states.step, states.done) == (118, 118)
    assert states.rewind(before=118) == 110 and (states.step, states.done) == (118, 110)
    train(model, optimizer, states, range(119, 129))  # the count of a monitor goes on
    assert (states.step, states.done) == (128, 120)
    assert states.rewind(before=128) == 120 and states.done == 112  # a state of after the first rewind
    assert states.revert() == 128 and states.done == 120
    states.restart(40)
    assert states.done == 40


def test_a_resumed_run_goes_on_counting_done_from_its_checkpoint():
    model, optimizer, states = training(step=118, done=110)
    assert (states.step, states.done) == (118, 110)
    train(model, optimizer, states, range(119, 131))
    assert states.done == 122 and states.rewind(before=130) == 120 and states.done == 112
    states.restart(40, 32)
    assert (states.step, states.done) == (40, 32)
    states.restart(40)  # a checkpoint of before says nothing
    assert states.done == 32
    with pytest.raises(ValueError, match="expected done to be an int >= 0, got -1"):
        training(done=-1)
    with pytest.raises(ValueError, match="done to be at most step, got done 9 and step 8"):
        training(step=8, done=9)


def test_done_follows_a_count_that_goes_back_with_the_run():
    model, optimizer, states = training()
    train(model, optimizer, states, range(1, 19))
    states.rewind(before=18)
    train(model, optimizer, states, range(11, 21))
    assert states.done == 20


def test_the_state_before_the_first_step_has_no_moments():
    model, optimizer, states = training()
    old = weights(model)
    train(model, optimizer, states, range(1, 9))
    assert states.rewind(before=8) == 0
    assert not changed(old, weights(model)) and not optimizer.state


def test_states_with_non_finite_numbers_are_passed_over():
    model, optimizer, states = training()
    train(model, optimizer, states, range(1, 10))
    with torch.no_grad():
        kept = model.attention.qkv.weight[3, 4].clone()
        model.attention.qkv.weight[3, 4] = torch.nan
        states.on_step(10)
        model.attention.qkv.weight[3, 4] = kept
        state = optimizer.state[model.attention.proj.weight]["exp_avg_sq"]
        kept = state[0, 0].clone()
        state[0, 0] = torch.inf
        states.on_step(15)
        state[0, 0] = kept
    assert states.rewind(before=25) == 5
    bad, its, bad_states = training(every=10, keep=2)
    with torch.no_grad():
        bad.attention.qkv.bias[0] = torch.inf
        bad_states.on_step(10)
        bad_states.on_step(20)
    with pytest.raises(ValueError, match=r"got those of steps \[10, 20\], of which 2 hold NaN or inf"):
        bad_states.rewind(before=40)


@pytest.mark.slow
def test_memory_is_bounded_and_used_again():
    model, optimizer, states = training()
    train(model, optimizer, states, range(1, 7))
    one = sum(p.nbytes for p in model.parameters()) * 3
    places = set()
    for _ in range(2):
        train(model, optimizer, states, range(10, 60))
        states.rewind(before=60)
    for slot in (*states._slots, *states._spare, states._before):
        places |= {kept.numbers.data_ptr() for kept in slot.kept.values()}
    assert states.bytes <= (states.keep + 2) * one * 1.1
    assert "GiB)" in repr(states)


def test_all_that_a_schedule_changes_goes_back_and_nothing_else():
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, betas=(0.95, 0.99), weight_decay=0.0)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=20)
    states = GoodStates(model, optimizer, 5, 2, margin=5, scheduler=cycle)
    kept = {}
    for step in range(1, 13):
        model(X).square().mean().backward()
        optimizer.step()
        cycle.step()
        for group in optimizer.param_groups:
            group["weight_decay"] = 0.01 * step  # by hand
        kept[step] = {k: v for k, v in optimizer.param_groups[0].items() if k != "params"}
        states.on_step(step)
    optimizer.param_groups[0]["eps"] = 1e-6  # as the intervention `set_eps`
    assert states.rewind(before=12) == 5
    wanted = kept[5] | {"eps": 1e-6}
    assert {k: v for k, v in optimizer.param_groups[0].items() if k != "params"} == wanted
    assert wanted["betas"] != kept[12]["betas"] and wanted["weight_decay"] != kept[12]["weight_decay"]


@pytest.mark.parametrize("tensor_rate", [False, True])
def test_rates_stay_unless_the_scheduler_is_given(tensor_rate):
    rate = torch.tensor(1e-2) if tensor_rate else 1e-2
    for given in (False, True):
        torch.manual_seed(0)
        model = Net()
        optimizer = torch.optim.AdamW(model.parameters(), lr=rate.clone() if tensor_rate else rate)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        states = GoodStates(model, optimizer, 5, 2, margin=5, scheduler=scheduler if given else None)
        rates = [float(optimizer.param_groups[0]["lr"])]
        for step in range(1, 13):
            model(X).square().mean().backward()
            optimizer.step()
            scheduler.step()
            rates.append(float(optimizer.param_groups[0]["lr"]))
            states.on_step(step)
        assert states.rewind(before=12) == 5
        assert float(optimizer.param_groups[0]["lr"]) == rates[5 if given else 12]
        assert scheduler.last_epoch == (5 if given else 12)


def test_random_numbers_go_back_if_asked():
    for rng in (False, True):
        model, optimizer, states = training(rng=rng, every=10, keep=2)
        first = torch.rand(3)
        states.on_step(3)
        states.rewind(before=9)
        assert torch.equal(first, torch.rand(3)) == rng


def test_what_came_since_stays(caplog):
    model, optimizer, states = training()
    train(model, optimizer, states, range(1, 12))
    model.register_parameter("later", nn.Parameter(torch.ones(3)))
    train(model, optimizer, states, range(12, 19))
    with caplog.at_level(logging.WARNING):
        assert states.rewind(before=18) == 10
    assert "went back to the state of step 10, 8 steps before step 18" in caplog.text
    assert torch.equal(model.later, torch.ones(3))
    assert "exp_avg" in optimizer.state[model.norm.weight]


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (dict(every=0), ValueError, "every to be an int >= 1, got 0"),
        (dict(keep=True), ValueError, "keep to be an int >= 1, got True"),
        (
            dict(every=3, keep=2),
            ValueError,
            "so that one state is always 7 steps old, got keep 2 and every 3",
        ),
        (dict(scheduler=3), TypeError, "a scheduler with state_dict, got int"),
    ],
)
def test_wrong_arguments(given, error, message):
    with pytest.raises(error, match=message):
        training(**given)
    with pytest.raises(TypeError, match="Optimizer or a list of them, got int"):
        GoodStates(Net(), 3)
    with pytest.raises(ValueError, match="expected an optimizer, got none"):
        GoodStates(Net(), [])


def test_no_state_is_old_enough():
    model, optimizer, states = training(step=100)
    old = weights(model)
    with pytest.raises(ValueError, match=r"at least 7 steps before step 106, got those of steps \[100\]"):
        states.rewind(before=106)
    assert not changed(old, weights(model)) and states.jumps == 0


def test_the_state_before_all_training_is_old_enough_for_any_alarm():
    model, optimizer, states = training()
    old = weights(model)
    train(model, optimizer, states, range(1, 4))
    assert states.rewind(before=3) == 0 and not changed(old, weights(model)) and states.jumps == 1


@pytest.mark.parametrize("build", [OPTIMIZERS["adamw, foreach"], OPTIMIZERS["muon and adamw"]])
def test_gains_that_came_later_go_back_to_their_start(build):
    """Weights of before the norm, beside gains that a failed stretch has spoilt, would fail again."""
    model, optimizer, states = training(build)
    train(model, optimizer, states, range(1, 12))
    start = start_qk_norm(model, optimizer, forward=lambda: model(X))
    gains = [gain.detach().clone() for gain in start.gains]
    train(model, optimizer, states, range(12, 15))
    with torch.no_grad():
        start.gains[0].fill_(torch.nan)
    assert states.rewind(before=14) == 5
    assert all(torch.equal(now, then) for now, then in zip(start.gains, gains))
    own = optimizer[-1] if isinstance(optimizer, list) else optimizer
    assert all(gain not in own.state for gain in start.gains)
    train(model, optimizer, states, range(15, 18))
    assert all(gain.isfinite().all() for gain in start.gains)


def test_a_checkpoint_of_the_users_own_is_named():
    said = name_checkpoint([800, 1600, 1200], before=1300, why="head 2 left its peers")
    assert said == "step 1,200, before head 2 left its peers"
    with pytest.raises(
        ValueError, match=r"at least 40 steps before step 830, got those of steps \[800, 1600\]"
    ):
        name_checkpoint([800, 1600], before=830, why="")


@pytest.mark.gpu
def test_on_a_card_the_host_does_not_wait():
    torch.manual_seed(0)
    model = Net().cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    x = X.cuda()
    states = GoodStates(model, optimizer, every=5, keep=3, margin=7)
    seen = {}
    for step in range(1, 19):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            optimizer.step()
            states.on_step(step)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        seen[step] = copy.deepcopy((model.state_dict(), states_of(optimizer)))
    assert states.rewind(before=18) == 10
    torch.testing.assert_close((model.state_dict(), states_of(optimizer)), seen[10], rtol=0, atol=0)


class Centred(nn.Module):
    """Its forward makes its buffer anew."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("center", torch.zeros(4))

    def forward(self, x):
        self.center = self.center * 0.9 + self.linear(x).detach().mean(0)
        return self.linear(x) - self.center


def test_a_buffer_that_is_assigned_anew_is_restored():
    model = Centred()
    optimizer = torch.optim.Adam(model.parameters(), 0.1)
    states = GoodStates(model, optimizer, every=1, keep=3, margin=1)
    for step in (1, 2, 3):
        model(torch.full((2, 4), float(step))).sum().backward()
        optimizer.step()
        if step == 2:
            kept = model.center.clone()
        states.on_step(step)
    model.center = torch.full((4,), torch.nan)
    states.rewind(before=3)
    assert torch.equal(model.center, kept)


def test_what_left_the_optimizer_stays_out():
    model = nn.Linear(4, 4)
    optimizer = torch.optim.Adam(model.parameters(), 0.1)
    gain = nn.Parameter(torch.ones(4))
    optimizer.param_groups[0]["params"].append(gain)
    states = GoodStates(model, optimizer, every=1, keep=3, margin=1)
    for step in (1, 2, 3):
        (model(torch.ones(1, 4)) * gain).sum().backward()
        optimizer.step()
        states.on_step(step)
    optimizer.param_groups[0]["params"].pop()
    del optimizer.state[gain]
    states.rewind(before=3)
    assert gain not in optimizer.state and optimizer.state_dict()["state"].keys() == {0, 1}


@pytest.mark.parametrize("step", ["1", 1.0, None, True])
def test_a_step_is_a_whole_number(step):
    _, _, states = training()
    for ask in (states.on_step, states.restart, states.rewind):
        with pytest.raises(ValueError, match=f"expected a step number, got {step!r}"):
            ask(step)
    assert states.steps == [0] and states.step == 0
