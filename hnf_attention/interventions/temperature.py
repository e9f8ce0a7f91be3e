"""Attention temperature: flatten the softmax of single heads by dividing their query weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from . import layout
from .intervention import Intervention, check_positive, numbers_by_layer
from .scaling import LayerScaling


def propose(layers: Mapping[str, Sequence[float]], reason: str) -> Intervention:
    """Multiply the softmax temperature of each head by its factor; 1 leaves a head alone.

    layers: layer name to the factor of each head.
    """
    return Intervention({"action": "temperature", "layers": dict(layers), "reason": reason})


def plan(model: nn.Module, intervention: Mapping[str, Any]) -> list[LayerScaling]:
    """The factors of each layer's query weights. Nothing is changed yet.

    Raises ValueError for wrong items, and for layers that cannot be scaled.
    """
    scalings = []
    for layer, values in numbers_by_layer(intervention).items():
        layout.find(model, layer, len(values))
        factors = [check_positive(f"the temperature factors of {layer!r}", value) for value in values]
        scalings.append(LayerScaling(layer, 1 / torch.tensor(factors, dtype=torch.float64), None))
    return scalings
