"""What the processes that hold parts of one model, in DTensors, decide together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch.distributed as dist
from torch import Tensor, nn

from ..names import named_modules
from . import peers
from .intervention import shortened
from .shards import Spread

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

T = TypeVar("T")


class _Tried(NamedTuple):
    """What one process was asked to do, and why it cannot. refuses: it does so by ValueError."""

    asked: str
    reason: str | None
    refuses: bool


def together(model: nn.Module, layer: str, act: Callable[[], T]) -> T:
    """What `act` gives. Every process that holds a part of the layer has to ask.

    Raises in all of them if it raises in one, as `agreed`. A layer without DTensors asks this process alone.
    """
    modules = dict(named_modules(model))
    weight = Spread.of(modules, layer).weight if layer in modules else None
    return agreed([] if weight is None else [weight.device_mesh], f"layer {layer!r}", act)


def agreed(meshes: Sequence[DeviceMesh], asked: str, act: Callable[[], T]) -> T:
    """What `act` gives. Every process of the meshes has to ask; without a mesh this process is asked alone.

    asked: what this process is to do, in words.
    Raises ValueError in all of them if they are asked to do different things, or if `act` raises one in one of them. An
    error of another kind comes out in its own process, and is a RuntimeError in the others.
    """
    if not meshes:
        return act()
    error: Exception | None = None
    found = []
    try:
        found.append(act())
    except Exception as raised:
        error = raised
    refuses = error is None or isinstance(error, ValueError)
    reason = None if error is None else str(error) if refuses else f"{type(error).__name__}: {error}"
    everyone = _of_all(meshes, _Tried(asked, reason, refuses))
    if error is not None and not refuses:
        raise error
    wanted = {number: theirs.asked for number, theirs in everyone.items()}
    if len(set(wanted.values())) > 1:
        said = [f"{shortened(text)} in process {number}" for number, text in wanted.items()]
        raise ValueError(
            f"expected processes that hold parts of one model to do the same, got {'; '.join(said)}"
        )
    told = peers.told({number: theirs.reason for number, theirs in everyone.items()})
    if told is not None:
        raise (ValueError if all(theirs.refuses for theirs in everyone.values()) else RuntimeError)(told)
    return found[0]


def meshes(model: nn.Module | None, optimizers: Iterable[Any]) -> list[DeviceMesh]:
    """Those over which the parameters lie, of the model or, without one, of the optimizers; none for whole ones."""
    if model is None:
        return _meshes(p for one in optimizers for group in one.param_groups for p in group["params"])
    Spread.of(dict(named_modules(model)), "")  # FSDP2 takes back the weights that it has gathered
    return _meshes(model.parameters())


def _meshes(parameters: Iterable[Tensor]) -> list[DeviceMesh]:
    return list(dict.fromkeys(p.device_mesh for p in parameters if hasattr(p, "device_mesh")))


def _of_all(meshes: Sequence[DeviceMesh], mine: _Tried) -> dict[int, _Tried]:
    """That of every process, by its number."""
    found = {dist.get_rank(): mine}
    for mesh in meshes:
        for dim in range(mesh.ndim):
            along = peers.gathered(found, mesh.get_group(dim))
            found = {number: theirs for each in along for number, theirs in each.items()}
    return dict(sorted(found.items()))
