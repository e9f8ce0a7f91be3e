"""Loss, gradient norm and other numbers of training steps, thinned for a chart."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

_MOST_POINTS = 2000


def for_page(scalars: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> dict[str, dict[str, list[Any]]]:
    """Name to steps and values, None where there is no finite number."""
    return {
        name: _points(*_thinned(steps, values)) for name, (steps, values) in scalars.items() if len(steps)
    }


def _points(steps: np.ndarray, values: np.ndarray) -> dict[str, list[Any]]:
    numbers = [float(f"{value:.6g}") if np.isfinite(value) else None for value in values.tolist()]
    return {"steps": steps.tolist(), "values": numbers}


def _thinned(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most _MOST_POINTS points: the ends, the lowest and the highest of each stretch, and every first NaN of one."""
    if len(steps) <= _MOST_POINTS:
        return steps, values
    kept = {0, len(steps) - 1}
    for part in np.array_split(np.arange(len(steps)), _MOST_POINTS // 3):
        found = values[part]
        finite = np.isfinite(found)
        if finite.any():
            kept.add(int(part[np.nanargmin(np.where(finite, found, np.nan))]))
            kept.add(int(part[np.nanargmax(np.where(finite, found, np.nan))]))
        if not finite.all():
            kept.add(int(part[np.argmin(finite)]))
    places = sorted(kept)
    return steps[places], values[places]
