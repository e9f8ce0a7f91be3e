"""A monitor in somebody else's training loop: what the callbacks for all trainers have in common."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..diagnosis import AttentionDiagnosis, StabilityIssue
from ..interventions import GoodStates, Intervention, apply_intervention
from ..monitoring.history import HISTORY_BYTES
from ..monitoring.monitor import AttentionStabilityMonitor
from ..monitoring.process_groups import ProcessGroups
from ..monitoring.ranks import AUTO, Ranks
from ..monitoring.writers import Writer

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

_log = logging.getLogger("hnf_attention")
TENSOR_PARALLEL = ("tp", "tensor_parallel")  # the mesh dimension's name in transformers, and in Lightning

#: What a callback passes on to `GoodStates`; the rest is the trainer's.
STATE_OPTIONS = ("every", "keep", "margin", "rng")

#: Each optimizer with its scheduler, a list of schedulers, or None.
Optimizers = Sequence[tuple[torch.optim.Optimizer, Any]]


class TrainingCallback:
    """Watches the attention of the model that a trainer trains, and treats it if asked to.

    log_every: every that many optimizer steps is a log step, whatever the gradient accumulation.
        None for as often as the trainer itself logs.
    record_every, sample, writers, mode, attention_classes, thresholds, on_alert, history_bytes: as for
        `AttentionStabilityMonitor`. In a process group only the main process writes.
    ranks: as for `AttentionStabilityMonitor`. "auto": all processes of the run hold parts of the batch, or parts of
        the heads along the dimension of the trainer's mesh that is named for tensor parallelism.
    auto_intervene: at a log step, after the optimizer's step, carry out what the monitor proposes: QK-clip or
        a temperature on weights, a lower learning rate, more attention dropout. The learning rate is scaled in the
        parameter groups and in the schedulers' base rates, which scales the whole rest of the schedule.
    good_states: keep states of the run, as a `GoodStates` with these options (`every`, `keep`, `margin`, `rng`; {} for
        its defaults) of the trainer's model, optimizers and schedulers. Errors are then answered by restarts, which
        auto_intervene carries out; a trainer goes on with its batches. None keeps none.

    monitor: the `AttentionStabilityMonitor` of the latest training, None before the first; its `applied` holds
        what was done. states: its `GoodStates`, or None. last_diagnosis: the latest diagnosis, or None.

    Only training is measured: the monitor rests between an optimizer step and the next step's first batch,
    where trainers evaluate. At the end of training the model runs its own attention again; `restore()` does that
    at any other time. A trainer may not report that an exception ended a training. The model's next training
    then ends the old monitor.
    """

    def __init__(
        self,
        log_every: int | None = None,
        record_every: int | None = None,
        writers: Iterable[Writer] = (),
        auto_intervene: bool = False,
        sample: int | None = None,
        ranks: Ranks = AUTO,
        *,
        mode: str = "probe",
        attention_classes: Collection[str | type[nn.Module]] = (),
        thresholds: Mapping[str, float] | None = None,
        on_alert: Callable[[list[StabilityIssue]], object] | None = None,
        history_bytes: int = HISTORY_BYTES,
        good_states: Mapping[str, Any] | None = None,
    ):
        if good_states is not None and not (
            isinstance(good_states, Mapping) and good_states.keys() <= set(STATE_OPTIONS)
        ):
            raise ValueError(
                f"expected good_states to be None or a dict with some of {', '.join(STATE_OPTIONS)}, "
                f"got {good_states!r}"
            )
        self._good_states = good_states
        self.states: GoodStates | None = None
        self.monitor: AttentionStabilityMonitor | None = None
        self.last_diagnosis: AttentionDiagnosis | None = None
        self._log_every = log_every
        self._writers = list(writers)
        self._auto_intervene = auto_intervene
        self._ranks = ranks
        self._options: dict[str, Any] = {
            "record_every": record_every,
            "auto_intervene": auto_intervene,
            "sample": sample,
            "mode": mode,
            "attention_classes": attention_classes,
            "thresholds": thresholds,
            "on_alert": on_alert,
            "history_bytes": history_bytes,
        }
        self._pause: AbstractContextManager[None] | None = None  # while what runs is no training

    def __repr__(self) -> str:
        state = "no training yet" if self.monitor is None else repr(self.monitor)
        return f"{type(self).__name__}({state})"

    def restore(self) -> None:
        """End the monitoring, and free the kept states; interventions stay applied. Safe to call twice."""
        if self.monitor is not None:
            self.monitor.restore()
        if self.states is not None:
            self.states.remove()

    def _begin(
        self,
        model: nn.Module,
        log_every: int,
        step: int,
        main: bool,
        mesh: DeviceMesh | None = None,
        optimizers: Optimizers = (),
    ) -> None:
        """Training begins at that step; `log_every` and the mesh of its processes are the trainer's own."""
        self.restore()
        self.states = None
        if self._good_states is not None:
            schedulers = [one for _, given in optimizers for one in _as_list(given)]
            self.states = GoodStates(
                model,
                [optimizer for optimizer, _ in optimizers],
                scheduler=schedulers,
                step=step,
                **self._good_states,
            )
        self.monitor = AttentionStabilityMonitor(
            model,
            log_every=log_every if self._log_every is None else self._log_every,
            writers=self._writers if main else (),
            step=step,
            ranks=_groups_of(mesh) if self._ranks == AUTO else self._ranks,
            good_states=self.states,
            **self._options,
        )
        self.last_diagnosis = None
        self._pause = None
        self._rest()

    def _resume(self) -> None:
        """A batch of the step to come is about to run."""
        if self._pause is not None:
            self._pause.__exit__(None, None, None)
            self._pause = None

    def _rest(self) -> None:
        """What runs from here on is not training, or not known to be."""
        if self._pause is None and self.monitor is not None:
            self._pause = self.monitor.paused()
            self._pause.__enter__()

    def _end_step(self, optimizers: Optimizers) -> AttentionDiagnosis | None:
        """The optimizers have made a step, and no forward of the next one has run."""
        if self.monitor is None:
            return None
        diagnosis = self.monitor.on_step()
        self._rest()
        if diagnosis is not None:
            self.last_diagnosis = diagnosis
            if self._auto_intervene:
                self._carry_out_the_rest(self.monitor, diagnosis, optimizers)
        return diagnosis

    def _carry_out_the_rest(
        self, monitor: AttentionStabilityMonitor, diagnosis: AttentionDiagnosis, optimizers: Optimizers
    ) -> None:
        """What the monitor, which has changed the weights, leaves to those who have optimizers."""
        rest = monitor.get_intervention(diagnosis)
        if rest is not None and rest["action"] in ("reduce_lr", "increase_dropout"):
            chosen = optimizers if rest["action"] == "reduce_lr" else [(None, None)]
            monitor.parts.run("the trainer's interventions", _apply, monitor, rest, diagnosis.step, chosen)


def _apply(
    monitor: AttentionStabilityMonitor,
    intervention: Intervention,
    step: int,
    optimizers: Sequence[tuple[torch.optim.Optimizer | None, Any]],
) -> None:
    for optimizer, scheduler in optimizers:
        done = apply_intervention(optimizer, intervention, scheduler=scheduler)
        monitor.applied.append(done)
        _log.warning("intervened at step %d: %s (%s)", step, done.description, intervention["reason"])


def _as_list(scheduler: Any) -> list[Any]:
    if scheduler is None:
        return []
    return list(scheduler) if isinstance(scheduler, (list, tuple)) else [scheduler]


def _groups_of(mesh: DeviceMesh | None) -> Ranks:
    """The processes of the run; the trainer's mesh tells which of them share a layer's heads."""
    if mesh is not None:
        for name in TENSOR_PARALLEL:
            if name in (mesh.mesh_dim_names or ()) and mesh[name].size() > 1:
                return ProcessGroups.of_mesh(mesh, heads=name)
    return AUTO
