"""Do what an intervention says, and be able to take it back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn

from . import dropout, layout, learning_rate, qk_clip, temperature
from .intervention import Change, positive, shortened
from .scaling import LayerScaling, refuse_masters, scale_layers

_Thing = TypeVar("_Thing")

#: Actions that scale weights: (model, intervention) -> the factors of each layer.
_SCALINGS: dict[str, Callable[[nn.Module, Mapping[str, Any]], list[LayerScaling]]] = {
    "qk_clip": qk_clip.plan,
    "temperature": temperature.plan,
}
ACTIONS = ("reduce_lr", "increase_dropout", *_SCALINGS)


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

        What was learnt in between is kept. Without any learning, the weights come back but for two roundings of
        their dtype: 2^-23 of each in fp32, 2^-7 in bf16. Dropout comes back exactly. A second call does nothing.
        Raises ValueError if the weights cannot be found any more, for example under an adapter.
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

    The last two change a weight only on proof that the scores of its head, and nothing else, follow it: they take
    the attention of `torch.nn` and of the transformers classes in `known_classes`. A layer of any other class is
    copied, with random weights, and tried on random inputs.

    optimizer: needed for learning rates. Given for weights too, it must update them itself, in their own dtype.
    model: needed for everything else, unless the intervention comes from a monitor, which knows its model. If the
        optimizer keeps separate fp32 master weights, hand over the model that holds them: it overwrites others.
    scheduler: one, or a list of them, whose base rates are scaled along.

    Returns an `Applied`, whose `revert()` takes it back. Raises ValueError, and then has changed nothing,
    for an unknown action, missing or wrong items, an unknown layer, or one that cannot be treated: its weights are
    frozen, shared, wrapped, of 8 bits or fewer, or not proved to be its queries and keys.
    """
    action = intervention.get("action")
    if action not in ACTIONS:
        raise ValueError(f"expected intervention['action'] in {ACTIONS}, got {action!r}")
    cut: list[Callable[[], Change]] = []
    if action == "reduce_lr" or (action == "qk_clip" and "lr_factor" in intervention):
        factor = positive(intervention, "factor" if action == "reduce_lr" else "lr_factor")
        rates = _need(optimizer, "an optimizer", f"{action} with a learning-rate factor")
        cut.append(partial(learning_rate.apply, rates, factor, scheduler))
    todo: list[Callable[[], Change]] = []
    if action != "reduce_lr":
        model = _need(getattr(intervention, "model", None) if model is None else model, "a model", action)
        if action == "increase_dropout":
            todo.append(partial(dropout.apply, model, intervention))
        else:
            plan = _SCALINGS[action](model, intervention)
            if optimizer is not None:
                for scaling in plan:
                    found = layout.find(model, scaling.layer, len(scaling.query))
                    refuse_masters(scaling.layer, found.parameters, optimizer)
            todo.append(partial(scale_layers, model, plan))
    todo += cut
    done: list[Change] = []
    try:
        for change in todo:
            done.append(change())
    except Exception:
        for each in reversed(done):
            each.undo()
        raise
    description = f"{action}: {'; '.join(change.description for change in done)}"
    return Applied(intervention, description, [change.undo for change in done])


def _need(thing: _Thing | None, what: str, action: str) -> _Thing:
    if thing is None:
        raise ValueError(f"expected {what} for {action}, got None")
    return thing
