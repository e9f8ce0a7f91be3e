"""Layers all of whose heads rest on one key each, and attend to few others."""

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
    """One note for the model if in some layers every head has a sink and the entropy is low, beside the sinks too.

    The rules on single heads excuse a head with a sink. Beside its sink, a head that rests attends broadly. A layer
    whose rows collapsed onto a key attends to few others.
    """
    entropies = {
        layer: entropy
        for layer, entropy, rest in _resting(groups)
        if entropy < threshold("low_entropy") and rest < threshold("sharp_rest")
    }
    if not entropies or any(dormant_attention.rule(history, groups)):  # which says it of the whole model
        return
    named = display_name(min(entropies, key=entropies.__getitem__))
    lowest, layers = min(entropies.values()), counted(len(entropies), "layer")
    evidence = (
        f"in {layers} of {len(history[-1].layers)} every head rests on a key that its rows share, its sink, at step "
        f"{history[-1].step}, and attends to few others: the mean normalized entropy is {lowest:.3f} in layer {named}"
    )
    suggestion = (
        "watch whether the scores rise; if the entropy fell to this early in training, check the learning rate and "
        "its warm-up"
    )
    brief = (
        f"all heads of {layers} rest on their sinks and attend to few other keys, mean normalized entropy "
        f"{lowest:.3f} -> watch the scores"
    )
    yield make_issue(
        "entropy_collapse", "note", ("", None), lowest, "low_entropy", evidence, suggestion, brief
    )


def _resting(groups: Sequence[Heads]) -> Iterator[tuple[str, float, float]]:
    """Layers of several heads, all judged and resting; their mean normalized entropy, and that beside the sinks."""
    for heads in groups:
        resting = heads.resting & (heads.stats.judged_rows > 0)
        entropy, rest = heads.stats.normalized_entropy, heads.stats.rest_normalized_entropy
        for layer in np.unique(heads.layer):
            own = heads.layer == layer
            if own.sum() > 1 and resting[own].all():
                layer_name = heads.places[int(np.flatnonzero(own)[0])][0]
                yield layer_name, float(entropy[own].mean()), float(rest[own].mean())
