"""What several rules ask about heads before they call one sick."""

from __future__ import annotations

import numpy as np

from ..heads import Heads
from ..thresholds import threshold


def sink_by_design(heads: Heads) -> np.ndarray:
    """Heads that rest on the first key and whose scores did not grow: sharp, and meant to be."""
    return (heads.stats.sink_mass > threshold("sink_mass")) & ~grown(heads)


def grown(heads: Heads) -> np.ndarray:
    """Heads whose scores are large, or rising and soon large: unstable rather than specialised."""
    return (heads.score > threshold("clip_logit")) | (heads.rising & (heads.score > threshold("watch_logit")))


def corroborated(heads: Heads, suspects: np.ndarray) -> np.ndarray:
    """Suspects, (H,), for which more speaks than sharpness: grown scores, or many suspects in the same layer."""
    return grown(heads) | (heads.in_layer(suspects) / heads.layer_heads >= threshold("layer_share"))
