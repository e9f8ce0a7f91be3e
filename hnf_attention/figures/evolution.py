"""How one number of every layer's worst head moves over the steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..statistics.heads import HeadStats, Snapshot
from .canvas import dress, new_figure
from .labels import layer_labels

_LEGEND_LIMIT = 16  # layers: beyond this, a colour bar tells them apart


def max_logit_evolution(history: Sequence[Snapshot], limits: Mapping[str, float]) -> Figure:
    """Largest |score| of each layer's worst head over the steps.

    A single snapshot shows every head. limits: what happens at a score -> the score in nats; each is drawn
    as a dashed line if the data come near it. Raises ValueError for an empty history.
    """
    figure, axes = _evolution(
        history, lambda stats: stats.max_abs_logit, "largest |score| (nats)", "Attention scores"
    )
    axes.set_yscale("log")
    axes.autoscale(axis="y")
    for text, score in limits.items():
        _limit(axes, score, text)
    return figure


def curvature_evolution(history: Sequence[Snapshot]) -> Figure:
    """log2 of the HNF curvature bound of each layer's worst head over the steps.

    A single snapshot shows every head. Raises ValueError for an empty history.
    """
    figure, axes = _evolution(
        history,
        lambda stats: stats.log2_curvature,
        "log2 HNF curvature bound (bits)",
        "HNF curvature of attention",
    )
    # Bits grow with the scores, over decades, and may start below zero.
    axes.set_yscale("symlog", linthresh=10.0)
    axes.autoscale(axis="y")
    return figure


def _evolution(
    history: Sequence[Snapshot], read: Callable[[HeadStats], np.ndarray], quantity: str, title: str
) -> tuple[Figure, Axes]:
    """One line per layer: the largest finite `read(stats)` over its heads at every step it was measured."""
    if not history:
        raise ValueError("expected at least one snapshot, got an empty history")
    if len(history) == 1:
        return _single_snapshot(history[0], read, quantity, title)
    names = list(dict.fromkeys(name for snapshot in history for name in snapshot.layers))
    labels = layer_labels(names)
    # The last part of plasma is nearly white.
    colours = matplotlib.colormaps["plasma"](np.linspace(0.0, 0.88, len(names)))
    figure, axes = new_figure(7.6, 4.2)
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
        figure.colorbar(scale, ax=axes, label="layer, in the order they ran")
    return figure, axes


def _single_snapshot(
    snapshot: Snapshot, read: Callable[[HeadStats], np.ndarray], quantity: str, title: str
) -> tuple[Figure, Axes]:
    """A point for the finite `read(stats)` of every head, by layer; the worst head of a layer is named."""
    figure, axes = new_figure(7.6, 4.2)
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
    return figure, axes


def _worst(values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.max()) if finite.size else np.nan


def _limit(axes: Axes, value: float, text: str) -> None:
    """A dashed horizontal line with its meaning, where the data comes near it."""
    if axes.dataLim.y1 < value / 3:
        return
    axes.axhline(value, color="#777777", linewidth=0.9, linestyle="--", zorder=1)
    axes.annotate(
        f"{value:g}: {text}",
        (0.0, value),  # at the left, where scores that grow are still small
        xycoords=("axes fraction", "data"),
        xytext=(4, 2),
        textcoords="offset points",
        va="bottom",
        fontsize=7,
        color="#555555",
        bbox={"facecolor": "white", "alpha": 0.7, "edgecolor": "none", "pad": 0.5},
        zorder=4,
    )
