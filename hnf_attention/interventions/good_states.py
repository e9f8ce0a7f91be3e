"""Good states of a training run, kept off the device, to which a run that went wrong can be taken back."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from ..names import unwrapped
from . import peers
from .optimizers import as_list
from .training_state import Slot, TrainingState

_log = logging.getLogger("hnf_attention")

#: Steps between a snapshot that is restored and the alarm. Of 57 failing runs of our own, most had left their healthy
#: twins 40 steps before the first error.
MARGIN = 40

_of_models: weakref.WeakKeyDictionary[nn.Module, weakref.ref[GoodStates]] = weakref.WeakKeyDictionary()


class GoodStates:
    """Keeps the latest states of a run, and takes the run back to one of them.

        states = GoodStates(model, optimizer, every=50, keep=3)
        for step, batch in enumerate(loader, 1):
            train_step(model, batch, optimizer)
            states.on_step(step)
            if alarm:
                states.rewind(before=step)

    Or give them to a monitor, `AttentionStabilityMonitor(model, good_states=states)`: it ends their steps.

    A state holds parameters, buffers and optimizer states, those of the scheduler if one is given, and the random
    generators' if `rng`. On CUDA it is copied to pinned host memory beside the training. The next `optimizer.step()`
    waits for the copy on the device; the host does not wait. At most keep + 2 states take host memory: see `bytes`. A
    state that holds NaN or inf is never restored.

    A rewind gives up steps, and `step` counts on. `done` counts what the weights have learnt: a run that is to have its
    planned length trains until `done` reaches it.

    every: a state is kept at each step that this number divides. keep: how many. The run can be taken back by at least
        (keep - 1) * every steps, which must not be less than `margin`.
    scheduler: one, or a list. With it, learning rates, betas, momenta and weight decays of the optimizers' groups go
        back too; else they stay what they are at the rewind.
    step: how many steps were done before. done: how many of them led to the weights; None for all. A resumed run
        takes both from its checkpoint. The state at the construction is kept too.

    Raises ValueError or TypeError for wrong arguments.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | Iterable[torch.optim.Optimizer],
        every: int = 50,
        keep: int = 3,
        *,
        margin: int = MARGIN,
        scheduler: Any = None,
        rng: bool = False,
        step: int = 0,
        done: int | None = None,
    ):
        if not isinstance(model, nn.Module):
            raise TypeError(f"expected model to be a torch.nn.Module, got {type(model).__name__}")
        for name, value, least in (
            ("every", every, 1),
            ("keep", keep, 1),
            ("margin", margin, 0),
            ("step", step, 0),
            ("done", step if done is None else done, 0),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"expected {name} to be an int >= {least}, got {value!r}")
        if done is not None and done > step:
            raise ValueError(f"expected done to be at most step, got done {done} and step {step}")
        if (keep - 1) * every < margin:
            raise ValueError(
                f"expected (keep - 1) * every >= margin, so that one state is always {margin} steps old, got "
                f"keep {keep} and every {every}"
            )
        optimizers = as_list(optimizer)
        if not optimizers:
            raise ValueError("expected an optimizer, got none")
        self.every, self.keep, self.margin = every, keep, margin
        self._optimizers = optimizers
        #: How often the run was taken to another state: rewinds, and those taken back.
        self.jumps = 0
        self._state = TrainingState(unwrapped(model), optimizers, scheduler, rng)
        self._slots: list[Slot] = []
        self._spare: list[Slot] = []
        self._before: Slot | None = None  # the state that the last rewind left
        me = weakref.ref(self)
        self._hooks = [x.register_step_pre_hook(lambda *_: _settle(me)) for x in optimizers]
        _of_models[unwrapped(model)] = me
        self._step, self._done = step, step if done is None else done
        self._take(step)

    def __repr__(self) -> str:
        return f"GoodStates(steps {self.steps}, every {self.every}, keep {self.keep}, {self.bytes / 2**30:.2f} GiB)"

    @property
    def steps(self) -> list[int]:
        """The steps of the states that are kept."""
        return [slot.step for slot in self._slots]

    @property
    def bytes(self) -> int:
        """Host memory of all states, those to be written next included."""
        before = [] if self._before is None else [self._before]
        return sum(slot.bytes for slot in (*self._slots, *self._spare, *before))

    @property
    def optimizers(self) -> list[torch.optim.Optimizer]:
        """The optimizers whose states are kept."""
        return list(self._optimizers)

    @property
    def model(self) -> nn.Module:
        """The model whose states are kept, without the wrappers of data parallelism."""
        return self._state.model

    @property
    def step(self) -> int:
        """The last step that was ended."""
        return self._step

    @property
    def done(self) -> int:
        """How many steps led to the present weights: `step`, less those that rewinds gave up."""
        return self._done

    @property
    def schedulers(self) -> list[Any]:
        """The schedulers whose states are kept. With one, a rewind restores the learning rates, too."""
        return list(self._state.schedulers)

    def on_step(self, step: int) -> None:
        """End a training step: call it after `optimizer.step()`, and after whatever else changes weights.

        A monitor that was given these states does it. Raises ValueError for what is no whole number.
        """
        _check_step(step)
        # A count that went back with the run goes on from there.
        self._done += step - self._step if step >= self._step else 1
        self._step = step
        if not self._slots or (step % self.every == 0 and step not in self.steps):
            self._take(step)

    def restart(self, step: int, done: int | None = None) -> None:
        """Forget all states: the run goes on from a checkpoint of that step. The next step's state is kept.

        done: how many steps led to the checkpoint's weights. None for all of them, or for the `done` that these states
        were made with for this very step.
        Raises ValueError for what is no whole number.
        """
        _check_step(step)
        for slot in self._slots:
            slot.wait()
        self._spare += self._slots
        self._slots, self._before = [], None
        if done is None:
            done = self._done if step == self._step else step
        self._step, self._done = step, done

    def settle(self) -> None:
        """Have the device finish all copies before the work that is queued after this; the host does not wait."""
        for slot in self._slots:
            slot.settle()

    def rewind(self, before: int) -> int:
        """Restore the newest good state that is at least `margin` steps older than step `before`, or that of step 0.

        Returns its step.

        The state before the first step of all, step 0, is old enough for any alarm.
        Every tensor keeps its identity and its memory. Later states are dropped. Gains of QK-norm that came to the
        model since go back to what they started at. Other parameters that came since stay as they are. Call it between
        two steps; every process of torch.distributed must.
        Raises ValueError if there is no such state, and has then changed nothing.
        """
        _check_step(before)
        chosen = self._choose(before)
        self.settle()
        left = self._before or self._free_slot()
        self._state.save(left, self._step, self._done)
        left.wait()
        self._before = left
        self._state.load(chosen)
        self._done = chosen.done
        self.jumps += 1
        self._spare += [slot for slot in self._slots if slot.step > chosen.step]
        self._slots = [slot for slot in self._slots if slot.step <= chosen.step]
        _log.warning(
            "went back to the state of step %d, %d steps before step %d",
            chosen.step,
            before - chosen.step,
            before,
        )
        return chosen.step

    def join(self, parameters: Iterable[nn.Parameter]) -> None:
        """Take parameters that come to the run now into the states of before: a rewind gives them these numbers."""
        held = [{id(p) for g in one.param_groups for p in g["params"]} for one in self._optimizers]
        slots = [*self._slots, *([] if self._before is None else [self._before])]
        for parameter in parameters:
            number = next((n for n, ids in enumerate(held) if id(parameter) in ids), 0)
            for slot in slots:
                slot.join(parameter, number)

    def chosen(self, before: int) -> int:
        """The step that `rewind` would restore. Raises ValueError as it does."""
        return self._choose(before).step

    def revert(self) -> int:
        """Take back the last rewind: restore the state that it left. Returns the step of that state.

        What was learnt since the rewind is lost. Raises ValueError if there was no rewind, or it was taken back.
        """
        if self._before is None:
            raise ValueError("expected a rewind to take back, got none")
        self.settle()
        step = self._before.step
        self._state.load(self._before)
        self._done = self._before.done
        self.jumps += 1
        self._spare.append(self._before)
        self._before = None
        return step

    def remove(self) -> None:
        """End the keeping, and free the memory."""
        while self._hooks:
            self._hooks.pop().remove()
        for slot in self._slots:
            slot.wait()
        self._slots, self._spare, self._before = [], [], None

    def _choose(self, before: int) -> Slot:
        old = [slot for slot in self._slots if slot.step <= max(before - self.margin, 0)]
        good = self._good(old)
        if not good:
            bad = f", of which {len(old)} hold NaN or inf" if old else ""
            raise ValueError(
                f"expected a good state at least {self.margin} steps before step {before}, got those of steps "
                f"{self.steps}{bad}"
            )
        return good[-1]

    def _take(self, step: int) -> None:
        if len(self._slots) >= self.keep:
            self._spare.append(self._slots.pop(0))
        slot = self._free_slot()
        self._state.save(slot, step, self._done)
        self._slots.append(slot)

    def _free_slot(self) -> Slot:
        """A slot to write to: its memory is used again."""
        slot = self._spare.pop() if self._spare else Slot()
        slot.wait()
        return slot

    def _good(self, slots: Sequence[Slot]) -> list[Slot]:
        """Those without NaN and inf, and there, in every process. All processes have to ask."""
        everyone = peers.gathered({slot.step: slot.finite for slot in slots})
        return [slot for slot in slots if all(theirs.get(slot.step, False) for theirs in everyone)]


def of_model(model: nn.Module) -> GoodStates | None:
    """The states that are kept of a model, None for none."""
    reference = _of_models.get(unwrapped(model))
    return None if reference is None else reference()


def settle(model: nn.Module) -> None:
    """Have copies of a model's states end before weights change; see `GoodStates.settle`."""
    states = of_model(model)
    if states is not None:
        states.settle()


def name_checkpoint(steps: Iterable[int], before: int, why: str, margin: int = MARGIN) -> str:
    """Which of a user's own checkpoints to restore, in words: "step 1,200, before head 2 left its peers".

    steps: of the checkpoints that there are. before: the step of the alarm. why: what happened then.
    Raises ValueError if none is `margin` steps older.
    """
    kept = sorted(steps)
    old = [step for step in kept if step <= before - margin]
    if not old:
        raise ValueError(
            f"expected a checkpoint at least {margin} steps before step {before:,}, got those of steps {kept}"
        )
    return f"step {old[-1]:,}, before {why}"


def _check_step(step: Any) -> None:
    """Raise ValueError unless it is a whole number, also one of NumPy or in a tensor."""
    if isinstance(step, bool) or not hasattr(step, "__index__"):
        raise ValueError(f"expected a step number, got {step!r}")


def _settle(reference: weakref.ref[GoodStates]) -> None:
    states = reference()
    if states is not None:
        states.settle()
