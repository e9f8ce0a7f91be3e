"""The entropy of every head of one layer over the steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from ..names import display_name
from ..statistics.heads import Snapshot
from .canvas import BLUE, GREEN, VERMILION, axes_for, draw_limits, dress

_NAMED = (VERMILION, BLUE, GREEN)  # of the lowest heads
_STYLES = ("-", "--", "-.")


def entropy_evolution(
    history: Sequence[Snapshot],
    limits: Mapping[str, float],
    layer: str | None = None,
    *,
    ax: Axes | None = None,
) -> Axes:
    """Mean normalized entropy of every head of a layer over the steps, from 0 (one key) to 1 (uniform).

    The three heads that are lowest at the end are named; the others are grey.
    layer: its name; None takes the layer of the lowest head at the last snapshot.
    limits: what an entropy means -> the entropy, each drawn as a dashed line.
    ax: where to draw; None makes a figure. Returns the axes.
    Raises ValueError for an empty history, or a layer that the last snapshot does not have.
    """
    if not history or not history[-1].layers:
        raise ValueError("expected at least one snapshot with a layer, got an empty history")
    last = history[-1].layers
    if layer is None:
        layer = min(last, key=lambda name: _lowest(last[name].normalized_entropy))
    if layer not in last:
        raise ValueError(f"expected layer to be one of {', '.join(map(repr, last))}, got {layer!r}")
    heads = last[layer].num_heads
    seen = [s for s in history if layer in s.layers and s.layers[layer].num_heads == heads]
    steps = [snapshot.step for snapshot in seen]
    values = np.stack([snapshot.layers[layer].normalized_entropy for snapshot in seen])
    axes = axes_for(ax, 7.6, 4.2)
    marker = "o" if len(steps) == 1 else None
    axes.plot(steps, values, color="#aaaaaa", linewidth=0.8, marker=marker, markersize=3, zorder=2)
    order = np.argsort(np.where(np.isfinite(values[-1]), values[-1], np.inf))
    for head, colour, style in zip(order, _NAMED, _STYLES):
        label = f"head {head}"
        axes.plot(
            steps, values[:, head], style, color=colour, label=label, linewidth=1.8, marker=marker, zorder=3
        )
    axes.set_ylim(-0.02, 1.02)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    draw_limits(axes, limits, always=True)
    title = f"Attention entropy of {display_name(layer)}, {heads} head{'s' * (heads != 1)}"
    dress(axes, "training step", "mean entropy / log(visible keys)", title)
    axes.legend(title="lowest", fontsize=8, title_fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return axes


def _lowest(values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.min()) if finite.size else np.inf
