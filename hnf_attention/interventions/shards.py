"""How the weights of a layer lie over processes: in FSDP2's shards, split by heads (tensor parallelism), or both.

Tensor parallelism gives each process the rows of some heads: they are read and scaled as the weights of a layer that
has these heads alone. FSDP2 cuts what a process would hold into shards, which many processes keep. The rows of those
are looked up in factors that stand for them, and the factors are cut as the rows are, without communication.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def own_class(module: nn.Module) -> type[nn.Module]:
    """The class that the module's author wrote: FSDP2 puts one of its own in front, for the same code."""
    first, *others = type(module).__mro__
    return others[1] if others[0].__name__ == "FSDPModule" else first


def own_part(tensor: Tensor) -> Tensor:
    """The tensor itself or, of a DTensor, what this process holds of it, in the same memory."""
    return cast("DTensor", tensor).to_local() if hasattr(tensor, "placements") else tensor


@dataclass(frozen=True)
class HeadPart:
    """The heads of a layer that a process holds: part `index` of `count` equal ones, in the order of heads."""

    index: int = 0
    count: int = 1

    def of(self, num_heads: int) -> slice:
        """Which of all heads these are. Raises ValueError if the parts cannot be equal."""
        size, left = divmod(num_heads, self.count)
        if left:
            raise ValueError(
                f"expected heads in {self.count} equal parts, as tensor parallelism splits them, got {num_heads}"
            )
        return slice(self.index * size, (self.index + 1) * size)


@dataclass(frozen=True)
class _Cut:
    """A tensor is cut along `dim` into `count` pieces, as torch.chunk cuts, and this process has number `index`."""

    dim: int
    index: int
    count: int

    def of(self, length: int) -> tuple[int, int]:
        """(first row, number of rows) of this process, of so many."""
        size = -(-length // self.count)
        start = min(length, self.index * size)
        return start, min(size, length - start)


@dataclass(frozen=True)
class Spread:
    """How one layer's weights lie over processes.

    fsdp: FSDP2 keeps them in shards. weight: one of them that is a DTensor, None for whole ones. part: of the heads.
    """

    layer: str
    fsdp: bool = False
    weight: DTensor | None = None
    part: HeadPart = HeadPart()

    @staticmethod
    def of(modules: Mapping[str, nn.Module], layer: str) -> Spread:
        """That of a module of a model, by its name in `modules`, or of the nearest one around it that has weights.

        FSDP2 takes gathered weights back into their shards for it: call this between forwards.
        """
        names = layer.split(".") if layer else []
        outer = [
            module for n in range(len(names)) if (module := modules.get(".".join(names[:n]))) is not None
        ]
        around = [*outer, modules[layer]]
        while len(around) > 1 and all(p.dim() < 2 for p in around[-1].parameters()):
            around.pop()
        fsdp = sys.modules.get("torch.distributed.fsdp")  # imported already if it sharded the model
        managed = [
            module
            for module in (*around[:-1], *around[-1].modules())
            if fsdp is not None and isinstance(module, fsdp.FSDPModule)
        ]
        for module in managed:
            module.reshard()
        weights = [
            cast("DTensor", p) for p in around[-1].parameters() if p.dim() > 1 and hasattr(p, "placements")
        ]
        parts = {part: weight for weight in weights if (part := _part(weight, bool(managed))).count > 1}
        part, weight = next(iter(parts.items()), (HeadPart(), weights[0] if weights else None))
        return Spread(layer, bool(managed), weight, part)

    def rows(self, parameter: Tensor, dim: int, shards: Shards | None) -> Tensor:
        """What stands for the rows of a query or key weight along `dim`: the values of this process's heads.

        shards: takes in the factors of a weight that FSDP2 keeps in shards; these are returned then, fp64 on the CPU,
            of size 1 along the other dimensions.
        Raises ValueError for a weight that is not split as the layer's heads are.
        """
        placements = getattr(parameter, "placements", None)
        if placements is None and self.fsdp:
            raise ValueError(
                f"expected the weights of layer {self.layer!r} in FSDP2's shards, as the others, got whole ones"
            )
        cuts = [] if placements is None else _cuts(cast("DTensor", parameter), self.fsdp)[1]
        count = self.part.count
        partial = placements is not None and any(p.is_partial() for p in placements)
        if partial or any(cut.dim != dim for cut in cuts) or _head_part(cuts) != self.part:
            raise ValueError(
                f"expected the query and key weights of layer {self.layer!r} to be split by rows into {count} parts, "
                f"as ColwiseParallel splits them, got {placements or 'a whole one'}"
            )
        if parameter.shape[dim] % count:
            raise ValueError(
                f"expected {count} equal parts of the query and key weights of layer {self.layer!r}, "
                f"got {parameter.shape[dim]} rows"
            )
        if shards is None:
            return own_part(parameter.detach())
        return shards.rows(cast("DTensor", parameter.detach()), dim, parameter.shape[dim] // count)

    def splits(self, parameter: Tensor) -> bool:
        """Whether a weight is split over processes into as many parts as the layer's heads are."""
        return hasattr(parameter, "placements") and _part(cast("DTensor", parameter), self.fsdp) == self.part

    def own_shape(self, parameter: Tensor) -> tuple[int, ...]:
        """The shape of what tensor parallelism gives this process of a parameter, FSDP2's shards put together."""
        shape = list(parameter.shape)
        if hasattr(parameter, "placements"):
            for cut in _cuts(cast("DTensor", parameter), self.fsdp)[1]:
                shape[cut.dim] = cut.of(shape[cut.dim])[1]
        return tuple(shape)

    def by_head(self, values: Tensor) -> Tensor:
        """Numbers of this process's heads (H,), as a tensor of the kind that the layer's weights are.

        Beside DTensors it is one of all heads, on their mesh: what takes both at once (a norm of all gradients,
        foreach=True) takes no plain tensor among them. Processes that hold the same heads must give equal numbers.
        """
        if self.weight is None:
            return values
        from torch.distributed.tensor import DTensor, Replicate, Shard

        mesh, first = self.weight.device_mesh, _fsdp_dims(self.weight, self.fsdp)
        placements = [
            Shard(0) if dim >= first and hasattr(placement, "dim") else Replicate()
            for dim, placement in enumerate(self.weight.placements)
        ]
        return DTensor.from_local(values, mesh, placements, run_check=False)


class Shards:
    """The factors, 1 at first, of the rows of a layer's parameters that FSDP2 keeps in shards.

    All processes that hold the same heads have to multiply alike.
    """

    def __init__(self) -> None:
        self._factors: list[tuple[DTensor, Tensor]] = []

    def rows(self, parameter: DTensor, dim: int, size: int) -> Tensor:
        """Factors for a parameter along `dim`, where this process's heads have `size` rows."""
        factors = torch.ones([size if d == dim else 1 for d in range(parameter.dim())], dtype=torch.float64)
        self._factors.append((parameter, factors))
        return factors

    def multiply(self) -> None:
        """Multiply every parameter by its factors, in place. The factors are 1 then, for another time."""
        for parameter, factors in self._factors:
            mine = factors
            for cut in _cuts(parameter, fsdp=True)[0]:
                if factors.shape[cut.dim] > 1:
                    mine = mine.narrow(cut.dim, *cut.of(mine.shape[cut.dim]))
            wide = torch.promote_types(parameter.dtype, torch.float32)
            own_part(parameter).mul_(mine.to(parameter.device, wide))
            factors.fill_(1)


def _fsdp_dims(parameter: DTensor, fsdp: bool) -> int:
    """How many dimensions of its mesh are FSDP2's: they come first, and only the last of them is sharded."""
    return (
        next((dim + 1 for dim, p in enumerate(parameter.placements) if not p.is_replicate()), 0)
        if fsdp
        else 0
    )


def _cuts(parameter: DTensor, fsdp: bool) -> tuple[list[_Cut], list[_Cut]]:
    """How FSDP2 cuts what a process would hold of a parameter, and how tensor parallelism cuts the parameter."""
    mesh, first = parameter.device_mesh, _fsdp_dims(parameter, fsdp)
    found: tuple[list[_Cut], list[_Cut]] = ([], [])
    for dim, placement in enumerate(parameter.placements):
        if hasattr(placement, "dim") and mesh.size(dim) > 1:
            cut = _Cut(placement.dim % parameter.dim(), mesh.get_local_rank(dim), mesh.size(dim))
            found[dim >= first].append(cut)
    return found


def _part(parameter: DTensor, fsdp: bool) -> HeadPart:
    return _head_part(_cuts(parameter, fsdp)[1])


def _head_part(cuts: list[_Cut]) -> HeadPart:
    index, count = 0, 1
    for cut in cuts:
        index, count = index * cut.count + cut.index, count * cut.count
    return HeadPart(index, count)
