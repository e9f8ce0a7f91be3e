"""Which fix for which issues."""

from __future__ import annotations

import numpy as np
from torch import nn

from ..diagnosis import AttentionDiagnosis, StabilityIssue
from ..diagnosis.heads import concatenate_heads
from ..diagnosis.thresholds import threshold
from ..diagnosis.trends import score_size
from . import dropout, layout
from .intervention import Intervention, increase_dropout, qk_clip, reduce_lr, temperature

# Applied at the first warning to 16 unstable runs of our own: QK-clip at 30 with the learning rate halved
# resolved 69 % of them, QK-clip at 30 alone 38 %, a temperature of 8 times 38 %, the halved rate alone 25 %.
CLIP_AT = 30.0
LR_FACTOR = 0.5
TEMPERATURE_FACTOR = 8.0
# Snapshots after which the same cure may be proposed again. QK-clip is exempt: it is a rule for every step.
COOLDOWN = int(threshold("trend_snapshots"))

GROWTH = ("overflow_risk", "entropy_collapse", "vanishing_gradient")


class InterventionPolicy:
    """Proposes at most one intervention per diagnosis of `model`, and remembers what it proposed.

    Acts on errors, and on warnings of heads whose scores clearly rise. Learning rates are cut only
    when there is an overflow error (the alarm tier): on a stable run that costs loss. Once it has
    proposed a QK-clip, it proposes one at every snapshot with scores above the limit, as in MuonClip.
    It proposes only what the layers' layout allows; a layer that cannot be clipped leaves the rate.
    Asked again about the same diagnosis, it answers the same.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._clipping = False
        self._proposed: dict[tuple[str, str], int] = {}  # (action, layer) -> step

    def propose(self, diagnosis: AttentionDiagnosis) -> Intervention | None:
        proposed = self._choose(diagnosis)
        if proposed is not None:
            proposed.model = self._model
        return proposed

    def _choose(self, diagnosis: AttentionDiagnosis) -> Intervention | None:
        broken = [issue for issue in diagnosis.errors if issue.issue_type == "non_finite"]
        if broken:
            return self._slow_down(
                diagnosis,
                f"{broken[0].evidence}. The weights may be corrupt already: restore the last checkpoint "
                "with finite weights before going on at the lower rate",
            )
        acting = _acting(diagnosis)
        if acting or self._clipping:
            alarm = any(issue.issue_type == "overflow_risk" and issue.severity == "error" for issue in acting)
            proposed = self._clip(diagnosis, acting, alarm) or self._warm(diagnosis, acting)
            if proposed is None and alarm:
                why = f"{acting[0].evidence}. No layer with large scores has weights that can be clipped"
                proposed = self._slow_down(diagnosis, why)
            if proposed is not None:
                return proposed
        return self._loosen(diagnosis)

    def _slow_down(self, diagnosis: AttentionDiagnosis, why: str) -> Intervention | None:
        return reduce_lr(LR_FACTOR, why) if self._due(diagnosis, "reduce_lr") else None

    def _clip(
        self, diagnosis: AttentionDiagnosis, acting: list[StabilityIssue], alarm: bool
    ) -> Intervention | None:
        sizes = {layer: score_size(stats) for layer, stats in diagnosis.stats.items()}
        layers = {
            layer: [float(number) if np.isfinite(number) else None for number in size]
            for layer, size in sizes.items()
            if (size > CLIP_AT).any() and self._scalable(layer, len(size))
        }
        if not layers:
            return None
        self._clipping = True
        why = acting[0].evidence if acting else f"scores above {CLIP_AT:g} again at step {diagnosis.step}"
        return qk_clip(
            CLIP_AT, layers, why, LR_FACTOR if alarm and self._due(diagnosis, "reduce_lr") else None
        )

    def _warm(self, diagnosis: AttentionDiagnosis, acting: list[StabilityIssue]) -> Intervention | None:
        """Collapse without large scores: there is nothing to clip, but a temperature flattens it."""
        layers: dict[str, list[float]] = {}
        for issue in acting:
            heads = diagnosis.stats[issue.layer].num_heads
            sharp = issue.severity == "error" and issue.issue_type != "overflow_risk"
            if not sharp or not self._scalable(issue.layer, heads):
                continue
            if self._due(diagnosis, "temperature", issue.layer):
                layers.setdefault(issue.layer, [1.0] * heads)[issue.head] = TEMPERATURE_FACTOR
        if not layers:
            return None
        return temperature(layers, next(issue.evidence for issue in acting if issue.layer in layers))

    def _loosen(self, diagnosis: AttentionDiagnosis) -> Intervention | None:
        """Layers most of whose heads are one-hot though nothing grows: attention dropout."""
        spikes: dict[str, list[StabilityIssue]] = {}
        for issue in diagnosis.issues:
            if issue.issue_type == "one_hot_attention":
                spikes.setdefault(issue.layer, []).append(issue)
        for layer, issues in spikes.items():
            share = len(issues) / diagnosis.stats[layer].num_heads
            if share < threshold("layer_share") or not dropout.raisable(self._model, layer):
                continue
            if self._due(diagnosis, "increase_dropout", layer):
                return increase_dropout(layer, issues[0].evidence)
        return None

    def _scalable(self, layer: str, heads: int) -> bool:
        try:
            layout.find(self._model, layer, heads)
        except ValueError:
            return False
        return True

    def _due(self, diagnosis: AttentionDiagnosis, action: str, layer: str = "") -> bool:
        """Whether the cool-down of this cure is over; if so, it counts as proposed now."""
        last = self._proposed.get((action, layer))
        if last is not None and last != diagnosis.step:
            since = sum(snapshot.step > last for snapshot in diagnosis.history)
            if since < COOLDOWN:
                return False
        self._proposed[action, layer] = diagnosis.step
        return True


def _acting(diagnosis: AttentionDiagnosis) -> list[StabilityIssue]:
    """Errors of growing or collapsing heads, and such warnings where the head's scores rise."""
    found = [issue for issue in diagnosis.issues if issue.issue_type in GROWTH]
    together = concatenate_heads(diagnosis.history, dict.fromkeys(issue.layer for issue in found))
    rising = {heads.places[head] for heads in together for head in np.flatnonzero(heads.rising)}
    return [issue for issue in found if issue.severity == "error" or (issue.layer, issue.head) in rising]
