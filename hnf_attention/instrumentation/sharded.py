"""Attention over DTensors, whose parts lie in many processes: this process measures its part, if it is whole heads."""

from __future__ import annotations

import math
import sys
from typing import Any

from torch import Tensor

from .call import Unmeasurable

NOT_FUSED = "its tensors are split over processes"


def is_sharded(tensor: Any) -> bool:
    """Whether it is a DTensor."""
    module = sys.modules.get("torch.distributed.tensor")  # none exists before it is imported
    return module is not None and isinstance(tensor, module.DTensor)


def by_sequence(tensor: Any) -> bool:
    """Whether it is a DTensor (B, H, M, D) whose rows lie in several processes."""
    if type(tensor) is Tensor or not is_sharded(tensor):
        return False
    sizes = zip(tensor.placements, tensor.device_mesh.shape)
    return any(placement.is_shard(2) and size > 1 for placement, size in sizes)


def by_placements(placements: Any) -> str:
    """Why a call that is split in this way is not measured."""
    return f"it is split over processes as {placements}, not by batch (0) or heads (1)"


def own_part(output: Any, query: Any) -> Tensor | None:
    """This process's part of an attention's output; None unless it is a DTensor that is split as the queries are."""
    alike = is_sharded(output) and output.placements == query.placements
    return output.to_local() if alike else None


def local(query: Any, key: Any, value: Any, attn_mask: Any) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """This process's parts of DTensors (B, H, rows, D) and of a mask that broadcasts over them; no communication.

    Raises Unmeasurable unless all are split alike, evenly, and by batch or by heads along every mesh dimension.
    """
    from torch.distributed.tensor import Replicate, Shard

    mesh, placements = query.device_mesh, query.placements
    tensors = {"query": query, "key": key, "value": value}
    for name, tensor in tensors.items():
        where = tensor.placements if is_sharded(tensor) and tensor.device_mesh == mesh else None
        if where != placements or tensor.dim() != 4:
            raise Unmeasurable(f"query is split as {placements}, {name} as {where or type(tensor).__name__}")
    pieces: dict[int, list[int]] = {0: [], 1: []}
    for placement, size in zip(placements, mesh.shape):
        if type(placement) is Shard and placement.dim in pieces:
            pieces[placement.dim].append(size)
        elif size > 1:
            raise Unmeasurable(by_placements(placements))
    for name, tensor in tensors.items():
        for dim, sizes in pieces.items():
            if tensor.shape[dim] % math.prod(sizes):
                raise Unmeasurable(f"{name} {tuple(tensor.shape)} is split unevenly over processes")
    parts = query.to_local(), key.to_local(), value.to_local()
    if attn_mask is None:
        return *parts, None
    if not is_sharded(attn_mask) or attn_mask.device_mesh != mesh:
        raise Unmeasurable(f"query is split over processes, attn_mask is a {type(attn_mask).__name__}")
    lacking = 4 - attn_mask.dim()  # leading sizes that it broadcasts over
    wanted: list[Shard | Replicate] = []
    for placement, there in zip(placements, attn_mask.placements):
        own = placement.dim - lacking if type(placement) is Shard else -1
        wanted.append(Shard(own) if own >= 0 and attn_mask.shape[own] > 1 else Replicate())
        if there != wanted[-1] and not there.is_replicate():
            raise Unmeasurable(f"query is split as {placements}, attn_mask as {attn_mask.placements}")
    return *parts, attn_mask.redistribute(mesh, wanted).to_local()
