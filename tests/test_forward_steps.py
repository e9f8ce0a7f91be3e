"""The step of each forward, in bounded memory."""

import random

from hnf_attention.monitoring import forward_steps
from hnf_attention.monitoring.forward_steps import ForwardSteps


def test_it_says_the_step_of_every_forward():
    rng, steps, told = random.Random(0), ForwardSteps(), {}
    forward = step = 0
    for _ in range(300):
        step += rng.choice((1, 1, 1, 7))
        for _ in range(rng.choice((0, 1, 1, 4))):
            forward += 1
            number = steps.number(forward, step)
            assert steps.number(forward, step + 1) == number  # a call of the same forward
            told[number] = step
        if rng.random() < 0.1:
            told[steps.next_number(step + 1)] = step + 1
            steps.skip(max(told))
    assert list(told) == list(range(1, max(told) + 1))
    assert {number: steps.step_of(number) for number in told} == told
    assert steps.step_of(max(told) + 2) == steps.step_of(0) == 0
    told_before = steps.next_number(step + 9)
    steps.restart()
    assert steps.step_of(1) == 0 and steps.step_of(told_before) == step + 9
    assert steps.number(forward + 1, step + 9) == told_before == max(told) + 1


def test_its_memory_has_a_bound(monkeypatch):
    monkeypatch.setattr(forward_steps, "MOST_STEPS", 64)
    steps = ForwardSteps()
    for step in range(1, 1001):
        assert steps.number(step, step) == step
    assert len(steps._steps) <= 65 and len(steps._known) <= 257
    for number in range(1, 1001):
        assert number - 32 < steps.step_of(number) <= number
