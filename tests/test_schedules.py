"""A cut of the learning rate is judged beside what its schedule gives."""

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as s

from hnf_attention import apply_intervention

SCHEDULES = {
    "lambda": lambda o: s.LambdaLR(o, lambda step: min(1.0, (step + 1) / 10)),
    "linear": lambda o: s.LinearLR(o, 0.1, total_iters=10),
    "sequential": lambda o: s.SequentialLR(o, [s.LinearLR(o, 0.1, total_iters=6), s.StepLR(o, 3)], [6]),
    "chained": lambda o: s.ChainedScheduler([s.LinearLR(o, 0.1, total_iters=10), s.ExponentialLR(o, 0.99)]),
    "listed": lambda o: [s.LinearLR(o, 0.1, total_iters=10), s.ExponentialLR(o, 0.99)],
    "cosine": lambda o: s.CosineAnnealingLR(o, 20, eta_min=0.1),
}


def run(kind, lr=1.0):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr)
    scheduler = SCHEDULES[kind](optimizer)

    def step():
        optimizer.step()
        for one in scheduler if isinstance(scheduler, list) else [scheduler]:
            one.step()

    step()
    return optimizer, scheduler, step


@pytest.mark.parametrize("tensor", [False, True])
@pytest.mark.parametrize("kind", SCHEDULES)
def test_a_cut_holds_while_its_schedule_warms_up(kind, tensor):
    optimizer, scheduler, step = run(kind, torch.tensor(1.0) if tensor else 1.0)
    plain, _, plain_step = run(kind)
    done = apply_intervention(optimizer, {"action": "reduce_lr", "factor": 0.5}, scheduler=scheduler)
    for _ in range(12):
        step(), plain_step()
        (verdict,) = done.verify({})
        assert verdict.holds, verdict.text
        told = float(verdict.text.rpartition("(")[2].rstrip(")"))
        assert told == pytest.approx(plain.param_groups[0]["lr"], rel=1e-5)
    optimizer.param_groups[0]["lr"] = 1.0
    assert done.verify({})[0].holds is False


def test_a_schedule_that_computes_rates_from_others_has_not_kept_the_cut():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0, momentum=0.9)
    scheduler = s.OneCycleLR(optimizer, 1.0, total_steps=20)
    done = apply_intervention(optimizer, {"action": "reduce_lr", "factor": 0.5}, scheduler=scheduler)
    for _ in range(5):
        optimizer.step()
        scheduler.step()
    assert done.verify({})[0].holds is False


def test_a_schedule_that_goes_by_given_numbers_is_judged_by_the_set_rate():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = s.ReduceLROnPlateau(optimizer)
    done = apply_intervention(optimizer, {"action": "reduce_lr", "factor": 0.5}, scheduler=scheduler)
    scheduler.step(1.0)
    assert done.verify({})[0].holds is True
