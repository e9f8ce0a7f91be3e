"""The heatmap of every head's entropy."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..statistics.heads import HeadStats, Snapshot
from .canvas import new_figure
from .labels import layer_labels

_CELL_TEXT_LIMIT = 16  # heads: beyond this, numbers no longer fit their cells


def entropy_heatmap(snapshot: Snapshot, sink_mass: float) -> Figure:
    """Mean normalized entropy of every head, one row per layer in the order the layers ran.

    Dark cells are collapsed heads (0 = one key, 1 = uniform). An S marks a sink head, whose low entropy is
    by design. A cell is hatched if no row of the head was judged, or if the layer has fewer heads.
    sink_mass: a head with more than this mean weight on the key that its rows share is a sink.
    Raises ValueError for a snapshot without layers.
    """
    if not snapshot.layers:
        raise ValueError("expected a snapshot with at least one layer, got none")
    entropies = _table(snapshot, lambda stats: stats.normalized_entropy)
    sinks = _table(snapshot, lambda stats: stats.sink_mass) > sink_mass
    num_layers, num_heads = entropies.shape

    labels = layer_labels(snapshot.layers)
    width = 2.2 + 0.075 * max(map(len, labels)) + num_heads * (0.62 if num_heads <= _CELL_TEXT_LIMIT else 0.3)
    figure, axes = new_figure(max(width, 5.0), 1.6 + 0.42 * num_layers)
    axes.patch.set(hatch="////", facecolor="white", edgecolor="#bbbbbb")
    image = axes.imshow(np.ma.masked_invalid(entropies), vmin=0.0, vmax=1.0, cmap="viridis", aspect="auto")
    for layer, head in np.argwhere(np.isfinite(entropies)):
        entropy = entropies[layer, head]
        marks = [f"{entropy:.2f}"] if num_heads <= _CELL_TEXT_LIMIT else []
        marks += ["S"] if sinks[layer, head] else []
        colour = "white" if entropy < 0.6 else "black"
        axes.text(head, layer, " ".join(marks), ha="center", va="center", fontsize=8, color=colour)
    axes.set_xlabel("head")
    axes.set_ylabel("layer")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=16, min_n_ticks=1))
    axes.set_yticks(range(num_layers), labels)
    title = f"Attention entropy per head, step {snapshot.step}"
    if sinks.any():
        title += f"\nS: sink, more than {sink_mass:g} on one key"
    axes.set_title(title, loc="left", fontsize=10)
    bar = figure.colorbar(image, ax=axes, fraction=0.05, pad=0.03)
    bar.set_label("mean entropy / log(visible keys)")
    return figure


def _table(snapshot: Snapshot, read: Callable[[HeadStats], np.ndarray]) -> np.ndarray:
    """(layers, most heads of any layer), NaN where a layer has fewer heads."""
    rows = [read(stats) for stats in snapshot.layers.values()]
    table = np.full((len(rows), max(map(len, rows))), np.nan)
    for row, values in zip(table, rows, strict=True):
        row[: len(values)] = values
    return table
