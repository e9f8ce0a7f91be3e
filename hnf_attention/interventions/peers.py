"""Which processes of torch.distributed hold the same heads, where tensor parallelism splits them."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")


def processes(group: Any = None) -> int:
    """How many there are; 1 without torch.distributed."""
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def gathered(value: T) -> list[T]:
    """The value of every process, by rank. Every process has to ask."""
    if processes() == 1:
        return [value]
    everyone = [value] * processes()
    dist.all_gather_object(everyone, value)
    return everyone


def group_of(parts: Sequence[Hashable]) -> Any:
    """The group of the processes whose part is that of this one; None for all. Every process has to ask.

    parts: the part of each process, by rank.
    """
    if len(set(parts)) == 1:
        return None
    ranks: dict[Hashable, list[int]] = {}
    for rank, part in enumerate(parts):
        ranks.setdefault(part, []).append(rank)
    return dist.new_subgroups_by_enumeration(list(ranks.values()))[0]
