"""Figures of head statistics and of stability regions, drawn without pyplot: no global state, no display.

Each function returns a `matplotlib.figure.Figure` with an Agg canvas; `figure.savefig(path)` writes it.
Numbers that decide something (thresholds, limits) come from the caller.
"""

from .evolution import curvature_evolution, max_logit_evolution
from .heatmap import entropy_heatmap
from .labels import layer_labels
from .region import stability_figure

__all__ = [
    "curvature_evolution",
    "entropy_heatmap",
    "layer_labels",
    "max_logit_evolution",
    "stability_figure",
]
