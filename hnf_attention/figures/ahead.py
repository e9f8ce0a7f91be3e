"""A forecast with its interval, beside what the head did so far."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from ..names import display_name
from ..statistics.heads import Snapshot
from .canvas import BLUE, VERMILION, axes_for, dress

_UNITS = {
    "logit_range_max": "range of scores (nats)",
    "normalized_entropy": "mean entropy / log(visible keys)",
}


def forecast_figure(
    history: Sequence[Snapshot],
    layer: str,
    head: int,
    statistic: str,
    value: float,
    step: float,
    interval: tuple[float, float] | None = None,
    *,
    ax: Axes | None = None,
) -> Axes:
    """A head's statistic over the steps, and when it will reach a value.

    statistic: a field of `HeadStats`. value: what is forecast. step: the most likely one.
    interval: from which step to which in four of five cases; None if it was not measured.
    ax: where to draw; None makes a figure. Returns the axes.
    Raises ValueError for a head that no snapshot has.
    """
    seen = [s for s in history if layer in s.layers and 0 <= head < s.layers[layer].num_heads]
    if not seen:
        raise ValueError(f"expected a head of the history, got head {head} of layer {layer!r}")
    steps = [snapshot.step for snapshot in seen]
    values = [float(getattr(snapshot.layers[layer], statistic)[head]) for snapshot in seen]
    axes = axes_for(ax, 7.6, 4.2)
    axes.plot(steps, values, color=BLUE, linewidth=1.8, marker="o", markersize=3, label="measured")
    axes.plot([steps[-1], step], [values[-1], value], color=VERMILION, linewidth=1.2, linestyle=":")
    label = f"forecast: step {step:.0f}"
    if interval is not None:
        low, high = interval
        label += f", {low:.0f} to {high:.0f} in four of five cases"
        ends = [[step - low], [high - step]]
        axes.errorbar([step], [value], xerr=ends, fmt="D", color=VERMILION, capsize=4, label=label)
        axes.set_xlim(right=min(high, steps[-1] + 4 * (step - steps[-1])) * 1.02)
    else:
        axes.plot([step], [value], "D", color=VERMILION, label=label)
    axes.axhline(value, color="#777777", linewidth=0.9, linestyle="--", zorder=1)
    if statistic == "logit_range_max" and np.nanmin(values) > 0:
        axes.set_yscale("log")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    dress(
        axes,
        "training step",
        _UNITS.get(statistic, statistic.replace("_", " ")),
        f"{display_name(layer)} head {head}: forecast of step {steps[-1]}",
    )
    axes.legend(fontsize=8)
    return axes
