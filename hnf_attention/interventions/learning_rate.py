"""Learning rates: in the optimizer, and in the schedulers that would overwrite them."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from ..compat import inner_schedulers
from .intervention import Change, Intervention

_log = logging.getLogger("hnf_attention")


def propose(factor: float, reason: str) -> Intervention:
    """Multiply every learning rate by `factor`."""
    return Intervention({"action": "reduce_lr", "factor": factor, "reason": reason})


def apply(optimizer: torch.optim.Optimizer, factor: float, scheduler: Any) -> Change:
    """Multiply the rate of every parameter group by `factor`.

    `initial_lr` is multiplied too. A scheduler that computes rates from its own `base_lrs` (LambdaLR) keeps
    the change only if it is given.
    """
    if scheduler is None and any("initial_lr" in group for group in optimizer.param_groups):
        _log.warning(
            "this optimizer has a learning-rate scheduler, which may undo the change at its next step (LambdaLR "
            "computes rates from its own base_lrs); hand it to apply_intervention as scheduler="
        )
    before = ", ".join(f"{float(group['lr']):g}" for group in optimizer.param_groups)
    _multiply(optimizer, factor, scheduler)
    return Change(
        f"learning rates ({before}) times {factor:g}", lambda: _multiply(optimizer, 1 / factor, scheduler)
    )


def _multiply(optimizer: torch.optim.Optimizer, factor: float, scheduler: Any) -> None:
    for group in optimizer.param_groups:
        for name in ("lr", "initial_lr"):
            rate = group.get(name)
            if isinstance(rate, Tensor):  # a captured CUDA graph reads this very tensor
                rate.mul_(factor)
            elif rate is not None:
                group[name] = rate * factor
    for part in _with_base_rates(scheduler):
        part.base_lrs = [rate * factor for rate in part.base_lrs]


def _with_base_rates(scheduler: Any) -> list[Any]:
    """The schedulers that keep base rates, of one scheduler or a list of them.

    Schedulers made of others (SequentialLR, ChainedScheduler) and Accelerate's wrapper are looked into.
    """
    if isinstance(scheduler, (list, tuple)):
        parts = scheduler
    else:
        wrapped = [scheduler.scheduler] if hasattr(scheduler, "scheduler") else []
        parts = inner_schedulers(scheduler) or wrapped
    inner = [part for each in parts for part in _with_base_rates(each)]
    return [*inner, scheduler] if hasattr(scheduler, "base_lrs") else inner
