"""When a loss curve shows that something is wrong: the definition that the demo is judged by.

Steps count from 1. A person who watches the loss alone, without a healthy run beside it, could see trouble at
the first of these signs:
- non-finite: the loss is NaN or infinite;
- spike: the loss exceeds the mean of the SPIKE_WINDOW steps before it by SPIKE_SIGMA standard deviations
  (OLMo's definition of a spike);
- stall: the mean loss of the last STALL_WINDOW steps is no lower than that of the STALL_WINDOW before;
- no progress: the run ends at or above the loss it started from.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np

SPIKE_WINDOW = 128
SPIKE_MIN_STEPS = 16  # early in a run, the window is as long as the run, but at least this long
SPIKE_SIGMA = 6.0
# Over 50 steps, the noise of these losses hides the progress of healthy runs, and the sign shows in treated runs too.
STALL_WINDOW = 100
FINAL_WINDOW = 20  # steps whose mean is "the final loss"


@dataclass(frozen=True)
class LossSign:
    """The first step at which the loss shows trouble, and how."""

    step: int
    kind: str  # "non-finite", "spike", "stall", "no progress"
    text: str


def sign_now(losses: Sequence[float]) -> LossSign | None:
    """The sign of trouble that the latest loss shows, compared with those before; None if there is none."""
    step, loss, before = len(losses), losses[-1], losses[-1 - SPIKE_WINDOW : -1]
    if not math.isfinite(loss):
        return LossSign(step, "non-finite", f"the loss is {loss}")
    if len(before) >= SPIKE_MIN_STEPS and loss > fmean(before) + SPIKE_SIGMA * float(np.std(before)):
        return LossSign(
            step, "spike", f"{loss:.2f} is {SPIKE_SIGMA:g} sigma above the {len(before)} steps before"
        )
    if step >= 2 * STALL_WINDOW:
        earlier = losses[step - 2 * STALL_WINDOW : step - STALL_WINDOW]
        if fmean(losses[step - STALL_WINDOW :]) >= fmean(earlier):
            text = f"no lower over the last {STALL_WINDOW} steps than over the {STALL_WINDOW} before"
            return LossSign(step, "stall", text)
    return None


def first_sign(losses: Sequence[float]) -> LossSign | None:
    """The first sign of trouble in the losses of a whole run, from step 1 on; None if it looks healthy."""
    for step in range(1, len(losses) + 1):
        sign = sign_now(losses[:step])
        if sign is not None:
            return sign
    if len(losses) > 1 and final(losses) >= losses[0]:
        return LossSign(len(losses), "no progress", "the run ends where it began")
    return None


def final(losses: Sequence[float]) -> float:
    """Mean loss of the last FINAL_WINDOW steps; not finite if any of them is not."""
    return fmean(losses[-FINAL_WINDOW:])


def falls_behind(losses: Sequence[float], reference: Sequence[float], gap: float) -> int | None:
    """The first step from which the loss stays `gap` above the reference's, both as means of FINAL_WINDOW steps.

    This is hindsight: it needs both whole runs. None if the run does not end behind.
    """
    first = None
    for step in range(min(len(losses), len(reference)), FINAL_WINDOW - 1, -1):
        behind = fmean(losses[step - FINAL_WINDOW : step]) - fmean(reference[step - FINAL_WINDOW : step])
        if behind < gap:
            break
        first = step
    return first
