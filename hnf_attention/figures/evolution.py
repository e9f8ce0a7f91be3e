"""How one number of every layer's worst head moves over the steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.ticker import MaxNLocator

from ..statistics.heads import HeadStats, Snapshot
from .canvas import axes_for, draw_limits, dress
from .labels import layer_labels

_LEGEND_LIMIT = 16  # layers: beyond this, a colour bar tells them apart


def score_range_evolution(
    history: Sequence[Snapshot], limits: Mapping[str, float], *, ax: Axes | None = None
) -> Axes:
    """Largest range of a row's scores in each layer's worst head over the steps, in nats.

    The softmax sees differences of scores alone. A single snapshot shows every head.
    limits: what happens at a range -> the range in nats; each is drawn as a dashed line if the data come near it.
    ax: where to draw; None makes a figure. Returns the axes. Raises ValueError for an empty history.
    """
    axes = _evolution(
        history, lambda stats: stats.logit_range_max, "range of scores (nats)", "Attention scores", ax
    )
    found = [stats.logit_range_max for snapshot in history for stats in snapshot.layers.values()]
    if any((values > 0.0).any() for values in found):  # not so while all queries or all keys are 0
        axes.set_yscale("log")
        axes.autoscale(axis="y")
    draw_limits(axes, limits)
    return axes


def curvature_evolution(history: Sequence[Snapshot], *, ax: Axes | None = None) -> Axes:
    """log2 of the HNF curvature bound of each layer's worst head over the steps, in bits.

    A single snapshot shows every head. ax: where to draw; None makes a figure. Returns the axes.
    Raises ValueError for an empty history.
    """
    axes = _evolution(
        history,
        lambda stats: stats.log2_curvature,
        "log2 HNF curvature bound (bits)",
        "HNF curvature of attention",
        ax,
    )
    # Bits grow with the scores, over decades, and may start below zero.
    axes.set_yscale("symlog", linthresh=10.0)
    axes.autoscale(axis="y")
    return axes


def bits_evolution(
    history: Sequence[Snapshot], limits: Mapping[str, float], *, ax: Axes | None = None
) -> Axes:
    """Significand bits that queries and keys of each layer's worst head need at worst, over the steps.

    A single snapshot shows every head. limits: a number format -> its bits, each drawn as a dashed line.
    ax: where to draw; None makes a figure. Returns the axes. Raises ValueError for an empty history.
    """
    axes = _evolution(
        history, lambda stats: stats.required_bits, "required bits", "Precision of queries and keys", ax
    )
    draw_limits(axes, limits, always=True)
    return axes


def _evolution(
    history: Sequence[Snapshot],
    read: Callable[[HeadStats], np.ndarray],
    quantity: str,
    title: str,
    ax: Axes | None,
) -> Axes:
    """One line per layer: the largest finite `read(stats)` over its heads at every step it was measured."""
    if not history:
        raise ValueError("expected at least one snapshot, got an empty history")
    if len(history) == 1:
        return _single_snapshot(history[0], read, quantity, title, ax)
    names = list(dict.fromkeys(name for snapshot in history for name in snapshot.layers))
    labels = layer_labels(names)
    # The last part of plasma is nearly white.
    colours = matplotlib.colormaps["plasma"](np.linspace(0.0, 0.88, len(names)))
    axes = axes_for(ax, 7.6, 4.2)
    for name, label, colour in zip(names, labels, colours, strict=True):
        points = [(s.step, _worst(read(s.layers[name]))) for s in history if name in s.layers]
        steps, values = zip(*points, strict=True)
        axes.plot(
            steps, values, label=label, color=colour, linewidth=1.6, marker="o", markersize=2.5, zorder=3
        )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    dress(axes, "training step", f"{quantity}, worst head", f"{title} over training")
    if len(names) <= _LEGEND_LIMIT:
        axes.legend(title="layer", fontsize=8, title_fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    else:
        scale = ScalarMappable(Normalize(-0.5, len(names) - 0.5), ListedColormap(colours))
        axes.figure.colorbar(scale, ax=axes, label="layer, in the order they ran")
    return axes


def _single_snapshot(
    snapshot: Snapshot,
    read: Callable[[HeadStats], np.ndarray],
    quantity: str,
    title: str,
    ax: Axes | None,
) -> Axes:
    """A point for the finite `read(stats)` of every head, by layer; the worst head of a layer is named."""
    axes = axes_for(ax, 7.6, 4.2)
    few = len(snapshot.layers) <= _LEGEND_LIMIT
    for place, values in enumerate(map(read, snapshot.layers.values())):
        heads = np.flatnonzero(np.isfinite(values))
        axes.plot(
            np.full(len(heads), place),
            values[heads],
            linestyle="none",
            marker="o",
            markersize=3.5,
            color="#4c5b9e",
            alpha=0.6,
            zorder=3,
        )
        if few and len(heads):
            worst = heads[values[heads].argmax()]
            axes.annotate(
                f"head {worst}",
                (place, values[worst]),
                xytext=(5, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
            )
    axes.set_xlim(-0.5, len(snapshot.layers))
    if few:
        axes.set_xticks(range(len(snapshot.layers)), layer_labels(snapshot.layers), rotation=30, ha="right")
    xlabel = "layer" if few else "layer, in the order they ran"
    dress(axes, xlabel, quantity, f"{title} of every head, one snapshot (step {snapshot.step})")
    return axes


def _worst(values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.max()) if finite.size else np.nan
