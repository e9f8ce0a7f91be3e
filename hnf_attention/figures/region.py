"""The figure of a stability region: the lowest stable temperature by length and width."""

from __future__ import annotations

from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes

from .canvas import axes_for, dress


class Mark(NamedTuple):
    """One design to show in the figure. temperature: T / sqrt(head_dim)."""

    d_model: int
    length: int
    temperature: float


def stability_figure(
    dims: np.ndarray,
    lengths: np.ndarray,
    by_spread: np.ndarray,
    by_curvature: np.ndarray,
    *,
    ratio_limit: float,
    curvature_limit: float,
    mark: Mark,
    ax: Axes | None = None,
) -> Axes:
    """Least stable T / sqrt(head_dim) over the length, one line a width; the region above a line is stable.

    A line is solid where the spread of the scores decides, dotted where the curvature does. Widths that no
    temperature makes stable are named beneath the title.
    dims: values of d_model, (D,).
    lengths: visible keys, (L,).
    by_spread, by_curvature: (D, L), the least temperature that keeps sigma / sigma_c under ratio_limit, and log2
        curvature (bits) under curvature_limit; inf if none does.
    mark: the design to show. ax: where to draw; None makes a figure. Returns the axes.
    """
    axes = axes_for(ax, 7.2, 4.4)
    colours = matplotlib.colormaps["viridis"](np.linspace(0.0, 0.88, len(dims)))
    never_stable = []
    for d_model, colour, spread, curvature in zip(dims, colours, by_spread, by_curvature, strict=True):
        boundary = np.maximum(spread, curvature)
        if not np.isfinite(boundary).any():
            never_stable.append(str(d_model))
            continue
        drawn = np.where(np.isfinite(boundary), boundary, np.nan)
        axes.plot(lengths, np.where(spread >= curvature, drawn, np.nan), color=colour, linewidth=2.0)
        axes.plot(lengths, drawn, color=colour, linewidth=1.4, linestyle=":", marker="o", markersize=3)
        axes.plot([], [], color=colour, linewidth=2.0, label=str(d_model))
    here = (mark.length, mark.temperature)
    axes.plot(*here, marker="*", markersize=13, color="#c0392b", linestyle="none")
    axes.annotate(
        f"this design ({mark.d_model})",
        here,
        xytext=(7, 5),
        textcoords="offset points",
        fontsize=8,
        color="#c0392b",
    )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    title = (
        f"Least stable temperature: sigma / sigma_c up to {ratio_limit:g} (solid), "
        f"log2 curvature up to {curvature_limit:g} (dotted)"
    )
    if never_stable:
        title += f"\nnot stable at any: d_model {', '.join(never_stable)}"
    dress(axes, "visible keys", "temperature T / sqrt(head_dim)", title, title_size=9)
    if len(never_stable) < len(dims):
        axes.legend(
            title="d_model", fontsize=8, title_fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5)
        )
    return axes
