"""Figures of head statistics and of stability regions, drawn without pyplot: no global state, no display.

Each function draws into `ax` if one is given, else into a figure of its own, and returns the axes.
As the last value of a notebook's cell, axes of their own figure show it once.
Numbers that decide something (thresholds, limits) come from the caller.
"""

from .ahead import forecast_figure
from .change import before_after
from .evolution import bits_evolution, curvature_evolution, score_range_evolution
from .heads import entropy_evolution
from .heatmap import entropy_heatmap
from .labels import layer_labels
from .region import stability_figure

__all__ = [
    "before_after",
    "bits_evolution",
    "curvature_evolution",
    "entropy_evolution",
    "entropy_heatmap",
    "forecast_figure",
    "layer_labels",
    "score_range_evolution",
    "stability_figure",
]
