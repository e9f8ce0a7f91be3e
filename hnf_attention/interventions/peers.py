"""What the processes of torch.distributed tell each other, so that all of them do the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")


def processes(group: Any = None) -> int:
    """How many there are; 1 without torch.distributed."""
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def check_group(group: Any) -> None:
    """Raise ValueError for a group that this process is not in."""
    if group is not None and processes(group) < 1:
        raise ValueError("expected a group of processes that this process is in, got one without it")


def gathered(value: T, group: Any = None) -> list[T]:
    """The value of every process of the group, by rank in it. Every process of it has to ask."""
    count = processes(group)
    if count == 1:
        return [value]
    everyone = [value] * count
    dist.all_gather_object(everyone, value, group=group)
    return everyone


def number(index: int, group: Any = None) -> int:
    """The number among all processes of the one with this rank in the group."""
    return index if group is None else dist.get_global_rank(group, index)


def numbered(value: T, group: Any = None) -> dict[int, T]:
    """The value of every process of the group, by its number among all. Every process of it has to ask."""
    return {number(index, group): theirs for index, theirs in enumerate(gathered(value, group))}


def told(reasons: Mapping[int, str | None]) -> str | None:
    """What the reasons of processes say together, None if there is none.

    reasons: by number. One that not every process has comes with the numbers of those that have it.
    """
    by_reason: dict[str, list[int]] = {}
    for process, reason in reasons.items():
        if reason is not None:
            by_reason.setdefault(reason, []).append(process)
    said = [
        reason if len(ranks) == len(reasons) else f"{reason} (in {named(ranks)} of {processes()})"
        for reason, ranks in by_reason.items()
    ]
    return "; ".join(said) or None


def named(numbers: Sequence[int]) -> str:
    """Processes in words: "process 3", "processes 0, 2"."""
    return f"process{'es' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"


def raise_together(reason: str | None, group: Any = None) -> None:
    """Raise ValueError in every process of the group if one of them has a reason to. Every process of it has to ask."""
    said = told(numbered(reason, group))
    if said is not None:
        raise ValueError(said)
