"""The heatmap of every head's entropy."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from ..statistics.heads import HeadStats, Snapshot
from .canvas import axes_for
from .labels import layer_labels

_MOST_TEXTS, _MOST_BESIDE = (
    256,
    16,
)  # cells, and cells of a row: more numbers do not fit, and each costs milliseconds
_MOST_NAMES = 40  # layers: beyond this, every second, third, ... one is named
_WIDTH, _HEIGHT = (5.0, 12.0), (2.0, 10.0)  # inches, least and most


def entropy_heatmap(snapshot: Snapshot, sink_mass: float, *, ax: Axes | None = None) -> Axes:
    """Mean normalized entropy of every head, one row per layer in the order the layers ran.

    Dark cells are collapsed heads (0 = one key, 1 = uniform). An S or a white dot marks a sink head, whose low entropy
    is by design. A cell is hatched if no row of the head was judged, or if the layer has fewer heads.
    sink_mass: a head with more than this mean weight on the key that its rows share is a sink.
    ax: where to draw; None makes a figure. Returns the axes.
    Raises ValueError for a snapshot without layers.
    """
    if not snapshot.layers:
        raise ValueError("expected a snapshot with at least one layer, got none")
    entropies = _table(snapshot, lambda stats: stats.normalized_entropy)
    sinks = _table(snapshot, lambda stats: stats.sink_mass) > sink_mass
    num_layers, num_heads = entropies.shape
    written = entropies.size <= _MOST_TEXTS and num_heads <= _MOST_BESIDE

    labels = layer_labels(snapshot.layers)
    width = 2.2 + 0.075 * max(map(len, labels)) + num_heads * (0.62 if written else 0.3)
    height = 1.6 + num_layers * (0.42 if written else 0.2)
    axes = axes_for(ax, float(np.clip(width, *_WIDTH)), float(np.clip(height, *_HEIGHT)))
    axes.patch.set(hatch="////", facecolor="white", edgecolor="#bbbbbb")
    image = axes.imshow(np.ma.masked_invalid(entropies), vmin=0.0, vmax=1.0, cmap="viridis", aspect="auto")
    if written:
        _write(axes, entropies, sinks)
    else:
        rows, columns = np.nonzero(sinks)
        axes.scatter(columns, rows, s=5.0, c="white", edgecolors="black", linewidths=0.4)
    axes.set_xlabel("head")
    axes.set_ylabel("layer")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=16, min_n_ticks=1))
    named = range(0, num_layers, -(-num_layers // _MOST_NAMES))
    axes.set_yticks(named, [labels[place] for place in named])
    title = f"Attention entropy per head, step {snapshot.step}"
    if sinks.any():
        title += f"\n{'S' if written else 'dot'}: sink, more than {sink_mass:g} on one key"
    axes.set_title(title, loc="left", fontsize=10)
    bar = axes.figure.colorbar(image, ax=axes, fraction=0.05, pad=0.03)
    bar.set_label("mean entropy / log(visible keys)")
    return axes


def _write(axes: Axes, entropies: np.ndarray, sinks: np.ndarray) -> None:
    """Each number in its cell, with an S for a sink."""
    for layer, head in np.argwhere(np.isfinite(entropies)):
        entropy = entropies[layer, head]
        text = f"{entropy:.2f}{' S' if sinks[layer, head] else ''}"
        colour = "white" if entropy < 0.6 else "black"
        axes.text(head, layer, text, ha="center", va="center", fontsize=8, color=colour)


def _table(snapshot: Snapshot, read: Callable[[HeadStats], np.ndarray]) -> np.ndarray:
    """(layers, most heads of any layer), NaN where a layer has fewer heads."""
    rows = [read(stats) for stats in snapshot.layers.values()]
    table = np.full((len(rows), max(map(len, rows))), np.nan)
    for row, values in zip(table, rows, strict=True):
        row[: len(values)] = values
    return table
