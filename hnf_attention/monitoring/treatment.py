"""What a monitor proposes for its run, what it carries out by itself, and what became of that."""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor, nn

from ..diagnosis import AttentionDiagnosis
from ..interventions import (
    Applied,
    FollowUp,
    GoodStates,
    Intervention,
    InterventionPolicy,
    apply_intervention,
    learning_rate,
)
from ..interventions.good_states import of_model
from .agreement import Together

# What auto_intervene does: to weights alone, and with the optimizers of good states.
WEIGHT_ACTIONS = ("qk_clip", "temperature")
RUN_ACTIONS = (*WEIGHT_ACTIONS, "rewind", "reduce_lr")

CUT = 0.5  # a learning rate that falls to this share between two log steps begins new trends


class Treatment:
    """The fixes of one run. states: of the run, None for none. auto: whether to carry out what is proposed."""

    def __init__(self, model: nn.Module, states: GoodStates | None, auto: bool) -> None:
        self.policy = InterventionPolicy(model)
        self.auto = auto
        #: What was done, newest last.
        self.applied: deque[Applied] = deque(maxlen=1_000)
        self._model, self._states = model, states
        self._jumps, self._rate = self._count_jumps(), self._largest_rate()
        self._open: list[FollowUp] = []
        # The latest diagnosis that was treated, and what of its fix is left to the user.
        self._left_over: tuple[AttentionDiagnosis, Intervention | None] | None = None

    def end_step(self, step: int) -> None:
        """Keep the state of the step, if one is due."""
        if self._states is not None:
            self._states.on_step(step)

    @property
    def done(self) -> int | None:
        """How many steps led to the weights, as the good states count them; None without such states."""
        return None if self._states is None else self._states.done

    def resume(self, step: int, done: int | None) -> None:
        """The run goes on from a checkpoint of that step. done: as the states of the run before counted it."""
        if self._states is not None:
            self._states.restart(step, done)

    def jumped(self) -> bool:
        """Whether the run was taken to another state since this was last asked, or its learning rate was cut by half.

        What scores did before is then no guide. Rates are those of the good states that the monitor was given.
        """
        jumps, rate = self._jumps, self._rate
        self._jumps, self._rate = self._count_jumps(), self._largest_rate()
        cut = 0 < self._rate <= CUT * rate
        return self._jumps != jumps or cut

    def propose(self, diagnosis: AttentionDiagnosis | None) -> Intervention | None:
        """The fix for a diagnosis; what is left of it if it was treated."""
        if self._left_over is not None and self._left_over[0] is diagnosis:
            return self._left_over[1]
        return self.policy.propose(diagnosis)

    def act(self, diagnosis: AttentionDiagnosis) -> None:
        """Judge what was done before by this reading, and carry out what the policy proposes now."""
        for follow in self._open:
            follow.look(diagnosis)
        self._open = [follow for follow in self._open if follow.open]
        proposed = self.policy.propose(diagnosis)
        self._left_over = diagnosis, proposed
        states = self._states or of_model(self._model)
        possible = WEIGHT_ACTIONS if states is None else RUN_ACTIONS
        if proposed is None or proposed["action"] not in possible:
            return
        wanted, rest = proposed, None
        if states is None and "lr_factor" in proposed:
            wanted = Intervention({k: v for k, v in proposed.items() if k != "lr_factor"})
            rest = learning_rate.propose(proposed["lr_factor"], proposed["reason"])
        optimizers = None if states is None else states.optimizers
        done = apply_intervention(optimizers, wanted, self._model)
        for follow in self._open:
            if follow.applied.intervention["action"] == wanted["action"]:
                follow.replace(diagnosis)
        self.applied.append(done)
        self._open = [*(follow for follow in self._open if follow.open), FollowUp(done, diagnosis)]
        self._left_over = diagnosis, rest

    def _largest_rate(self) -> float:
        """0 if it is not known: a rate that lies on a card is not waited for."""
        optimizers = [] if self._states is None else self._states.optimizers
        rates = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
        known = [float(rate) for rate in rates if not (isinstance(rate, Tensor) and rate.is_cuda)]
        return max(known, default=0.0)

    def _count_jumps(self) -> int:
        """Of the states that the monitor was given, or of others that the user keeps of the model."""
        states = self._states or of_model(self._model)
        return 0 if states is None else states.jumps


def check_good_states(states: GoodStates | None, model: nn.Module, step: int) -> None:
    """Raise TypeError or ValueError for states that are not of this run."""
    if states is None:
        return
    if not isinstance(states, GoodStates):
        raise TypeError(f"expected good_states to be a GoodStates or None, got {type(states).__name__}")
    if states.model is not model:
        raise ValueError(
            f"expected good_states of the monitored {type(model).__name__}, got those of another "
            f"{type(states.model).__name__}"
        )
    if states.step != step:
        raise ValueError(f"expected good_states that begin at step {step}, as the monitor, got {states.step}")


def check_auto_intervene(together: Together | None) -> None:
    """Raise ValueError if the processes of a group would not all make the same change."""
    ready = torch.distributed.is_available() and torch.distributed.is_initialized()
    world = torch.distributed.get_world_size() if ready else 1
    if world == 1:
        return
    groups = None if together is None else together.groups
    if groups is None or groups.heads is not None or groups.processes != world:
        raise ValueError(
            "expected auto_intervene=False, or ranks=ProcessGroups(batch=<the group of all processes>), "
            f"got ranks={groups}: each process would change its weights by its own statistics"
        )
