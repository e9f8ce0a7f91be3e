"""Figures of head statistics and of stability regions."""

from .heads import curvature_evolution, entropy_heatmap, max_logit_evolution
from .labels import layer_labels
from .region import stability_figure

__all__ = [
    "curvature_evolution",
    "entropy_heatmap",
    "layer_labels",
    "max_logit_evolution",
    "stability_figure",
]
