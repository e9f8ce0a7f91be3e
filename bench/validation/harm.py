"""Harm by counterfactual: what a run lost against its twin with QK-norm, and since when."""

from __future__ import annotations

import numpy as np

from .record import Record

HARMED, CLEAN = 0.1, 0.05  # nats per token
FINAL_STEPS, SMOOTH_STEPS = 40, 25


def final(losses: np.ndarray) -> float:
    """Mean of the last FINAL_STEPS losses; inf if any of them is not finite."""
    value = float(np.mean(losses[-FINAL_STEPS:], dtype=np.float64))
    return value if np.isfinite(value) else np.inf


def smoothed(losses: np.ndarray) -> np.ndarray:
    """Mean of the SMOOTH_STEPS losses up to each step, of fewer at the start; inf from the first that is not finite."""
    sums = np.cumsum(np.where(np.isfinite(losses), losses, np.inf), dtype=np.float64)
    with np.errstate(invalid="ignore"):
        means = np.concatenate(
            [
                sums[:SMOOTH_STEPS] / np.arange(1, len(sums[:SMOOTH_STEPS]) + 1),
                (sums[SMOOTH_STEPS:] - sums[:-SMOOTH_STEPS]) / SMOOTH_STEPS,
            ]
        )
    return np.where(np.isnan(means), np.inf, means)


def harm(record: Record) -> float:
    """How much higher the run ends than its twin, nats; inf if it alone is not finite; 0 if it has QK-norm itself.

    NaN if the twin is not finite either: such a run failed, and attention is not the reason.
    """
    run = final(record.losses)
    twin = final(record.twin_losses) if len(record.twin_losses) else run
    return float("nan") if np.isinf(run) and np.isinf(twin) else run - twin


def onset(record: Record) -> int | None:
    """The step from which the smoothed losses stay HARMED apart to the end; None for a run that is not harmed."""
    if not harm(record) >= HARMED:
        return None
    with np.errstate(invalid="ignore"):
        apart = smoothed(record.losses) - smoothed(record.twin_losses)
    behind = np.isnan(apart) | (apart >= HARMED)
    together = np.flatnonzero(~behind)
    return int(together[-1]) + 2 if len(together) else 1
