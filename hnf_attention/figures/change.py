"""Every head before and after an intervention."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes

from ..statistics.heads import Snapshot
from .canvas import BLUE, VERMILION, axes_for, dress

_NAMED = 3  # heads that changed most
_SAME = 0.05  # a smaller relative change is none


def before_after(
    before: Snapshot, after: Snapshot, limits: Mapping[str, float], *, ax: Axes | None = None
) -> Axes:
    """Largest range of a row's scores in every head, nats: before at the x axis, after at the y axis.

    Heads below the diagonal became calmer, heads above it worse. The three that changed most are named.
    limits: what happens at a range -> the range in nats, each drawn as a dashed line.
    ax: where to draw; None makes a figure. Returns the axes.
    Raises ValueError if the snapshots share no layer with a finite range.
    """
    places, x, y = [], [], []
    for name, stats in before.layers.items():
        if name not in after.layers or after.layers[name].num_heads != stats.num_heads:
            continue
        for head, pair in enumerate(zip(stats.logit_range_max, after.layers[name].logit_range_max)):
            if np.isfinite(pair).all() and min(pair) > 0:
                places.append((name, head))
                x.append(float(pair[0]))
                y.append(float(pair[1]))
    if not places:
        raise ValueError("expected snapshots that share a layer whose scores have a range, got none")
    first, second = np.array(x), np.array(y)
    change = np.log(second / first)
    axes = axes_for(ax, 5.4, 5.0)
    for chosen, colour, marker, label in (
        (change < -_SAME, BLUE, "v", "calmer"),
        (np.abs(change) <= _SAME, "#888888", "o", "as before"),
        (change > _SAME, VERMILION, "^", "worse"),
    ):
        if chosen.any():
            text = f"{label}: {int(chosen.sum())}"
            axes.plot(
                first[chosen], second[chosen], marker, color=colour, label=text, markersize=5, alpha=0.75
            )
    low, high = min(first.min(), second.min()) / 1.2, max(first.max(), second.max()) * 1.2
    axes.plot([low, high], [low, high], color="#777777", linewidth=0.9, zorder=1)
    for text, value in limits.items():
        if low < value < high:
            axes.axhline(value, color="#777777", linewidth=0.9, linestyle="--", zorder=1)
            axes.annotate(f"{value:g}: {text}", (low, value), va="bottom", fontsize=7, color="#555555")
    for place in np.argsort(-np.abs(change))[:_NAMED]:
        if abs(change[place]) > _SAME:
            name, head = places[place]
            axes.annotate(
                f"{name} head {head}",
                (first[place], second[place]),
                xytext=(-5, 4),
                textcoords="offset points",
                ha="right",
                fontsize=7,
            )
    axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high))
    title = f"Range of scores in every head, step {before.step} and step {after.step}"
    dress(axes, f"step {before.step} (nats)", f"step {after.step} (nats)", title)
    axes.legend(fontsize=8, loc="lower right")
    return axes
