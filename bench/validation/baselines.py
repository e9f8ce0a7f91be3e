"""What else could warn: simple rules that the diagnosis has to beat, each with the step of its first alarm."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from hnf_attention.diagnosis.trends import score_size
from hnf_attention.statistics.heads import Snapshot

from .record import Record

WINDOW, Z = 100, 8.0  # of the rules on losses and gradient norms
LARGE_SCORE = 100.0
_PROPOSAL_READINGS = 100

Alarm = Callable[[Record, list[Snapshot]], int | None]


def always(record: Record, history: list[Snapshot]) -> int | None:
    return history[0].step


def never(record: Record, history: list[Snapshot]) -> int | None:
    return None


def large_score(record: Record, history: list[Snapshot]) -> int | None:
    """A score beyond 100, Kimi K2's limit (arXiv 2507.20534), by half of a row's range."""
    return _first(
        history,
        lambda snapshot: any((score_size(stats) > LARGE_SCORE).any() for stats in snapshot.layers.values()),
    )


def loss_alone(record: Record, history: list[Snapshot]) -> int | None:
    return first_outlier(record.losses)


def gradient_norm(record: Record, history: list[Snapshot]) -> int | None:
    return first_outlier(record.norms)


def proposal(record: Record, history: list[Snapshot]) -> int | None:
    """The rule that this project began with, on the means of the last 100 readings.

    Entropy below 0.5 nats, a curvature above 1e6, or a largest weight above 0.95.
    """
    for index in range(len(history)):
        recent = history[max(0, index + 1 - _PROPOSAL_READINGS) : index + 1]
        for layer in recent[-1].layers:
            stats = [snapshot.layers[layer] for snapshot in recent]
            entropy = np.mean([each.entropy for each in stats], 0)
            with np.errstate(over="ignore"):
                curvature = np.mean([np.exp(2.0 * each.logit_range) for each in stats])
            weight = np.mean([each.max_weight for each in stats])
            if (entropy < 0.5).any() or curvature > 1e6 or weight > 0.95:
                return recent[-1].step
    return None


BASELINES: dict[str, Alarm] = {
    "always": always,
    "never": never,
    "largest score above 100": large_score,
    "loss alone": loss_alone,
    "gradient norm": gradient_norm,
    "the proposal's rule": proposal,
}


def first_outlier(values: np.ndarray) -> int | None:
    """The first step whose log is Z deviations above the WINDOW steps before, or that is not finite."""
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.log(values.astype(np.float64))
    for step in range(len(logs)):
        if not np.isfinite(logs[step]):
            return step + 1
        before = logs[max(0, step - WINDOW) : step]
        if len(before) == WINDOW and logs[step] > before.mean() + Z * max(before.std(), 1e-6):
            return step + 1
    return None


def _first(history: list[Snapshot], fires: Callable[[Snapshot], bool]) -> int | None:
    return next((snapshot.step for snapshot in history if fires(snapshot)), None)


def largest_score(history: list[Snapshot]) -> float:
    """Largest size of a run's scores, nats; inf if it is not finite."""
    sizes = [score_size(stats) for snapshot in history for stats in snapshot.layers.values()]
    largest = np.concatenate(sizes)
    return float(np.nan_to_num(largest, nan=np.inf).max()) if len(largest) else 0.0
