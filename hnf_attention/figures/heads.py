"""Figures of head statistics, drawn without pyplot: no global state, no display.

Each function returns a `matplotlib.figure.Figure` with an Agg canvas; `figure.savefig(path)` writes it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..diagnosis.thresholds import threshold
from ..statistics.heads import HeadStats, Snapshot
from .labels import layer_labels

_DPI = 150
_GRID = "#d8d8d8"
_CELL_TEXT_LIMIT = 16  # heads: beyond this, numbers no longer fit their cells
_LEGEND_LIMIT = 16  # layers: beyond this, a colour bar tells them apart


def entropy_heatmap(snapshot: Snapshot) -> Figure:
    """Mean normalized entropy of every head, one row per layer in the order the layers ran.

    Dark cells are collapsed heads (0 = one key, 1 = uniform). Sink heads (mean weight on the first
    key above the `sink_mass` threshold), whose low entropy is by design, are marked with an S. Cells
    without a judged row, or beyond a layer's last head, are hatched.
    Raises ValueError for a snapshot without layers.
    """
    if not snapshot.layers:
        raise ValueError("expected a snapshot with at least one layer, got none")
    ratios = _table(snapshot, lambda stats: stats.normalized_entropy)
    sinks = _table(snapshot, lambda stats: stats.sink_mass)
    num_layers, num_heads = ratios.shape

    labels = layer_labels(snapshot.layers)
    width = 2.2 + 0.075 * max(map(len, labels)) + num_heads * (0.62 if num_heads <= _CELL_TEXT_LIMIT else 0.3)
    figure, axes = _new_figure(max(width, 5.0), 1.6 + 0.42 * num_layers)
    axes.patch.set(hatch="////", facecolor="white", edgecolor="#bbbbbb")
    image = axes.imshow(np.ma.masked_invalid(ratios), vmin=0.0, vmax=1.0, cmap="viridis", aspect="auto")
    for layer, head in np.argwhere(np.isfinite(ratios)):
        ratio = ratios[layer, head]
        marks = [f"{ratio:.2f}"] if num_heads <= _CELL_TEXT_LIMIT else []
        marks += ["S"] if sinks[layer, head] > threshold("sink_mass") else []
        colour = "white" if ratio < 0.6 else "black"
        axes.text(head, layer, " ".join(marks), ha="center", va="center", fontsize=8, color=colour)
    axes.set_xlabel("head")
    axes.set_ylabel("layer")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=16, min_n_ticks=1))
    axes.set_yticks(range(num_layers), labels)
    title = f"Attention entropy per head, step {snapshot.step}"
    if (sinks > threshold("sink_mass")).any():
        title += f"\nS: sink, more than {threshold('sink_mass'):g} on the first key"
    axes.set_title(title, loc="left", fontsize=10)
    bar = figure.colorbar(image, ax=axes, fraction=0.05, pad=0.03)
    bar.set_label("mean entropy / log(visible keys)")
    return figure


def max_logit_evolution(history: Sequence[Snapshot]) -> Figure:
    """Largest |score| of each layer's worst head over the steps, with the published growth limits.

    Of a single snapshot, of every head. Raises ValueError for an empty history.
    """
    figure, axes = _evolution(
        history, lambda stats: stats.max_abs_logit, "largest |score| (nats)", "Attention scores"
    )
    axes.set_yscale("log")
    axes.autoscale(axis="y")
    for name, text in (
        ("clip_logit", "QK-clip acts (Kimi K2)"),
        ("deteriorating_logit", "loss suffers (Wortsman et al.)"),
        ("diverged_logit", "published runs diverged"),
    ):
        _limit(axes, threshold(name), text)
    return figure


def curvature_evolution(history: Sequence[Snapshot]) -> Figure:
    """log2 of the HNF curvature bound of each layer's worst head over the steps.

    Of a single snapshot, of every head. Raises ValueError for an empty history.
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
    # Without plasma's last, nearly white part.
    colours = ListedColormap(matplotlib.colormaps["plasma"](np.linspace(0.0, 0.88, len(names))))
    figure, axes = _new_figure(7.6, 4.2)
    for name, label, colour in zip(names, labels, colours.colors, strict=True):
        points = [(s.step, _worst(read(s.layers[name]))) for s in history if name in s.layers]
        steps, values = zip(*points, strict=True)
        axes.plot(
            steps, values, label=label, color=colour, linewidth=1.6, marker="o", markersize=2.5, zorder=3
        )
    axes.set_xlabel("training step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _dress(axes, f"{quantity}, worst head", f"{title} over training")
    if len(names) <= _LEGEND_LIMIT:
        axes.legend(title="layer", fontsize=8, title_fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    else:
        scale = ScalarMappable(Normalize(-0.5, len(names) - 0.5), colours)
        figure.colorbar(scale, ax=axes, label="layer, in the order they ran")
    return figure, axes


def _single_snapshot(
    snapshot: Snapshot, read: Callable[[HeadStats], np.ndarray], quantity: str, title: str
) -> tuple[Figure, Axes]:
    """A point for the finite `read(stats)` of every head, by layer; the worst head of each has its number beside it."""
    figure, axes = _new_figure(7.6, 4.2)
    few = len(snapshot.layers) <= _LEGEND_LIMIT
    for place, values in enumerate(map(read, snapshot.layers.values())):
        heads = np.flatnonzero(np.isfinite(values))
        points = {"linestyle": "none", "marker": "o", "markersize": 3.5, "color": "#4c5b9e", "alpha": 0.6}
        axes.plot(np.full(len(heads), place), values[heads], **points, zorder=3)
        if few and len(heads):
            worst = heads[values[heads].argmax()]
            beside = {"xytext": (5, 0), "textcoords": "offset points", "va": "center", "fontsize": 8}
            axes.annotate(f"head {worst}", (place, values[worst]), **beside)
    axes.set_xlim(-0.5, len(snapshot.layers))
    if few:
        axes.set_xticks(range(len(snapshot.layers)), layer_labels(snapshot.layers), rotation=30, ha="right")
    axes.set_xlabel("layer" if few else "layer, in the order they ran")
    _dress(axes, quantity, f"{title} of every head, one snapshot (step {snapshot.step})")
    return figure, axes


def _dress(axes: Axes, ylabel: str, title: str) -> None:
    axes.set_ylabel(ylabel)
    axes.set_title(title, loc="left", fontsize=10)
    axes.grid(True, color=_GRID, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


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


def _table(snapshot: Snapshot, read: Callable[[HeadStats], np.ndarray]) -> np.ndarray:
    """(layers, most heads of any layer), NaN where a layer has fewer heads."""
    rows = [read(stats) for stats in snapshot.layers.values()]
    table = np.full((len(rows), max(map(len, rows))), np.nan)
    for row, values in zip(table, rows, strict=True):
        row[: len(values)] = values
    return table


def _new_figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()
