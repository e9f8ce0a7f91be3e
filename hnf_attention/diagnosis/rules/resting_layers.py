"""Layers all of whose heads rest on one key each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from ...names import display_name
from ...statistics.heads import Snapshot
from ..extent import counted
from ..heads import Heads
from ..issue import StabilityIssue
from ..thresholds import threshold
from . import dormant_attention
from .wording import make_issue


def rule(history: Sequence[Snapshot], groups: Sequence[Heads]) -> Iterator[StabilityIssue]:
    """One note for the model if in some layers every head has a sink and the mean normalized entropy is low.

    The rules on single heads excuse a head with a sink. Such layers are common in trained models, and a layer that
    collapsed onto a key looks the same.
    """
    entropies = {
        layer: entropy
        for layer, entropy in _resting(history[-1], groups)
        if entropy < threshold("low_entropy")
    }
    if not entropies or any(dormant_attention.rule(history, groups)):  # which says it of the whole model
        return
    named = display_name(min(entropies, key=entropies.__getitem__))
    lowest, layers = min(entropies.values()), counted(len(entropies), "layer")
    evidence = (
        f"in {layers} of {len(history[-1].layers)} every head rests on a key that its rows share, its sink, at step "
        f"{history[-1].step}: the mean normalized entropy is at least {lowest:.3f}, in layer {named}"
    )
    suggestion = (
        "nothing to do in a trained model, where such layers are common; if the entropy fell to this early in "
        "training, check learning rate and warm-up"
    )
    brief = f"all heads of {layers} rest on their sinks, mean normalized entropy {lowest:.3f} -> normal once trained"
    yield make_issue(
        "entropy_collapse", "note", ("", None), lowest, "low_entropy", evidence, suggestion, brief
    )


def _resting(snapshot: Snapshot, groups: Sequence[Heads]) -> Iterator[tuple[str, float]]:
    """Layers of several heads, all judged and resting, with their mean normalized entropy."""
    for heads in groups:
        resting = heads.resting & (heads.stats.judged_rows > 0)
        entropy = heads.stats.normalized_entropy
        for layer in np.unique(heads.layer):
            own = heads.layer == layer
            if own.sum() > 1 and resting[own].all():
                yield heads.places[int(np.flatnonzero(own)[0])][0], float(entropy[own].mean())
