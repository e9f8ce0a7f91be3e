"""Do what an intervention says, and be able to take it back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn

from . import dropout, learning_rate, qk_clip, temperature
from .intervention import Change, positive, shortened

_Thing = TypeVar("_Thing")

#: Actions on a model: (model, intervention) -> what was changed.
_ON_MODELS: dict[str, Callable[[nn.Module, Mapping[str, Any]], Change]] = {
    "increase_dropout": dropout.apply,
    "qk_clip": qk_clip.apply,
    "temperature": temperature.apply,
}
ACTIONS = ("reduce_lr", *_ON_MODELS)


@dataclass(repr=False)
class Applied:
    """An intervention that was carried out: what was done, and the way back."""

    intervention: Mapping[str, Any]
    description: str
    undo: list[Callable[[], None]]

    def __repr__(self) -> str:
        state = "" if self.undo else ", reverted"
        return f"Applied({shortened(self.description)}{state})"

    def revert(self) -> None:
        """Undo it by the inverse change: weights are divided by what they were multiplied with.

        What was learnt in between is kept. A second call does nothing.
        """
        while self.undo:
            self.undo.pop()()


def apply_intervention(
    optimizer: torch.optim.Optimizer | None,
    intervention: Mapping[str, Any],
    model: nn.Module | None = None,
    *,
    scheduler: Any = None,
) -> Applied:
    """Carry out an intervention: one of a monitor, or a dict of the same shape (see `Intervention`).

    Call it after `optimizer.step()`, because weights may change. The actions:

    - reduce_lr multiplies the rate of every parameter group.
    - increase_dropout raises one layer's attention dropout.
    - qk_clip (MuonClip, arXiv 2507.20534) scales query and key weights, so that each head's scores come down
      to the threshold. It is exact for plain and rotary attention; if a bias or soft-cap follows, for the q.k part.
    - temperature divides query weights.

    optimizer: needed for learning rates.
    model: needed for everything else, unless the intervention comes from a monitor, which knows its model. If the
        optimizer keeps separate fp32 master weights, hand over the model that holds them: it overwrites others.
    scheduler: one, or a list of them, whose base rates are scaled along.

    Returns an `Applied`, whose `revert()` takes it back. Raises ValueError, and then has changed nothing,
    for an unknown action, missing or wrong items, an unknown layer, or one that cannot be treated.
    """
    action = intervention.get("action")
    if action not in ACTIONS:
        raise ValueError(f"expected intervention['action'] in {ACTIONS}, got {action!r}")
    todo: list[Callable[[], Change]] = []
    if action in _ON_MODELS:
        model = getattr(intervention, "model", None) if model is None else model
        todo.append(partial(_ON_MODELS[action], _need(model, "a model", action), intervention))
    if action == "reduce_lr" or (action == "qk_clip" and "lr_factor" in intervention):
        factor = positive(intervention, "factor" if action == "reduce_lr" else "lr_factor")
        optimizer = _need(optimizer, "an optimizer", f"{action} with a learning-rate factor")
        todo.append(partial(learning_rate.apply, optimizer, factor, scheduler))
    done = [change() for change in todo]
    description = f"{action}: {'; '.join(change.description for change in done)}"
    return Applied(intervention, description, [change.undo for change in done])


def _need(thing: _Thing | None, what: str, action: str) -> _Thing:
    if thing is None:
        raise ValueError(f"expected {what} for {action}, got None")
    return thing
