"""Do what an intervention says, and be able to take it back."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..names import display_name
from . import dropout, layout, rates
from .intervention import ACTIONS

DROPOUT_AMOUNT = 0.1  # added where the intervention names no amount


@dataclass
class Applied:
    """An intervention that was carried out: what was done, and the way back.

    `revert()` undoes it by the inverse change (weights are divided by what they were multiplied
    with), so what was learnt in between is kept. A second call does nothing.
    """

    intervention: Mapping[str, Any]
    description: str
    undo: list[Callable[[], None]]

    def revert(self) -> None:
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

    reduce_lr multiplies the rate of every parameter group. increase_dropout raises one layer's attention
    dropout. qk_clip (MuonClip, arXiv 2507.20534) scales query and key weights so that each head's
    scores come down to the threshold: exactly for plain and rotary attention, and the q.k part where a
    bias or soft-cap follows. temperature divides query weights. The last two change weights: call this
    after `optimizer.step()`. Weights that an optimizer keeps a separate fp32 master of are overwritten
    by it; hand over the model that holds the masters.

    optimizer: needed for learning rates. model: needed for everything else, unless the intervention
    comes from a monitor, which knows its model. scheduler: one, or a list of them, whose base rates
    are scaled along.

    Returns an `Applied`, whose `revert()` takes it back. Raises ValueError, and then has changed nothing,
    for an unknown action, missing or wrong items, an unknown layer, or one that cannot be treated.
    """
    action = intervention.get("action")
    if action not in ACTIONS:
        raise ValueError(f"expected intervention['action'] in {ACTIONS}, got {action!r}")
    lr_factor = None
    if action == "reduce_lr" or (action == "qk_clip" and "lr_factor" in intervention):
        lr_factor = _positive(intervention, "factor" if action == "reduce_lr" else "lr_factor")
        _need(optimizer, "an optimizer", f"{action} with a learning-rate factor")
    done: list[tuple[str, Callable[[], None]]] = []
    if action != "reduce_lr":
        model = getattr(intervention, "model", None) if model is None else model
        _need(model, "a model", action)
        done.append(_CHANGES[action](model, intervention))
    if lr_factor is not None:
        done.append(rates.scale(optimizer, lr_factor, scheduler))
    return Applied(
        intervention, f"{action}: {'; '.join(text for text, _ in done)}", [undo for _, undo in done]
    )


@dataclass(frozen=True)
class _Scaling:
    """Factors for one layer's weights: query (H,), key (H,) or None to leave the keys alone."""

    layer: str
    query: Tensor
    key: Tensor | None

    def apply(self, model: nn.Module) -> None:
        layout.scale(layout.find(model, self.layer, len(self.query)), self.query, self.key)

    def inverse(self) -> _Scaling:
        return _Scaling(self.layer, 1 / self.query, None if self.key is None else 1 / self.key)


def _clip(model: nn.Module, intervention: Mapping[str, Any]) -> tuple[str, Callable[[], None]]:
    limit = _positive(intervention, "threshold")
    plan = []
    for layer, largest in _layers(intervention).items():
        found = layout.find(model, layer, len(largest))
        sizes = torch.tensor([math.nan if size is None else size for size in largest], dtype=torch.float64)
        # A head without a finite number is left alone: no factor would make it right.
        gamma = torch.where(sizes.isfinite() & (sizes > limit), limit / sizes, 1.0)
        # A shared key head serves a whole group of query heads, so the query takes all of it.
        plan.append(
            _Scaling(layer, gamma, None) if found.keys_shared else _Scaling(layer, gamma.sqrt(), gamma.sqrt())
        )
    return _scale_weights(model, plan)


def _temperature(model: nn.Module, intervention: Mapping[str, Any]) -> tuple[str, Callable[[], None]]:
    plan = []
    for layer, values in _layers(intervention).items():
        layout.find(model, layer, len(values))
        factors = [_check_positive(f"the temperature factors of {layer!r}", value) for value in values]
        plan.append(_Scaling(layer, 1 / torch.tensor(factors, dtype=torch.float64), None))
    return _scale_weights(model, plan)


def _increase_dropout(model: nn.Module, intervention: Mapping[str, Any]) -> tuple[str, Callable[[], None]]:
    amount = _check_positive("'amount'", intervention.get("amount", DROPOUT_AMOUNT))
    return dropout.increase(model, intervention.get("layer"), amount)


_CHANGES = {"qk_clip": _clip, "temperature": _temperature, "increase_dropout": _increase_dropout}


def _scale_weights(model: nn.Module, plan: list[_Scaling]) -> tuple[str, Callable[[], None]]:
    """Every layer of the plan was found before the first is touched: all of it is done, or none."""
    plan = [scaling for scaling in plan if (scaling.query != 1).any()]

    def run(scalings: list[_Scaling]) -> None:
        for scaling in scalings:
            scaling.apply(model)

    run(plan)
    texts = [f"{display_name(s.layer)} heads {torch.nonzero(s.query != 1).flatten().tolist()}" for s in plan]
    text = f"scaled the weights of {', '.join(texts)}" if texts else "nothing to scale"
    return text, lambda: run([scaling.inverse() for scaling in plan])


def _layers(intervention: Mapping[str, Any]) -> Mapping[str, Sequence[float | None]]:
    layers = intervention.get("layers")
    if not isinstance(layers, Mapping) or not layers:
        raise ValueError(f"expected 'layers' to map layer names to one number per head, got {layers!r}")
    for layer, values in layers.items():
        if isinstance(values, str) or not isinstance(values, Sequence) or not values:
            raise ValueError(f"expected one number per head for layer {layer!r}, got {values!r}")
    return layers


def _positive(intervention: Mapping[str, Any], name: str) -> float:
    return _check_positive(repr(name), intervention.get(name))


def _check_positive(name: str, value: Any) -> float:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value <= 0:
        raise ValueError(f"expected {name} to be a number > 0, got {value!r}")
    return float(value)


def _need(thing: Any, what: str, action: str) -> None:
    if thing is None:
        raise ValueError(f"expected {what} for {action}, got None")
