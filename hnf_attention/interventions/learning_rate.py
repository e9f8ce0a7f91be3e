"""Learning rates: in the optimizer, and in the schedulers that would overwrite them."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..diagnosis.thresholds import threshold
from ..diagnosis.trends import score_size
from ..statistics.heads import Snapshot
from .action import Action, Preview, Reading, Verdict
from .intervention import Intervention
from .schedules import Schedule, with_base_rates

_log = logging.getLogger("hnf_attention")

#: The least share of the first rate that proposed cuts leave, four halvings: a run that is still unstable there needs
#: another cure, and learns little at a lower rate.
FLOOR = 1.0 / 16.0

#: How far a rate may lie above its schedule's, of it: schedulers that multiply the last rate round at each step.
TOLERANCE = 1e-4


class Trouble(NamedTuple):
    """What a cut of the learning rate should lessen.

    broken: share of rows that are not finite. pace: growth of the largest |score|, nats per step; NaN if not known.
    """

    broken: float
    pace: float

    def less_than(self, other: Trouble) -> bool:
        """Whether it got better, or may have: growth that was or is not known is no reason against a cut."""
        if self.broken > 0 or other.broken > 0:
            return self.broken < other.broken
        return not self.pace >= other.pace


def trouble(history: Sequence[Snapshot], since: int) -> Trouble:
    """The trouble at the last snapshot; growth is taken over the trend window's snapshots from step `since` on."""
    latest = history[-1].layers.values()
    broken = sum(stats.nonfinite_rows.sum() for stats in latest)
    rows = broken + sum(stats.rows.sum() for stats in latest)
    recent = [snapshot for snapshot in history if snapshot.step >= since][
        -int(threshold("trend_snapshots")) :
    ]
    first, last = recent[0], recent[-1]
    steps = last.step - first.step
    pace = (_top(last) - _top(first)) / steps if steps > 0 else math.nan
    return Trouble(float(broken / rows) if rows else 0.0, pace)


def _top(snapshot: Snapshot) -> float:
    sizes = [np.fmax.reduce(score_size(stats), initial=-np.inf) for stats in snapshot.layers.values()]
    return float(max(sizes, default=math.nan))


class Cuts:
    """The cuts of the learning rate so far: how much they left of it, and the trouble at the last one."""

    def __init__(self) -> None:
        self._share = 1.0  # of the rate at the first cut
        self._last: Trouble | None = None

    def allows(self, factor: float, now: Trouble) -> bool:
        """Whether to cut by `factor`: the floor is not passed, and the last cut helped."""
        helped = self._last is None or now.less_than(self._last)
        return helped and self._share * factor >= FLOOR

    def cut(self, factor: float, now: Trouble) -> bool:
        """Count a cut. Returns True."""
        self._share, self._last = self._share * factor, now
        return True

    def state_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return {"share": self._share, "last": None if self._last is None else list(self._last)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self._share = float(state["share"])
        self._last = None if state["last"] is None else Trouble(*state["last"])


def propose(factor: float, reason: str) -> Intervention:
    """Multiply every learning rate by `factor`."""
    return Intervention({"action": "reduce_lr", "factor": factor, "reason": reason})


class ReduceRate(Action):
    """Multiplies the rate of every parameter group by `factor`.

    `initial_lr` is multiplied too. A scheduler that computes rates from its own `base_lrs` (LambdaLR) keeps the change
    only if it is given. Reverting sets the old rates where nothing has changed them since, and divides others.
    """

    name = "reduce_lr"

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer], factor: float, scheduler: Any):
        super().__init__()
        self._groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        self._factor, self._scheduler = factor, scheduler
        self._set: list[float] = []
        self._schedule: Schedule | None = None

    def preview(self) -> Preview:
        """As `Action.preview`."""
        rates = [float(group["lr"]) for group in self._groups]
        text = f"learning rates ({', '.join(f'{rate:g}' for rate in rates)}) times {self._factor:g}"
        return Preview(text, {"before": rates, "after": [rate * self._factor for rate in rates]})

    def verify(self, reading: Reading) -> Verdict:
        """Whether the rates are at most what they were set to, or the factor times what the schedule would give."""
        rates = [float(group["lr"]) for group in self._groups]
        text = f"learning rates are ({_listed(rates)}), set to ({_listed(self._set)})"
        allowed, scheduled = self._set, self._schedule.rates() if self._schedule is not None else None
        if scheduled is not None:
            allowed = [max(own, self._factor * rate) for own, rate in zip(self._set, scheduled)]
            text += f"; the schedule alone would give ({_listed(scheduled)})"
        return Verdict(all(now <= most * (1 + TOLERANCE) for now, most in zip(rates, allowed)), text)

    def _do(self, undo: list[Callable[[], Any]]) -> str:
        if self._scheduler is None and any("initial_lr" in group for group in self._groups):
            _log.warning(
                "this optimizer has a learning-rate scheduler, which may undo the change at its next step (LambdaLR "
                "computes rates from its own base_lrs); hand it to apply_intervention as scheduler="
            )
        said = self.preview().text
        self._schedule = Schedule(self._scheduler, self._groups)
        for group in self._groups:
            for name in ("lr", "initial_lr"):
                if group.get(name) is not None:
                    undo.append(self._multiply(group, name))
        for part in with_base_rates(self._scheduler):
            undo.append(self._multiply_all(part))
        self._set = [float(group["lr"]) for group in self._groups]
        return said

    def _multiply(self, group: dict[str, Any], name: str) -> Callable[[], None]:
        """Multiply one rate. Returns what takes it back."""
        old = float(group[name])
        _put(group, name, group[name] * self._factor)
        new = float(group[name])

        def back() -> None:
            _put(group, name, old if float(group[name]) == new else group[name] / self._factor)

        return back

    def _multiply_all(self, part: Any) -> Callable[[], None]:
        old = list(part.base_lrs)
        part.base_lrs = [rate * self._factor for rate in old]
        new = list(part.base_lrs)

        def back() -> None:
            part.base_lrs = old if part.base_lrs == new else [rate / self._factor for rate in part.base_lrs]

        return back


def _listed(rates: Sequence[float]) -> str:
    return ", ".join(f"{rate:g}" for rate in rates)


def _put(group: dict[str, Any], name: str, rate: Any) -> None:
    if isinstance(group[name], Tensor):  # a captured CUDA graph reads this very tensor
        group[name].fill_(rate)
    else:
        group[name] = rate
