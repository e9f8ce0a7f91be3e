"""Actions beside the optimizer's steps: warmup again, rates of queries and keys, epsilon, skipped spikes."""

import pytest
import torch
from attention_layers import weights
from odd_layers import Fused, Separate, normed
from torch import nn

from hnf_attention import apply_intervention

X = torch.randn(2, 20, 32, generator=torch.Generator().manual_seed(0))
ADAMW = {
    "plain": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True),
    "fused, rate a tensor": lambda p: torch.optim.AdamW(p, lr=torch.tensor(1e-2), fused=True),
}


def step(model, optimizer, size=1.0):
    optimizer.zero_grad()
    (size * model(X).square().mean()).backward()
    optimizer.step()


def apply(optimizer, model=None, **wanted):
    return apply_intervention(optimizer, wanted, model)


@pytest.mark.parametrize("build", ADAMW.values(), ids=ADAMW)
def test_a_warmup_again_scales_each_step_and_leaves_the_schedule_alone(build):
    model = nn.Linear(32, 32, bias=False)
    optimizer = build(model.parameters())
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    sizes, rates = [], []
    applied = apply(optimizer, action="rewarm_lr", steps=4, floor=0.2)
    for _ in range(6):
        old = model.weight.detach().clone()
        step(model, optimizer)
        rates.append(float(optimizer.param_groups[0]["lr"]))
        sizes.append(float((model.weight.detach() - old).abs().median()) / rates[-1])
        scheduler.step()
    assert rates == pytest.approx([1e-2 * 0.9**n for n in range(6)])
    shares = torch.tensor(sizes) / sizes[-1]
    torch.testing.assert_close(shares[[0, 2, 4]], torch.tensor([0.2, 0.6, 1.0]), rtol=0.25, atol=0)
    assert "from 0.2 of their schedule to all of it within 4 steps" in applied.description
    applied.revert()
    step(model, optimizer)


@pytest.mark.parametrize("build", ADAMW.values(), ids=ADAMW)
def test_queries_and_keys_learn_at_a_rate_of_their_own(build):
    def after(factor):
        torch.manual_seed(0)
        model = nn.Sequential(Fused(), Separate(groups=2))
        optimizer = build(model.parameters())
        start = weights(model)
        if factor is not None:
            wanted = dict(action="qk_rate", factor=factor, layers={"0": 4, "1": 4})
            applied = apply(optimizer, model, **wanted)
            assert "query and key weights of 0, 1 learn at" in applied.description
        step(model, optimizer)
        return start, weights(model)

    start, plain = after(None)
    _, slow = after(0.25)
    for name in start:
        rows = slice(None)
        if name == "0.qkv.weight" or name == "0.qkv.bias":
            rows = slice(0, 64)
            assert torch.equal(slow[name][64:], plain[name][64:])
        if any(word in name for word in ("qkv", "q_proj", "k_proj")):
            wanted = start[name][rows] + 0.25 * (plain[name][rows] - start[name][rows])
            torch.testing.assert_close(slow[name][rows], wanted, rtol=1e-5, atol=1e-7)
        else:
            assert torch.equal(slow[name], plain[name])


def test_reverting_a_rate_ends_it():
    torch.manual_seed(0)
    model = nn.Sequential(Fused())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    applied = apply(optimizer, model, action="qk_rate", factor=0.5, layers={"0": 4})
    applied.revert()
    twin = nn.Sequential(Fused())
    twin.load_state_dict(model.state_dict())
    step(model, optimizer)
    step(twin, torch.optim.SGD(twin.parameters(), lr=0.1))
    assert all(torch.equal(a, b) for a, b in zip(weights(model).values(), weights(twin).values()))


@pytest.mark.parametrize("size", [1e4, float("nan"), pytest.param(float("inf"), marks=pytest.mark.slow)])
def test_spikes_are_left_out_and_other_steps_keep_every_bit(size):
    def run(with_skips):
        torch.manual_seed(0)
        model = nn.Sequential(Fused())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        applied = apply(optimizer, action="skip_spikes") if with_skips else None
        seen = []
        for n in range(40):
            if n == 30 and not with_skips:
                continue
            step(model, optimizer, size if n == 30 else 1.0 + 0.1 * (n % 3))
            seen.append(weights(model))
        return applied, seen

    applied, treated = run(True)
    _, plain = run(False)
    del treated[30]
    assert applied.actions[0].skipped == 1
    assert all(torch.equal(a[n], b[n]) for a, b in zip(treated, plain) for n in a)


def test_epsilon_is_set_and_set_back():
    model = nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, eps=1e-8)
    applied = apply(optimizer, action="set_eps", eps=1e-6)
    assert optimizer.param_groups[0]["eps"] == 1e-6 and "epsilon (1e-08) -> 1e-06" in applied.description
    assert applied.verify({})[0].holds
    applied.revert()
    assert optimizer.param_groups[0]["eps"] == 1e-8


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (dict(action="rewarm_lr", floor=2), "'floor' to be above 0 and at most 1, got 2"),
        (dict(action="rewarm_lr", steps=0), "'steps' to be a number > 0, got 0"),
        (
            dict(action="qk_rate", factor=0.5),
            "'layers' to map layer names to their number of heads, got None",
        ),
        (dict(action="qk_rate", factor=0.5, layers={"0": 0}), "number of heads of layer '0', got 0"),
        (dict(action="qk_rate", layers={"0": 4}), "'factor' to be a number > 0, got None"),
        (dict(action="qk_rate", factor=0.5, layers={"1": 4}), "stay as they are"),
        (dict(action="skip_spikes", limit=-1), "'limit' to be a number > 0, got -1"),
        (dict(action="set_eps", eps=0), "'eps' to be a number > 0, got 0"),
        (dict(action="set_eps", eps=1e-6), "with an epsilon for set_eps, got .'SGD'"),
    ],
)
def test_wrong_items(wanted, message):
    model = nn.Sequential(Fused(), Fused(inside=normed))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=message):
        apply(optimizer, model, **wanted)
    if wanted["action"] != "set_eps":
        with pytest.raises(ValueError, match=f"expected an optimizer for {wanted['action']}, got None"):
            apply(None, model, action=wanted["action"])
