"""The picture of a stability region: how warm attention has to be, over length and width."""

from __future__ import annotations

from typing import TYPE_CHECKING

import matplotlib
import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from .heads import _GRID, _new_figure

if TYPE_CHECKING:
    from ..precheck.region import StabilityRegion


def stability_figure(region: StabilityRegion) -> Figure:
    """Least stable T / sqrt(head_dim) over the length, one line a width; above a line is stable.

    Solid where the spread of the scores decides, dotted where the curvature does. The design itself is
    marked; widths that no temperature makes stable are told beneath the title.
    """
    figure, axes = _new_figure(7.2, 4.4)
    colours = ListedColormap(matplotlib.colormaps["viridis"](np.linspace(0.0, 0.88, len(region.dims)))).colors
    hopeless = []
    for d_model, colour, spread, curvature in zip(
        region.dims, colours, region.by_spread, region.by_curvature, strict=True
    ):
        boundary = np.maximum(spread, curvature)
        if not np.isfinite(boundary).any():
            hopeless.append(str(d_model))
            continue
        shown = np.where(np.isfinite(boundary), boundary, np.nan)
        axes.plot(region.lengths, np.where(spread >= curvature, shown, np.nan), color=colour, linewidth=2.0)
        axes.plot(region.lengths, shown, color=colour, linewidth=1.4, linestyle=":", marker="o", markersize=3)
        axes.plot([], [], color=colour, linewidth=2.0, label=str(d_model))
    design = region.design
    here = design.relative_temperature
    axes.plot([design.seq_len], [here], marker="*", markersize=13, color="#c0392b", linestyle="none")
    axes.annotate(
        f"this design ({design.d_model})",
        (design.seq_len, here),
        xytext=(7, 5),
        textcoords="offset points",
        fontsize=8,
        color="#c0392b",
    )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xlabel("visible keys")
    axes.set_ylabel("temperature T / sqrt(head_dim)")
    axes.grid(True, color=_GRID, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    title = (
        f"Least stable temperature: sigma / sigma_c up to {region.ratio_limit:g} (solid), "
        f"log2 curvature up to {region.curvature_limit:g} (dotted)"
    )
    if hopeless:
        title += f"\nnot stable at any: d_model {', '.join(hopeless)}"
    axes.set_title(title, loc="left", fontsize=9)
    if len(hopeless) < len(region.dims):
        axes.legend(
            title="d_model", fontsize=8, title_fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5)
        )
    return figure
