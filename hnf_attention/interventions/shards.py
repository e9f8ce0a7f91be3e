"""Weights that FSDP2 keeps in shards, scaled where they lie, without communication.

Their values are spread over many processes. A layer's rows are therefore looked up in factors that stand for them.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from ..names import named_modules

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def own_class(module: nn.Module) -> type[nn.Module]:
    """The class that the module's author wrote: FSDP2 puts one of its own in front, for the same code."""
    first, *others = type(module).__mro__
    return others[1] if others[0].__name__ == "FSDPModule" else first


class Shards:
    """The factors, 1 at first, of the rows of an FSDP2 layer's parameters. Every process has to multiply alike."""

    def __init__(self, layer: str):
        self._layer = layer
        self._factors: list[tuple[DTensor, Tensor]] = []

    @staticmethod
    def of(model: nn.Module, layer: str) -> Shards | None:
        """None if `fully_shard` was applied neither to the layer nor to a module around it."""
        fsdp = sys.modules.get("torch.distributed.fsdp")  # imported already if it sharded the model
        names = layer.split(".") if layer else []
        modules = dict(named_modules(model))
        around = (modules.get(".".join(names[:depth])) for depth in range(len(names) + 1))
        managed = fsdp is not None and any(isinstance(module, fsdp.FSDPModule) for module in around)
        return Shards(layer) if managed else None

    def rows(self, parameter: Tensor, dim: int = 0) -> Tensor:
        """Factors for a parameter along `dim`, fp64 on the CPU, of size 1 along the others.

        Raises ValueError for a parameter that is not sharded now, or not by FSDP2 alone.
        """
        placements = getattr(parameter, "placements", None)
        if placements is None:
            raise ValueError(
                f"expected the weights of layer {self._layer!r} in their shards, got whole ones, which FSDP2 "
                "drops (call the model's reshard() first)"
            )
        if sum(not placement.is_replicate() for placement in placements) != 1:
            raise ValueError(
                f"expected the weights of layer {self._layer!r} to be sharded by FSDP2 alone, got {placements}"
            )
        shape = [1] * parameter.dim()
        shape[dim] = parameter.shape[dim]
        factors = torch.ones(shape, dtype=torch.float64)
        self._factors.append((cast("DTensor", parameter.detach()), factors))
        return factors

    def multiply(self) -> None:
        """Multiply every parameter by its factors, in place. The factors are 1 then, for another time."""
        from torch.distributed.tensor import DTensor, Replicate

        for parameter, factors in self._factors:
            mesh, wide = parameter.device_mesh, torch.promote_types(parameter.dtype, torch.float32)
            whole = factors.to(parameter.device, wide)
            # Every process has all factors, so cutting them as the parameter is cut takes no communication.
            wide_dims = [dim for dim in range(whole.dim()) if whole.shape[dim] > 1]
            cut = [
                p if any(p.is_shard(dim) for dim in wide_dims) else Replicate() for p in parameter.placements
            ]
            everywhere = [Replicate()] * mesh.ndim
            mine = DTensor.from_local(whole, mesh, everywhere, run_check=False).redistribute(mesh, cut)
            parameter.to_local().mul_(mine.to_local())
            factors.fill_(1)
