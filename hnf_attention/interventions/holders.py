"""What the processes that hold parts of one layer, in DTensors, decide together."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist
from torch import nn

from ..names import named_modules
from . import layout, peers
from .projections import Projections
from .shards import Spread

T = TypeVar("T")


def together(model: nn.Module, layer: str, check: Callable[[], T]) -> T:
    """What `check` gives. Every process that holds a part of the layer has to ask.

    Raises ValueError in all of them if it raises one in one of them. A layer without DTensors asks this process alone.
    """
    modules = dict(named_modules(model))
    weight = Spread.of(modules, layer).weight if layer in modules else None
    if weight is None:
        return check()
    reason, found = None, []
    try:
        found.append(check())
    except ValueError as error:
        reason = str(error)
    reasons = {dist.get_rank(): reason}
    for dim in range(weight.device_mesh.ndim):
        along = peers.gathered(reasons, weight.device_mesh.get_group(dim))
        reasons = {number: theirs for each in along for number, theirs in each.items()}
    said = peers.told(reasons)
    if said is not None:
        raise ValueError(said)
    return found[0]


def find(model: nn.Module, layer: str, num_heads: int) -> Projections:
    """The layer's weights to be scaled, as `layout.find`, if none of the processes that hold parts of it refuses it."""
    return together(model, layer, lambda: layout.find(model, layer, num_heads))
