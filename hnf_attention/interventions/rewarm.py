"""Warming the learning rate up again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .action import Preview
from .beside_steps import BesideSteps
from .intervention import positive, share


class Rewarm(BesideSteps):
    """Warms the learning rate up again: it rises from `floor` of its schedule to all of it within `steps` steps.

    The schedule itself goes on unchanged. Raises ValueError for wrong items.
    """

    name = "rewarm_lr"

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer], intervention: Mapping[str, Any]):
        super().__init__(optimizers)
        self._steps, self._floor = positive(intervention, "steps", 100), share(intervention, "floor", 0.1)
        self._done: dict[int, int] = {}
        self._rates: dict[int, list[Any]] = {}

    def preview(self) -> Preview:
        """As `Action.preview`."""
        text = f"learning rates rise from {self._floor:g} of their schedule to all of it within {self._steps:g} steps"
        return Preview(text, {"steps": self._steps, "floor": self._floor})

    def share(self, step: int) -> float:
        """What is left of the rate at a step, counted from 0."""
        return min(1.0, self._floor + (1 - self._floor) * step / self._steps)

    def before(self, optimizer: torch.optim.Optimizer) -> None:
        """Lower the rates."""
        done = self._done.get(id(optimizer), 0)
        self._done[id(optimizer)] = done + 1
        share = self.share(done)
        if share < 1:
            rates = [group["lr"] for group in optimizer.param_groups]
            self._rates[id(optimizer)] = [x.clone() if isinstance(x, Tensor) else x for x in rates]
            for group in optimizer.param_groups:
                _set_rate(group, group["lr"] * share)

    def after(self, optimizer: torch.optim.Optimizer) -> None:
        """Give the rates back to their schedule."""
        for group, rate in zip(optimizer.param_groups, self._rates.pop(id(optimizer), [])):
            _set_rate(group, rate)


def _set_rate(group: dict[str, Any], rate: Any) -> None:
    if isinstance(group["lr"], Tensor):
        group["lr"].copy_(rate)
    else:
        group["lr"] = rate
