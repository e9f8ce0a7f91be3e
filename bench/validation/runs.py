"""Training an ensemble of recipes with their twins, watched by the monitor's recorder."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hnf_attention import instrument
from hnf_attention.monitoring.recorder import Recorder
from hnf_attention.statistics.heads import Snapshot

from .batches import Batches
from .clock import OutOfTime
from .ensemble import Ensemble
from .optimizers import Together
from .recipes import Recipe
from .record import Record, record_of

EVALUATION_STEPS = 8
PRETRAIN_RATE = 2e-3
_HISTORY = 2**33  # bytes; nothing is thinned
_TOP_BIT = 1 << 30  # of the exponent of a float32


def train(
    recipes: Sequence[Recipe], device: torch.device | str = "cpu", deadline: float = float("inf")
) -> list[Record]:
    """Train recipes of one shape, each with its twin where it has no QK-norm itself; those with it come last.

    deadline: of `time.monotonic`. Raises OutOfTime when it has passed, and ValueError for recipes of several shapes.
    """
    device = torch.device(device)
    recipes = sorted(recipes, key=lambda recipe: recipe.qk_norm)
    members = [*recipes, *(each.twin for each in recipes if not each.qk_norm)]
    run = _Run(members, device, len(recipes))
    if recipes[0].pretrain:
        before = [replace(x, data="python", rate=PRETRAIN_RATE, warmup=20, label_noise=0.0) for x in members]
        run.steps([replace(x, event="", steps=x.pretrain) for x in before], None, deadline)
        run.optimizer = Together(run.model, members)
    with instrument(run.model, mode="probe") as instrumentation:
        recorder = Recorder(instrumentation, recipes[0].log_every, history_bytes=_HISTORY, every_step=True)
        run.steps(members, recorder, deadline)
        history = list(recorder.history)
        recorder.stop()
    evaluation = run.evaluate(members)
    return _records(recipes, members, history, run.losses.cpu().numpy(), run.norms.cpu().numpy(), evaluation)


class _Run:
    def __init__(self, members: Sequence[Recipe], device: torch.device, watched: int) -> None:
        self.device = device
        self.model = Ensemble(members, device)
        self.optimizer = Together(self.model, members)
        self.losses = self.norms = torch.empty(0)
        self._autocast = members[0].precision.split()[0]

    def steps(self, members: Sequence[Recipe], recorder: Recorder | None, deadline: float) -> None:
        steps = members[0].steps
        self.losses = torch.full((steps, len(members)), torch.nan, device=self.device)
        self.norms = torch.full_like(self.losses, torch.nan)
        rates = np.stack([each.rates() for each in members], 1)
        rates = torch.tensor(rates, dtype=torch.float32, device=self.device)
        batches = Batches(members, steps, self.device)
        for step in range(steps):
            if time.monotonic() > deadline:
                raise OutOfTime(f"{members[0].name} at step {step}")
            inputs, targets = batches.at(step)
            losses = self._losses(inputs, targets)
            self.losses[step] = losses.detach()
            grad = self.model.gradients(self.optimizer.scaled(losses))
            self.norms[step] = self.optimizer.step(grad, rates[step])
            self._faults(members, step + 1)
            if recorder is not None:
                recorder.advance()

    def _losses(self, inputs: Tensor, targets: Tensor) -> Tensor:
        low = self._autocast != "float32"
        dtype = getattr(torch, self._autocast) if low else None
        with torch.autocast(self.device.type, dtype=dtype, enabled=low):
            logits = self.model(inputs)
        losses = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none")
        return losses.view(len(inputs), -1).mean(1)

    @torch.no_grad()
    def evaluate(self, members: Sequence[Recipe]) -> np.ndarray:
        batches = Batches(members, EVALUATION_STEPS, self.device, held_out=True)
        losses = [self._losses(*batches.at(step)) for step in range(EVALUATION_STEPS)]
        return torch.stack(losses).mean(0).cpu().numpy()

    @torch.no_grad()
    def _faults(self, members: Sequence[Recipe], step: int) -> None:
        for number, each in enumerate(members):
            if each.event.startswith("bit in") and step == each.event_step:
                part = "attention.q_proj" if each.event == "bit in query" else "mlp.up_proj"
                weight = self.model.weights[f"blocks.{each.depth // 2}.{part}.weight"][number]
                row, column = each.seed % weight.shape[0], each.seed % weight.shape[1]
                weight.view(torch.int32)[row, column] ^= _TOP_BIT


def _records(
    recipes: Sequence[Recipe],
    members: Sequence[Recipe],
    history: Sequence[Snapshot],
    losses: np.ndarray,
    norms: np.ndarray,
    evaluation: np.ndarray,
) -> list[Record]:
    """The columns of each recipe, and the losses of its twin."""
    heads, twin, found = recipes[0].heads, len(recipes), []
    for number, recipe in enumerate(recipes):
        columns = slice(number * heads, (number + 1) * heads)
        twins: list[int] = [] if recipe.qk_norm else [twin]
        twin += len(twins)
        found.append(
            record_of(
                recipe,
                losses[:, number],
                norms[:, number],
                history,
                losses[:, twins[0]] if twins else None,
                evaluation[[number, *twins]],
                columns,
            )
        )
    return found
