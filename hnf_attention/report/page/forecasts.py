"""What was forecast of an issue, with its interval, and whether it came."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from .limits import worse
from .runs import Run
from .stories import Story

_LARGEST = 1e300


def forecasts(story: Story, run: Run) -> list[dict[str, Any]]:
    """The first forecast of each head, earliest first, as JSON types.

    Each has its `head`, `statistic`, `value`, the steps `made`, `step`, `low` and `high` (None where no interval was
    measured), `met` (the first log step at which it had come, None if it has not), and a `text`.
    """
    found = []
    for head, told in story.forecasts.items():
        known = _checked(told)
        if known is None:
            continue
        own = _history(run, story.layer, head, known["statistic"])
        known |= {"head": head, "met": None if own is None else _met(run.steps, own, known)}
        found.append(known | {"text": _text(known, run.steps[-1] if run.steps else 0, own is not None)})
    return sorted(found, key=lambda each: (each["made"], each["step"]))


def _checked(told: Mapping[str, Any]) -> dict[str, Any] | None:
    """The forecast of a log, which may hold anything; None if its numbers are none."""
    numbers = {name: told.get(name) for name in ("value", "made", "step", "low", "high")}
    for name, number in numbers.items():
        if number is None and name in ("low", "high"):
            continue
        # A whole number may be too large for a float: then this compares, where `math.isfinite` raises.
        if isinstance(number, bool) or not isinstance(number, (int, float)) or not abs(number) <= _LARGEST:
            return None
    return numbers | {"what": str(told.get("what")), "statistic": str(told.get("statistic"))}


def _history(run: Run, layer: str, head: object, statistic: str) -> np.ndarray | None:
    """The head's values of the statistic at the run's log steps; None if the page does not hold them."""
    values = run.values.get(statistic)
    if (
        values is None
        or layer not in run.layers
        or type(head) is not int
        or not 0 <= head < run.layers[layer][0]
    ):
        return None
    names = list(run.layers)
    return values[:, sum(run.layers[name][0] for name in names[: names.index(layer)]) + head]


def _met(steps: Sequence[int], own: np.ndarray, known: Mapping[str, Any]) -> int | None:
    with np.errstate(invalid="ignore"):
        beyond = own <= known["value"] if worse(known["statistic"]) == "low" else own >= known["value"]
    return next((step for step, there in zip(steps, beyond) if there and step >= known["made"]), None)


def _text(known: Mapping[str, Any], last: int, held: bool) -> str:
    """'At step 120: passes 100 nats near step 151, between steps 133 and 250 in four of five cases. It came at ...'."""
    text = f"At step {known['made']:,}: {known['what']} near step {known['step']:,.0f}"
    if known["low"] is not None and known["high"] is not None:
        text += f", between steps {known['low']:,.0f} and {known['high']:,.0f} in four of five cases"
    if known["met"] is not None:
        return f"{text}. It came by step {known['met']:,}."
    if last < known["step"]:
        return f"{text}. It is not due yet."
    if not held:  # another statistic was chosen for the page
        return f"{text}. This page does not hold the numbers that say whether it came."
    return f"{text}. It had not come by step {last:,}."


def earliest(found: Iterable[Mapping[str, Any]]) -> str:
    """What the earliest forecast said, and of how many heads there was one; nothing if there was none."""
    found = list(found)
    if not found:
        return ""
    head = "" if found[0]["head"] is None else f"Head {found[0]['head']}. "
    more = f" {len(found) - 1} more of its heads have a forecast." if len(found) > 1 else ""
    return f"{head}{found[0]['text']}{more}"
