"""The demo's verdict: what it promised, and what happened."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from .loss import LossSign, falls_behind, first_sign
from .training import Run

PROMISED_GAP = 0.25  # nats by which the treated run must end below the untreated one
HINDSIGHT_GAP = 0.1  # nats behind the treated run that are visible with hindsight


@dataclass(frozen=True)
class Outcome:
    """The judgement of two runs. Losses are those at the end on held-out text, in nats. Steps count from 1."""

    warning_step: int | None  # first issue of the untreated run
    alarm_step: int | None  # its first issue of severity error
    sign: LossSign | None
    treated_sign: LossSign | None
    hindsight_step: int | None  # from here on, the untreated loss stays HINDSIGHT_GAP above the treated one
    untreated_loss: float
    treated_loss: float
    intervention_step: int | None
    lost_steps: int  # that rewinds gave up, and that the treated run made up for

    @property
    def lead(self) -> int | None:
        """Steps from the warning to the first sign in the loss; None if one of the two is missing."""
        if self.warning_step is None or self.sign is None:
            return None
        return self.sign.step - self.warning_step

    @property
    def gap(self) -> float:
        """Nats by which the treated run ends below the untreated one; inf if only the untreated loss is not finite."""
        if not math.isfinite(self.treated_loss):
            return -math.inf
        return self.untreated_loss - self.treated_loss if math.isfinite(self.untreated_loss) else math.inf

    @property
    def broken_promises(self) -> list[str]:
        """One sentence for each thing that the demo promised and did not show."""
        broken = []
        if self.warning_step is None:
            broken.append("the monitor never warned")
        elif self.sign is None:
            broken.append("the untreated run's loss never showed any trouble")
        elif self.sign.step <= self.warning_step:
            broken.append(
                f"the loss showed trouble at step {self.sign.step}, the warning came at step {self.warning_step}"
            )
        if self.treated_sign is not None:
            broken.append(
                f"the treated run's loss shows trouble too, at step {self.treated_sign.step} "
                f"({self.treated_sign.kind})"
            )
        if self.gap < PROMISED_GAP:
            broken.append(
                f"the treated run ends at {self.treated_loss:.2f} nats, the untreated one at "
                f"{self.untreated_loss:.2f}: less than {PROMISED_GAP} apart"
            )
        return broken

    def to_dict(self) -> dict[str, Any]:
        return {
            "warning_step": self.warning_step,
            "alarm_step": self.alarm_step,
            "loss_shows": None if self.sign is None else asdict(self.sign),
            "treated_loss_shows": None if self.treated_sign is None else asdict(self.treated_sign),
            "lead_steps": self.lead,
            "hindsight_step": self.hindsight_step,
            "untreated_final_loss": _finite(self.untreated_loss),
            "treated_final_loss": _finite(self.treated_loss),
            "gap_nats": _finite(self.gap),
            "intervention_step": self.intervention_step,
            "lost_steps": self.lost_steps,
            "broken_promises": self.broken_promises,
        }


def judge(untreated: Run, treated: Run) -> Outcome:
    """Judge both runs of the demo, by the same signs."""
    return Outcome(
        warning_step=None if untreated.first_issue is None else untreated.first_issue.step,
        alarm_step=None if untreated.first_error is None else untreated.first_error.step,
        sign=first_sign(untreated.losses),
        treated_sign=first_sign(treated.losses),
        hindsight_step=falls_behind(untreated.losses, treated.losses, HINDSIGHT_GAP),
        untreated_loss=untreated.held_out_loss,
        treated_loss=treated.held_out_loss,
        intervention_step=treated.interventions[0][0] if treated.interventions else None,
        lost_steps=treated.lost_steps,
    )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
