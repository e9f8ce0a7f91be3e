"""Restarts of a run that failed: when, from which state, and how it goes on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import nn

from ..diagnosis import AttentionDiagnosis
from ..diagnosis.measured import RESTART_FIX, help_text
from . import good_states, learning_rate, qk_norm_action, rewind
from .apply import plan_intervention
from .intervention import Intervention

# From runs of the laboratory that failed (docs/validation.md, experiment 2). A rate at which scores grow too large
# within tens of steps is ten times too high, for the rest of the model as well. One that does so after hundreds is not.
AGE = 400  # steps from the start to the first warning, of a run that goes on at its own rate
LEAST, MOST = 0.1, 0.5  # of the rate
AGAIN = 0.25  # of the rate, at each later restart
RESTARTS = 3  # at most
FURTHEST = 500  # steps from a diagnosis back to the warning that counts, as long as the laboratory's runs
REST = 50  # steps in which a restarted run is let alone, as in the laboratory


class Restart(NamedTuple):
    """step: of the diagnosis it answered. origin: the step before which its state is. factor: of the learning rate.

    normed: whether QK-norm came with it.
    """

    step: int
    origin: int
    factor: float
    normed: bool


class Restarts:
    """The restarts of the run of one model, whose `GoodStates` are kept.

    A restart goes back to a state from before the first warning of the trouble that it answers, or before the error if
    no such state is left. The first one lowers the learning rate by how soon that warning came. It starts QK-norm,
    but not at step 0: queries and keys of initial weights are short, and gains of their lengths hold scores back.
    (A fine-tuning run begins at step 0, too. It gets its QK-norm at a second restart.) A later one lowers the
    rate to a quarter, with QK-norm if none came with an earlier one.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._made: list[Restart] = []
        self._since: int | None = None  # the step of the first warning of the present trouble
        self._seen = -1  # the step of the latest diagnosis

    def see(self, diagnosis: AttentionDiagnosis, trouble: bool) -> None:
        """Take note of a diagnosis. trouble: whether heads are growing or collapsing, or numbers are not finite.

        One of an earlier step than the latest tells nothing.
        """
        if diagnosis.step < self._seen:
            return
        self._seen = diagnosis.step
        answered = [made.step for made in self._made if made.step < diagnosis.step]
        if self._since is not None and (not trouble or self._since <= max(answered, default=-1)):
            self._since = None
        if trouble and self._since is None:
            self._since = diagnosis.step

    def states(self) -> good_states.GoodStates | None:
        """The states that a restart may go back to.

        None in a run of several processes: they choose a state together, and a proposal may be asked for in one alone.
        """
        several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        return None if several else good_states.of_model(self._model)

    def propose(self, diagnosis: AttentionDiagnosis, why: str, at_once: bool = False) -> Intervention | None:
        """A restart that answers this diagnosis, None if there can be none.

        at_once: however short a time ago the last one was. The numbers of a reading are of steps after it.
        """
        states = self.states()
        same = next((made for made in self._made if made.step == diagnosis.step), None)
        late = at_once or not self.rests(diagnosis)
        if states is None or (same is None and not (late and len(self._made) < RESTARTS)):
            return None
        since = diagnosis.step if self._since is None else self._since
        origins = [max(since, diagnosis.step - FURTHEST), diagnosis.step] if same is None else [same.origin]
        for origin in origins:
            found = self._from(states, diagnosis.step, origin, f"{why}. {help_text(RESTART_FIX)}")
            if found is not None:
                wanted, made = found
                if same is None:
                    self._made.append(made)
                return wanted
        return None

    def rests(self, diagnosis: AttentionDiagnosis) -> bool:
        """Whether the last restart was so short a time ago that nothing is proposed."""
        return bool(self._made) and diagnosis.step < self._made[-1].step + REST

    def _from(
        self, states: good_states.GoodStates, step: int, origin: int, why: str
    ) -> tuple[Intervention, Restart] | None:
        """A restart at `step` from a state that is older than `origin`; None if there is none that is old enough."""
        try:
            chosen = states.chosen(origin)
        except ValueError:
            return None
        before = [made for made in self._made if made.step < step]
        warned = origin if self._since is None else min(self._since, origin)
        factor = AGAIN if before else min(max(LEAST, warned / AGE), MOST)
        total = factor
        if states.schedulers:  # the rate comes back that the state had before any cut
            for made in before:
                total *= made.factor if made.step >= chosen else 1.0
        wanted = rewind.propose(origin, why)
        slower = learning_rate.propose(total, "a run that failed at this rate")
        norm = bool(chosen or before) and not any(made.normed for made in before)
        normed = (
            [qk_norm_action.propose("scores that cannot grow by longer queries and keys")] if norm else []
        )
        for then in ([*normed, slower], [slower]):
            wanted["then"] = [dict(step) for step in then]
            try:
                plan_intervention(states.optimizers, wanted, self._model)
            except ValueError:  # a model that cannot have QK-norm
                continue
            return wanted, Restart(step, origin, factor, len(then) > 1)
        return None

    def state_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return {"made": [list(made) for made in self._made], "since": self._since}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self._made = [Restart(*made) for made in state["made"]]
        self._since = state["since"]

    def load_steps(self, steps: Sequence[int]) -> None:
        """Go on from what earlier versions gave: the steps of restarts to a quarter of the rate, with QK-norm."""
        self._made = [Restart(step, step, AGAIN, number == 0) for number, step in enumerate(steps)]
