"""Going back to a good state before an alarm, as an action."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from . import good_states
from .action import Action, Preview, Reading, Verdict
from .intervention import Intervention


def propose(before: int, reason: str) -> Intervention:
    """Restore a state from well before step `before`, the step of the alarm."""
    return Intervention({"action": "rewind", "before": before, "reason": reason})


class Rewind(Action):
    """Restores what `GoodStates` of the model has kept. Reverting restores the state that was left, bit for bit.

    What was learnt since the rewind is lost by reverting.
    Raises ValueError for a model without kept states, or without one that is old enough.
    """

    name = "rewind"

    def __init__(self, model: nn.Module, intervention: Mapping[str, Any]):
        super().__init__()
        before = intervention.get("before")
        if isinstance(before, bool) or not isinstance(before, int) or before < 0:
            raise ValueError(f"expected 'before' to be the step of the alarm, an int >= 0, got {before!r}")
        states = good_states.of_model(model)
        if states is None:
            raise ValueError(
                "expected a model whose states are kept, by GoodStates(model, optimizer), for a rewind, got one "
                f"without; restore a checkpoint of your own that is at least {good_states.MARGIN} steps older than "
                f"step {before:,}"
            )
        self._states, self._before = states, before
        self._step = states.chosen(before)

    def preview(self) -> Preview:
        """As `Action.preview`."""
        text = f"back to the state of step {self._step:,}, {self._before - self._step} steps before the alarm"
        return Preview(text, {"before": self._before, "after": self._step})

    def verify(self, reading: Reading) -> Verdict:
        """A reading does not show where a run was taken back to."""
        return Verdict(None, f"the run went on from step {self._step:,}")

    def _do(self, undo: list[Callable[[], Any]]) -> str:
        said = self.preview().text
        self._states.rewind(self._before)
        undo.append(self._states.revert)
        return said
