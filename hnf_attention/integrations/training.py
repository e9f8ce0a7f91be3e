"""A monitor in somebody else's training loop: what the callbacks for all trainers have in common."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..diagnosis import AttentionDiagnosis
from ..interventions import apply_intervention
from ..monitoring.monitor import AttentionStabilityMonitor, Writer
from ..monitoring.process_groups import ProcessGroups

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

_log = logging.getLogger("hnf_attention")
TENSOR_PARALLEL = ("tp", "tensor_parallel")  # the mesh dimension's name in transformers, and in Lightning

# Monitors at work, by model. A training that ends by an exception may not tell its callbacks.
_running: weakref.WeakKeyDictionary[nn.Module, weakref.ref] = weakref.WeakKeyDictionary()

#: Each optimizer with its scheduler, a list of schedulers, or None.
Optimizers = Sequence[tuple[torch.optim.Optimizer, Any]]


class TrainingCallback:
    """Watches the attention of the model that a trainer trains, and treats it if asked to.

    log_every: every that many optimizer steps is a log step, whatever the gradient accumulation.
        None for as often as the trainer itself logs.
    record_every, sample, writers: as for `AttentionStabilityMonitor`. In a process group only the main process
        writes.
    ranks: as for `AttentionStabilityMonitor`. None: all processes of the run hold parts of the batch, or parts of
        the heads along the dimension of the trainer's mesh that is named for tensor parallelism.
    auto_intervene: at a log step, after the optimizer's step, carry out what the monitor proposes: QK-clip or
        a temperature on weights, a lower learning rate, more attention dropout. The learning rate is scaled in the
        parameter groups and in the schedulers' base rates, which scales the whole rest of the schedule.

    monitor: the `AttentionStabilityMonitor` of the latest training, None before the first; its `applied` holds
        what was done. last_diagnosis: the latest diagnosis, or None.

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
        ranks: ProcessGroups | None = None,
    ):
        self.monitor: AttentionStabilityMonitor | None = None
        self.last_diagnosis: AttentionDiagnosis | None = None
        self._log_every = log_every
        self._record_every = record_every
        self._writers = list(writers)
        self._auto_intervene = auto_intervene
        self._sample = sample
        self._ranks = ranks
        self._measures_next = False  # whether the step to come is to be measured

    def __repr__(self) -> str:
        state = "no training yet" if self.monitor is None else repr(self.monitor)
        return f"{type(self).__name__}({state})"

    def restore(self) -> None:
        """End the monitoring; interventions stay applied. Safe to call twice."""
        if self.monitor is not None:
            _running.pop(self.monitor.model, None)
            self.monitor.restore()

    def _begin(
        self, model: nn.Module, log_every: int, step: int, main: bool, mesh: DeviceMesh | None = None
    ) -> None:
        """Training begins at that step; `log_every` and the mesh of its processes are the trainer's own."""
        self.restore()
        left = _running.pop(model, lambda: None)()
        if left is not None:
            _log.warning("ending the attention monitor that an earlier training of this model left behind")
            left.restore()
        self.monitor = AttentionStabilityMonitor(
            model,
            log_every=log_every if self._log_every is None else self._log_every,
            record_every=self._record_every,
            writers=self._writers if main else (),
            auto_intervene=self._auto_intervene,
            sample=self._sample,
            step=step,
            ranks=self._ranks or _groups_of(mesh),
        )
        _running[model] = weakref.ref(self.monitor)
        self.last_diagnosis = None
        self._measures_next = self.monitor.instrumentation.measuring
        self._rest()

    def _resume(self) -> None:
        """A batch of the step to come is about to run."""
        if self.monitor is not None:
            self.monitor.instrumentation.measuring = self._measures_next

    def _rest(self) -> None:
        """What runs from here on is not training, or not known to be."""
        if self.monitor is not None:
            self.monitor.instrumentation.measuring = False

    def _end_step(self, optimizers: Optimizers) -> AttentionDiagnosis | None:
        """The optimizers have made a step, and no forward of the next one has run."""
        if self.monitor is None:
            return None
        diagnosis = self.monitor.on_step()
        self._measures_next = self.monitor.instrumentation.measuring
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
        if rest is None or rest["action"] not in ("reduce_lr", "increase_dropout"):
            return
        try:
            for optimizer, scheduler in optimizers if rest["action"] == "reduce_lr" else [(None, None)]:
                done = apply_intervention(optimizer, rest, scheduler=scheduler)
                monitor.applied.append(done)
                _log.warning(
                    "intervened at step %d: %s (%s)", diagnosis.step, done.description, rest["reason"]
                )
        except Exception:  # of whatever kind: training goes on without
            self._auto_intervene = False
            _log.warning("the attention monitor intervenes no more: %s failed", rest["action"], exc_info=True)


def _groups_of(mesh: DeviceMesh | None) -> ProcessGroups | None:
    """The processes of the run; the trainer's mesh tells which of them share a layer's heads."""
    if mesh is not None:
        for name in TENSOR_PARALLEL:
            if name in (mesh.mesh_dim_names or ()) and mesh[name].size() > 1:
                return ProcessGroups.of_mesh(mesh, heads=name)
    return ProcessGroups.of_world()


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside of data parallelism, whose layers have the names that people know."""
    while isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        model = model.module
    return model
