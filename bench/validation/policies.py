"""The fixes of experiment 2, by name: each acts on a run that trains, through the product's own functions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from hnf_attention import AttentionDiagnosis, AttentionStabilityMonitor, apply_intervention
from hnf_attention.interventions import GoodStates, QKClip, start_qk_norm

from .single import Training

STATES_EVERY, STATES_KEPT = 20, 4  # so that one is always 40 steps old


class Case:
    """A run that is watched, with its good states.

    done: what was done to it, in words. acted: the step of the first action.
    """

    def __init__(self, run: Training) -> None:
        self.run = run
        self.states = GoodStates(run.model, run.optimizers, STATES_EVERY, STATES_KEPT)
        self.monitor = AttentionStabilityMonitor(
            run.model, log_every=run.recipe.log_every, good_states=self.states
        )
        self.done: list[str] = []
        self.acted: int | None = None

    def rewind(self) -> None:
        """Go back to the newest state that is 40 steps old, or to the first one; go on with fresh batches."""
        now = self.states.step
        step = self.states.rewind(before=now)
        self.go_on()
        self.done.append(f"step {now}: back to step {step}")

    def go_on(self) -> None:
        """After a rewind: the run goes on from the step that its weights have, and has its planned length."""
        if self.states.done < self.run.step:
            self.run.went_back(self.states.done)


#: What a fix does at the alarm. It returns what to do after each later step, given the diagnosis of a log step.
After = Callable[[AttentionDiagnosis | None], None]
Act = Callable[[Case, AttentionDiagnosis], "After | None"]


@dataclass(frozen=True)
class Policy:
    """tier: the diagnosis that starts it, "warning" or "error"."""

    act: Act
    tier: str = "error"


def _nothing(case: Case, diagnosis: AttentionDiagnosis) -> None:
    return None


def _product(case: Case, diagnosis: AttentionDiagnosis) -> After:
    """Apply what `get_intervention` proposes, now and at each later log step."""

    def after(found: AttentionDiagnosis | None) -> None:
        if found is None or not found.has_issues():
            return
        intervention = case.monitor.get_intervention(found)
        if intervention:
            done = apply_intervention(case.run.optimizer, intervention, scheduler=[])
            case.go_on()
            case.done.append(f"step {found.step}: {done.description}")

    after(diagnosis)
    return after


def _treat(
    case: Case,
    diagnosis: AttentionDiagnosis,
    *,
    rewind: bool = False,
    clip: float | None = None,
    norm: bool = False,
    rate: float = 1.0,
    again: float = 1.0,
) -> After | None:
    """Rewind, then QK-clip after every step or QK-norm at the measured norms, then a lower rate, in this order.

    again: what the rate is multiplied with once more if an error is there 50 steps later.
    """
    if rewind:
        case.rewind()
    if clip is not None:
        QKClip(case.run.model, threshold=clip).attach(*case.run.optimizers)
        case.done.append(f"QK-clip at {clip:g} after every step")
    if norm:
        start_qk_norm(case.run.model, case.run.optimizers)
        case.done.append("QK-norm at the measured norms")
    if rate != 1.0:
        case.run.cut_rates(rate)
        case.done.append(f"rate x {rate:g}")
    if again == 1.0:
        return None
    due = case.run.step + 50

    def after(found: AttentionDiagnosis | None) -> None:
        nonlocal due
        if found is not None and found.errors and case.run.step >= due:
            case.run.cut_rates(again)
            case.done.append(f"step {found.step}: rate x {again:g} again")
            due = case.run.recipe.steps + 1

    return after


def _random(case: Case, diagnosis: AttentionDiagnosis) -> After | None:
    """One of the fixes that a person might try, drawn by the recipe's seed."""
    draw = np.random.default_rng(case.run.recipe.seed)
    choices: list[Callable[[], Any]] = [
        partial(case.run.cut_rates, 0.5),
        partial(_sharpen, case.run.model, 0.5),
        partial(_weight_decay, case.run, 0.3),
        lambda: QKClip(case.run.model, threshold=100.0).attach(*case.run.optimizers),
        partial(start_qk_norm, case.run.model, case.run.optimizers),
    ]
    names = ("half the rate", "twice the temperature", "weight decay 0.3", "QK-clip at 100", "QK-norm")
    chosen = int(draw.integers(len(choices)))
    choices[chosen]()
    case.done.append(names[chosen])
    return None


@torch.no_grad()
def _sharpen(model: torch.nn.Module, factor: float) -> None:
    for name, parameter in model.named_parameters():
        if name.endswith("q_proj.weight"):
            parameter.mul_(factor)


def _weight_decay(run: Training, decay: float) -> None:
    for optimizer in run.optimizers:
        for group in optimizer.param_groups:
            group["weight_decay"] = decay


POLICIES: dict[str, Policy] = {
    "untreated": Policy(_nothing),
    "product": Policy(_product),
    "product, W": Policy(_product, "warning"),
    "random fix": Policy(_random),
    "rate x 0.25": Policy(partial(_treat, rate=0.25)),
    "rate x 0.1": Policy(partial(_treat, rate=0.1)),
    "QK-clip 30": Policy(partial(_treat, clip=30.0)),
    "QK-clip 100": Policy(partial(_treat, clip=100.0)),
    "QK-clip 30 + rate x 0.25": Policy(partial(_treat, clip=30.0, rate=0.25)),
    "QK-norm": Policy(partial(_treat, norm=True)),
    "QK-norm + rate x 0.25": Policy(partial(_treat, norm=True, rate=0.25)),
    "rewind + QK-clip 30 + rate x 0.25": Policy(partial(_treat, rewind=True, clip=30.0, rate=0.25)),
    "rewind + QK-norm + rate x 0.25": Policy(partial(_treat, rewind=True, norm=True, rate=0.25)),
    "rewind + QK-norm + rate x 0.5": Policy(partial(_treat, rewind=True, norm=True, rate=0.5)),
    "W: rewind + QK-norm + rate x 0.25": Policy(
        partial(_treat, rewind=True, norm=True, rate=0.25), "warning"
    ),
    "W: rewind + QK-norm + rate x 0.1": Policy(partial(_treat, rewind=True, norm=True, rate=0.1), "warning"),
    "W: rewind + QK-norm + rate x 0.5": Policy(partial(_treat, rewind=True, norm=True, rate=0.5), "warning"),
    "W: rewind + QK-norm + rate x 0.5, again": Policy(
        partial(_treat, rewind=True, norm=True, rate=0.5, again=0.25), "warning"
    ),
}
