"""What differs between two runs, as rows of text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..numbers import number
from .runs import Run
from .stories import Story, actions
from .verdict import Verdict

_WORST = (
    ("logit_range_max", "largest range of scores", np.nanmax),
    ("normalized_entropy", "lowest normalized entropy of a head", np.nanmin),
    ("required_bits", "most mantissa bits needed", np.nanmax),
)


def comparison(
    runs: Sequence[Run], told: Sequence[Sequence[Story]], verdicts: Sequence[Verdict]
) -> list[dict[str, str]]:
    """Rows with "name", "first", "second". Settings of both runs appear where they differ."""
    rows = [_row("verdict", [found.status for found in verdicts])]
    rows.append(_row("last log step", [number(run.steps[-1]) for run in runs]))
    for severity in ("error", "warning", "note"):
        rows.append(_row(f"issues of severity {severity}", [_count(each, severity) for each in told]))
    rows.append(_row("first sign of an error", [_first_sign(each) for each in told]))
    rows.append(
        _row(
            "interventions",
            [str(sum(each["kind"] == "intervention" for each in actions(run.events))) for run in runs],
        )
    )
    rows += [_row(f"last {name}", [_last(run, name) for run in runs]) for name in _scalars(runs)]
    for metric, label, worst in _WORST:
        if all(metric in run.values for run in runs):
            rows.append(_row(label, [_worst(run.values[metric], worst) for run in runs]))
    layers = [set(run.layers) for run in runs]
    rows.append(
        _row(
            "layers that the other has not",
            [str(len(layers[0] - layers[1])), str(len(layers[1] - layers[0]))],
        )
    )
    return rows + _settings(runs)


def _row(name: str, texts: Sequence[str]) -> dict[str, str]:
    return {"name": name, "first": texts[0], "second": texts[1]}


def _count(told: Sequence[Story], severity: str) -> str:
    found = [story for story in told if story.severity == severity]
    left = sum(bool(story.open) for story in found)
    return f"{len(found)}, {left} at the end" if found else "none"


def _first_sign(told: Sequence[Story]) -> str:
    steps = [story.first for story in told if story.severity == "error"]
    return f"step {min(steps):,}" if steps else "none"


def _scalars(runs: Sequence[Run]) -> list[str]:
    return sorted({name for run in runs for name in run.scalars}, key=lambda name: (name != "loss", name))[
        :10
    ]


def _last(run: Run, name: str) -> str:
    if name not in run.scalars:
        return "not logged"
    value = float(run.scalars[name][1][-1])
    return number(value) if np.isfinite(value) else "not finite"


def _worst(values: np.ndarray, worst: Any) -> str:
    finite = np.where(np.isfinite(values), values, np.nan)
    return number(float(worst(finite))) if np.isfinite(values).any() else "none"


def _settings(runs: Sequence[Run]) -> list[dict[str, str]]:
    """What the last sessions say of themselves, and the thresholds that runs set, where it differs."""
    found = [_flat({**(run.sessions[-1:] or [{}])[0], "threshold": run.thresholds}) for run in runs]
    for each in found:
        for name in ("started", "environment.process"):
            each.pop(name, None)
    names = sorted(found[0].keys() | found[1].keys())
    rows = [_row(name, [each.get(name, "not given") for each in found]) for name in names]
    return [row for row in rows if row["first"] != row["second"]]


def _flat(value: Any, name: str = "") -> dict[str, str]:
    if isinstance(value, Mapping):
        found: dict[str, str] = {}
        for key, each in value.items():
            found |= _flat(each, f"{name}.{key}" if name else str(key))
        return found
    return {name: str(value)}
