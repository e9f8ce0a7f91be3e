"""Parameters that come to a model while it trains: they join a group of its optimizer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def as_list(
    optimizer: torch.optim.Optimizer | Iterable[torch.optim.Optimizer] | None,
) -> list[torch.optim.Optimizer]:
    """The optimizers of one, several or none. Raises TypeError for anything else."""
    given = (
        []
        if optimizer is None
        else [optimizer]
        if isinstance(optimizer, torch.optim.Optimizer)
        else optimizer
    )
    found = list(given) if isinstance(given, Iterable) else [given]
    for one in found:
        if not isinstance(one, torch.optim.Optimizer):
            raise TypeError(f"expected a torch.optim.Optimizer or a list of them, got {type(one).__name__}")
    return found


def vector_group(optimizers: Sequence[torch.optim.Optimizer], gain: Tensor | None = None) -> dict[str, Any]:
    """The parameter group for new gains: one that holds vectors already, with the least weight decay.

    A group keeps the rate and the schedule of the model for what joins it. Muon takes matrices only. With foreach=True
    or fused=True, one group holds either DTensors or plain tensors: `gain` says which of them the new ones are.
    Raises ValueError if no optimizer can take a vector.
    """
    groups = [
        group
        for optimizer in optimizers
        for group in optimizer.param_groups
        if gain is None
        or not (group.get("foreach") or group.get("fused"))
        or any(hasattr(p, "placements") == hasattr(gain, "placements") for p in group["params"])
    ]
    holders = [group for group in groups if any(p.dim() < 2 for p in group["params"])]
    if not holders:
        muon = getattr(torch.optim, "Muon", ())
        taken = [g for one in optimizers if isinstance(one, muon or ()) for g in one.param_groups]
        holders = [group for group in groups if not any(group is one for one in taken)]
    if not holders:
        raise ValueError(
            "expected an optimizer that takes vectors for the gains of QK-norm, got "
            f"{[type(one).__name__ for one in optimizers]} (give the one that trains biases and norms, too; groups "
            "with foreach=True or fused=True take no plain gains beside DTensors, and none that are DTensors beside "
            "plain tensors)"
        )
    return min(holders, key=lambda group: group.get("weight_decay", 0.0))


def leave(optimizers: Sequence[torch.optim.Optimizer], parameters: Iterable[nn.Parameter]) -> None:
    """Take parameters out of the groups and states that hold them."""
    gone = {id(parameter) for parameter in parameters}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["params"][:] = [p for p in group["params"] if id(p) not in gone]
        for parameter in [p for p in optimizer.state if isinstance(p, Tensor) and id(p) in gone]:
            del optimizer.state[parameter]
