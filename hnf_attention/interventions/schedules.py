"""Schedulers of the learning rate: those that keep base rates, and what they would give if nothing changed them."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from torch import Tensor

from ..compat import inner_schedulers


def parts_of(scheduler: Any) -> list[Any]:
    """The schedulers that one consists of: those in a list, SequentialLR, ChainedScheduler and Accelerate's wrapper."""
    if isinstance(scheduler, (list, tuple)):
        return list(scheduler)
    wrapped = [scheduler.scheduler] if hasattr(scheduler, "scheduler") else []
    return inner_schedulers(scheduler) or wrapped


def with_base_rates(scheduler: Any) -> list[Any]:
    """The schedulers that keep base rates, of one scheduler or a list of them."""
    inner = [part for each in parts_of(scheduler) for part in with_base_rates(each)]
    return [*inner, scheduler] if hasattr(scheduler, "base_lrs") else inner


class Schedule:
    """What schedulers would give from now on, in groups of optimizers that nothing else touches.

    scheduler: one, a list of them, or None. groups: the optimizers' groups whose rates are asked for.
    """

    def __init__(self, scheduler: Any, groups: Sequence[dict[str, Any]]):
        self._groups = list(groups)
        self._now = _leading(scheduler)
        self._kept = _copies(self._now, self._groups)

    def rates(self) -> list[float] | None:
        """The rate of each group at the step that the schedulers have reached; None if that cannot be told."""
        # Steps of others than PyTorch's own may do more than to set rates.
        if not all(type(each).__module__.startswith("torch.optim") for each in _all(self._now)):
            return None
        schedulers, twins = _copies(*self._kept)
        waits = [_count(now) - _count(then) for now, then in zip(self._now, schedulers)]
        if not waits or min(waits) < 0:
            return None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of steps of a scheduler without those of an optimizer
            try:
                for step in range(max(waits)):
                    for scheduler, wait in zip(schedulers, waits):
                        if step < wait:
                            type(scheduler).step(scheduler)
            except TypeError:  # it goes by a number that each step is given
                return None
        return [float(twin["lr"]) for twin in twins]


def _all(schedulers: Sequence[Any]) -> list[Any]:
    """These schedulers, and those that they are made of."""
    return [x for each in schedulers for x in (each, *_all(inner_schedulers(each)))]


def _leading(scheduler: Any) -> list[Any]:
    """The schedulers that are stepped themselves: wrappers and lists are looked into, SequentialLR is not."""
    if scheduler is None:
        return []
    if hasattr(scheduler, "base_lrs") or inner_schedulers(scheduler):
        return [scheduler]
    return [each for part in parts_of(scheduler) for each in _leading(part)]


def _copies(
    schedulers: Sequence[Any], groups: Sequence[dict[str, Any]]
) -> tuple[list[Any], list[dict[str, Any]]]:
    """Copies of schedulers and of the groups that they write to; parameters and functions are the same."""
    twins = {id(group): _copied(group) for group in groups}

    def copied(scheduler: Any) -> Any:
        twin, inner = copy.copy(scheduler), {id(part): copied(part) for part in inner_schedulers(scheduler)}
        for name, value in vars(scheduler).items():
            if isinstance(value, list) or (inner and isinstance(value, tuple)):
                setattr(twin, name, [inner.get(id(each), each) for each in value])
            elif isinstance(value, dict):
                setattr(twin, name, copy.copy(value))
        if hasattr(scheduler, "optimizer"):
            own = [twins.setdefault(id(x), _copied(x)) for x in scheduler.optimizer.param_groups]
            twin.optimizer = SimpleNamespace(param_groups=own, step=None)
        return twin

    return [copied(each) for each in schedulers], [twins[id(group)] for group in groups]


def _copied(group: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value.clone() if isinstance(value, Tensor) else value
        for name, value in group.items()
        if name != "params"
    }


def _count(scheduler: Any) -> int:
    """How many steps it made. A ChainedScheduler counts none itself."""
    inner = inner_schedulers(scheduler)
    if inner and not hasattr(scheduler, "last_epoch"):
        return _count(inner[0])
    return int(getattr(scheduler, "last_epoch", 0))
