"""What an intervention is: a dict that says which fix, where, how strong and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

ACTIONS = ("reduce_lr", "increase_dropout", "qk_clip", "temperature")


class Intervention(dict):
    """A proposed fix, JSON-able. The monitor's own also knows its `model`, which is no item of it.

    reduce_lr: {'action', 'factor', 'reason'}.
    increase_dropout: {'action', 'layer', 'reason'} and optionally 'amount' (added probability).
    qk_clip: {'action', 'threshold', 'layers': {layer: [largest |score| of each head]}, 'reason'}, and
        'lr_factor' where the learning rate should fall as well.
    temperature: {'action', 'layers': {layer: [factor of each head]}, 'reason'}.
    """

    def __init__(self, items: Mapping[str, Any], model: nn.Module | None = None):
        super().__init__(items)
        self.model = model

    def __reduce__(self):
        return Intervention, (dict(self),)


def reduce_lr(factor: float, reason: str) -> Intervention:
    """Multiply every learning rate by `factor`."""
    return Intervention({"action": "reduce_lr", "factor": factor, "reason": reason})


def increase_dropout(layer: str, reason: str) -> Intervention:
    """More attention dropout in one layer."""
    return Intervention({"action": "increase_dropout", "layer": layer, "reason": reason})


def qk_clip(
    threshold: float,
    layers: Mapping[str, Sequence[float | None]],
    reason: str,
    lr_factor: float | None = None,
) -> Intervention:
    """Scale down the query and key weights of each head whose scores exceed `threshold` (nats)."""
    items = {"action": "qk_clip", "threshold": threshold, "layers": dict(layers)}
    if lr_factor is not None:
        items["lr_factor"] = lr_factor
    return Intervention({**items, "reason": reason})


def temperature(layers: Mapping[str, Sequence[float]], reason: str) -> Intervention:
    """Multiply the softmax temperature of each head by its factor (1 leaves a head alone)."""
    return Intervention({"action": "temperature", "layers": dict(layers), "reason": reason})
