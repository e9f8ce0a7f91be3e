"""Which fix for which issues."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import nn

from ..diagnosis import AttentionDiagnosis, StabilityIssue
from ..diagnosis.heads import concatenate_heads
from ..diagnosis.measured import CLIP_FIX, CUT_FIX, help_text
from ..diagnosis.origin import NOT_LEARNED, find_origin
from ..diagnosis.thresholds import overridden, threshold
from ..diagnosis.trends import clip_size, score_size
from ..statistics.heads import Snapshot
from . import dropout, layout, learning_rate, qk_clip, temperature
from .intervention import Intervention
from .restarts import Restarts

# Applied at the first warning to 16 unstable runs of our own: QK-clip at 30 with the learning rate halved
# resolved 69 % of them, QK-clip at 30 alone 38 %, a temperature of 8 times 38 %, the halved rate alone 25 %.
CLIP_AT = 30.0
LR_FACTOR = 0.5
TEMPERATURE_FACTOR = 8.0

GROWTH = ("overflow_risk", "entropy_collapse", "vanishing_gradient", "one_hot_attention")


class InterventionPolicy:
    """Proposes at most one intervention per diagnosis of `model`, and remembers what it proposed.

    It acts on heads whose scores have grown or clearly rise: on their errors, and on warnings of rising ones. Sharpness
    alone is no reason to touch a model, because trained heads are sharp on purpose. It proposes only what the
    layers' layout allows.

    If `GoodStates` are kept of the model, an error of growing heads, or NaN and inf that training may have made, is
    answered by a restart: back to a state from before the first warning, and on at a lower learning rate, with QK-norm
    unless that is step 0. After a first restart the rate is cut again, and three restarts are the most. Nothing else is
    proposed for 50 steps after one, unless NaN or inf come again.

    Without such states, in a run of several processes, after three restarts, or where no state is old enough:

    - NaN or inf while the model trains: cut the learning rate, unless a mask or a number format is the cause.
    - Heads that grow or collapse, with scores of a size above 30 (half of the largest range of a row): QK-clip. From
      then on it is proposed at every snapshot with such scores, as in MuonClip.
    - Heads that collapse without such scores: a higher temperature.
    - An overflow error: the learning rate is cut along with the clip. If no layer can be clipped, the learning
      rate is cut instead. A warning never cuts it, because a cut costs loss on a stable run.
    - Most heads of a layer are one-hot, they act up, and none of the above can be done: more attention dropout.

    Each but QK-clip is proposed again only after `trend_snapshots` further snapshots. The learning rate is cut again
    only if the last cut helped, and never below `learning_rate.FLOOR` of what it was at first. Asked twice about the
    same diagnosis, it answers the same.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._clipping = False
        self._proposed: dict[tuple[str, str], int] = {}  # (action, layer) -> step
        self._cuts = learning_rate.Cuts()
        self._restarts = Restarts(model)

    def see(self, diagnosis: AttentionDiagnosis) -> None:
        """Take note of a diagnosis. Those between, for which nothing is asked, tell when a trouble began.

        One that could not be judged whole, or of evaluation forwards alone, tells nothing.
        """
        if diagnosis.not_judged or (diagnosis.history and not diagnosis.history[-1].training):
            return
        with overridden(diagnosis.thresholds):
            broken = bool(_broken(diagnosis)) and _training_made_it(diagnosis)
            self._restarts.see(diagnosis, broken or bool(_acting(diagnosis)))

    def propose(self, diagnosis: AttentionDiagnosis | None) -> Intervention | None:
        """The fix for this diagnosis, None for none, and for none of a step that is not a log step."""
        if diagnosis is None:
            return None
        self.see(diagnosis)
        with overridden(diagnosis.thresholds):
            proposed = self._choose(diagnosis)
        if proposed is not None:
            proposed.model = self._model
        return proposed

    def _choose(self, diagnosis: AttentionDiagnosis) -> Intervention | None:
        broken = _broken(diagnosis)
        if broken:
            return self._rescue(diagnosis, broken[0])
        acting = _acting(diagnosis)
        if self._restarts.states() is not None:
            errors = [issue for issue in acting if issue.severity == "error"]
            restart = self._restarts.propose(diagnosis, errors[0].evidence) if errors else None
            if restart is not None or not errors or self._restarts.rests(diagnosis):
                return restart
        if not acting and not self._clipping:
            return None
        alarm = any(issue.issue_type == "overflow_risk" and issue.severity == "error" for issue in acting)
        proposed = self._clip(diagnosis, acting, alarm) or self._raise_temperature(diagnosis, acting)
        if proposed is None and alarm:
            why = f"{acting[0].evidence}. No layer with large scores has weights that can be clipped"
            proposed = self._cut_rate(diagnosis, why)
        return proposed or self._raise_dropout(diagnosis, acting)

    def _rescue(self, diagnosis: AttentionDiagnosis, broken: StabilityIssue) -> Intervention | None:
        """Against NaN and inf: a lower rate, where the training may have made them."""
        if not _training_made_it(diagnosis):
            return None
        if self._restarts.states() is not None:
            restart = self._restarts.propose(diagnosis, broken.evidence, at_once=True)
            if restart is not None or self._restarts.rests(diagnosis):
                return restart
        return self._cut_rate(
            diagnosis,
            f"{broken.evidence}. The weights may be corrupt already: restore the last checkpoint "
            "with finite weights before going on at the lower rate",
        )

    def _cut_rate(self, diagnosis: AttentionDiagnosis, why: str) -> Intervention | None:
        wanted = learning_rate.propose(LR_FACTOR, f"{why}. {help_text(CUT_FIX)}")
        return wanted if self._may_cut(diagnosis) else None

    def _may_cut(self, diagnosis: AttentionDiagnosis) -> bool:
        """Whether the learning rate may be cut (again); if so, it counts as cut now."""
        last = self._proposed.get(("reduce_lr", ""))
        if last == diagnosis.step:
            return True
        trouble = learning_rate.trouble(diagnosis.history, -1 if last is None else last)
        return (
            self._cuts.allows(LR_FACTOR, trouble)
            and self._due(diagnosis, "reduce_lr")
            and self._cuts.cut(LR_FACTOR, trouble)
        )

    def _clip(
        self, diagnosis: AttentionDiagnosis, acting: list[StabilityIssue], alarm: bool
    ) -> Intervention | None:
        layers = {
            layer: [float(number) if np.isfinite(number) else None for number in clip_size(stats)]
            for layer, stats in diagnosis.stats.items()
            if (score_size(stats) > CLIP_AT).any() and self._scalable(layer, stats.num_heads)
        }
        if not layers:
            return None
        self._clipping = True
        why = acting[0].evidence if acting else f"scores above {CLIP_AT:g} again at step {diagnosis.step}"
        lr_factor = LR_FACTOR if alarm and self._may_cut(diagnosis) else None
        return qk_clip.propose(CLIP_AT, layers, f"{why}. {help_text(CLIP_FIX)}", lr_factor)

    def _raise_temperature(
        self, diagnosis: AttentionDiagnosis, acting: list[StabilityIssue]
    ) -> Intervention | None:
        """For a collapse without large scores: there is nothing to clip, and a temperature flattens it."""
        layers: dict[str, list[float]] = {}
        for issue in acting:
            heads = diagnosis.stats[issue.layer].num_heads
            sharp = issue.severity == "error" and issue.issue_type != "overflow_risk"
            if not sharp or issue.head is None or not self._scalable(issue.layer, heads):
                continue
            if self._due(diagnosis, "temperature", issue.layer):
                layers.setdefault(issue.layer, [1.0] * heads)[issue.head] = TEMPERATURE_FACTOR
        if not layers:
            return None
        return temperature.propose(layers, next(issue.evidence for issue in acting if issue.layer in layers))

    def _raise_dropout(
        self, diagnosis: AttentionDiagnosis, acting: list[StabilityIssue]
    ) -> Intervention | None:
        """For layers most of whose heads are one-hot, some of them growing."""
        for issue in acting:
            stats = diagnosis.stats[issue.layer]
            one_hot = (stats.max_weight > threshold("one_hot_weight")).mean()
            if one_hot < threshold("layer_share") or not dropout.raisable(self._model, issue.layer):
                continue
            if self._due(diagnosis, "increase_dropout", issue.layer):
                return dropout.propose(issue.layer, issue.evidence)
        return None

    def _scalable(self, layer: str, heads: int) -> bool:
        try:
            layout.find(self._model, layer, heads)
        except ValueError:
            return False
        return True

    def _due(self, diagnosis: AttentionDiagnosis, action: str, layer: str = "") -> bool:
        """Whether this cure may be proposed (again); if so, it counts as proposed now."""
        last = self._proposed.get((action, layer))
        if last is not None and last != diagnosis.step:
            since = sum(snapshot.step > last for snapshot in diagnosis.history)
            if since < threshold("trend_snapshots"):
                return False
        self._proposed[action, layer] = diagnosis.step
        return True

    def state_dict(self) -> dict[str, Any]:
        """What was proposed before, as JSON types."""
        proposed = [[action, layer, step] for (action, layer), step in self._proposed.items()]
        return {
            "clipping": self._clipping,
            "proposed": proposed,
            "cuts": self._cuts.state_dict(),
            "restarts": self._restarts.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self._clipping = bool(state["clipping"])
        self._proposed = {(action, layer): step for action, layer, step in state["proposed"]}
        self._cuts.load_state_dict(state["cuts"])
        restarts = state.get("restarts", ())  # earlier versions gave steps, or nothing
        if isinstance(restarts, Mapping):
            self._restarts.load_state_dict(restarts)
        else:
            self._restarts.load_steps(restarts)


def _broken(diagnosis: AttentionDiagnosis) -> list[StabilityIssue]:
    """Errors of NaN and inf."""
    return [issue for issue in diagnosis.errors if issue.issue_type == "non_finite"]


def _training_made_it(diagnosis: AttentionDiagnosis) -> bool:
    """Whether NaN and inf may come from the training, and not from a mask or a number format."""
    origin = find_origin(list(diagnosis.history) or [Snapshot(diagnosis.step, diagnosis.stats)])
    return (
        origin is not None
        and origin.cause not in NOT_LEARNED
        and bool(getattr(origin.snapshot, "training", True))
    )


def _acting(diagnosis: AttentionDiagnosis) -> list[StabilityIssue]:
    """Errors of growing or collapsing heads, and such warnings where the head's scores rise."""
    found = [i for i in diagnosis.issues if i.issue_type in GROWTH and i.severity != "note"]
    together = concatenate_heads(diagnosis.history, dict.fromkeys(issue.layer for issue in found))
    rising = {heads.places[head] for heads in together for head in np.flatnonzero(heads.rising).tolist()}
    return [issue for issue in found if issue.severity == "error" or (issue.layer, issue.head) in rising]
