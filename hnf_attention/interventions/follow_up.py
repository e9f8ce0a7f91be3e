"""What became of an intervention: the readings after it say whether it is kept, was not enough, or is taken back."""

from __future__ import annotations

import logging

import numpy as np

from ..diagnosis import AttentionDiagnosis
from ..diagnosis.issue import grouped, headline
from ..statistics.heads import HeadStats
from .apply import Applied
from .qk_norm_action import StartQKNorm
from .scaling import ScaleHeads

_log = logging.getLogger("hnf_attention")

#: Steps after which an intervention is judged: the trend window of the rules, which then holds none of its past.
SETTLED = 50


class FollowUp:
    """Follows one intervention that was carried out at a diagnosis.

    - *reverted*: it did not do what it said. QK-norm is taken away if keys are longer than its gains. Scaled weights
      are restored if the reading of the next step shows the old sizes. What else was done with it stays.
    - *kept*: 50 steps later, no issue is an error.
    - *escalated*: 50 steps later there is an error, or before that NaN or inf. The policy then goes on to what it has
      next.

    The account is in `Applied.account`, and in the log.
    """

    def __init__(self, applied: Applied, diagnosis: AttentionDiagnosis) -> None:
        self.applied = applied
        self._step, self._before = diagnosis.step, _sizes(diagnosis)
        done = f"intervened at step {self._step}: {applied.description} ({applied.intervention['reason']})"
        self._say(done)

    @property
    def open(self) -> bool:
        """Whether nothing is known of it yet."""
        return self.applied.outcome == "open"

    def look(self, diagnosis: AttentionDiagnosis) -> None:
        """Judge it by a later reading."""
        if not self.open or diagnosis.step <= self._step:
            return
        steps = diagnosis.step - self._step
        if self._take_back(diagnosis, steps):
            return
        broken = any(issue.issue_type == "non_finite" for issue in diagnosis.errors)
        if broken or (steps >= SETTLED and diagnosis.errors):
            worst = headline(grouped(diagnosis.errors)[0])
            self._close("escalated", diagnosis, f"not enough after {steps} steps: {worst}")
        elif steps >= SETTLED:
            self._close("kept", diagnosis, f"no error in the {steps} steps since")

    def replace(self, diagnosis: AttentionDiagnosis) -> None:
        """The same was done again before it was judged."""
        if self.open:
            self._close("repeated", diagnosis, "done again")

    def _take_back(self, diagnosis: AttentionDiagnosis, steps: int) -> bool:
        """Revert the actions that did not do what they said. Returns whether there were any."""
        wrong = []
        for action in self.applied.actions:
            if not action.applied:
                continue
            if isinstance(action, StartQKNorm):
                failed = action.verify(diagnosis.stats).holds is False
            else:  # a later reading shows what was learnt since
                failed = isinstance(action, ScaleHeads) and steps == 1 and action.missed(diagnosis.stats)
            if failed:
                wrong.append((action, action.verify(diagnosis.stats).text))
        for action, _ in reversed(wrong):
            action.revert()
        if wrong:
            said = "; ".join(f"{action.name} did not do what it said: {text}" for action, text in wrong)
            self._close("reverted", diagnosis, said)
        return bool(wrong)

    def _close(self, outcome: str, diagnosis: AttentionDiagnosis, why: str) -> None:
        self.applied.outcome = outcome
        text = f"{why}; the scores of a row range over up to {_sizes(diagnosis):.3g} nats, {self._before:.3g} then"
        self._say(f"at step {diagnosis.step} the intervention of step {self._step} is {outcome}: {text}")

    def _say(self, sentence: str) -> None:
        self.applied.account.append(sentence)
        _log.warning("%s", sentence)


def _sizes(diagnosis: AttentionDiagnosis) -> float:
    """The largest range of a row in any head, nats; NaN if there is none."""
    ranges = [_largest(stats) for stats in diagnosis.stats.values()]
    return float(np.fmax.reduce(ranges, initial=np.nan))


def _largest(stats: HeadStats) -> float:
    return float(np.fmax.reduce(stats.logit_range_max, initial=np.nan))
