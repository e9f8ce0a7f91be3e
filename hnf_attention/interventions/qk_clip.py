"""QK-clip: scale down the query and key weights of heads whose scores are too large.

The rule is that of MuonClip (Kimi K2, arXiv 2507.20534).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from . import layout
from .intervention import Intervention, numbers_by_layer, positive
from .scaling import LayerScaling


def propose(
    threshold: float,
    layers: Mapping[str, Sequence[float | None]],
    reason: str,
    lr_factor: float | None = None,
) -> Intervention:
    """Scale down the query and key weights of each head whose scores exceed `threshold` (nats).

    layers: layer name to the largest |score| of each head, None where it is not finite.
    lr_factor: multiply the learning rates as well.
    """
    items: dict[str, Any] = {"action": "qk_clip", "threshold": threshold, "layers": dict(layers)}
    if lr_factor is not None:
        items["lr_factor"] = lr_factor
    return Intervention({**items, "reason": reason})


def plan(model: nn.Module, intervention: Mapping[str, Any]) -> list[LayerScaling]:
    """The factors of each layer's weights; 'lr_factor' is left to the caller. Nothing is changed yet.

    Raises ValueError for wrong items, and for layers that cannot be scaled.
    """
    limit = positive(intervention, "threshold")
    scalings = []
    for layer, largest in numbers_by_layer(intervention).items():
        found = layout.find(model, layer, len(largest))
        sizes = torch.tensor([math.nan if size is None else size for size in largest], dtype=torch.float64)
        # A head without a finite number is left alone: no factor would make it right.
        gamma = torch.where(sizes.isfinite() & (sizes > limit), limit / sizes, 1.0)
        # A key head that several query heads share cannot be scaled for one of them: the query takes it all.
        shared = found.keys_shared
        scalings.append(
            LayerScaling(layer, gamma if shared else gamma.sqrt(), None if shared else gamma.sqrt())
        )
    return scalings


def predicted(intervention: Mapping[str, Any]) -> dict[str, list[float | None]]:
    """The size of each head after it, nats."""
    limit = positive(intervention, "threshold")
    layers = numbers_by_layer(intervention)
    return {
        layer: [None if x is None or not math.isfinite(x) else min(x, limit) for x in sizes]
        for layer, sizes in layers.items()
    }
