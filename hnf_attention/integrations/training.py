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
from ..monitoring.monitor import AttentionStabilityMonitor
from ..monitoring.process_groups import ProcessGroups

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

_log = logging.getLogger("hnf_attention")
TENSOR_PARALLEL = ("tp", "tensor_parallel")  # the mesh dimension's name in transformers, and in Lightning

# Monitors at work, by model. A training that ends by an exception may not tell its callbacks.
_running: weakref.WeakKeyDictionary[nn.Module, weakref.ref] = weakref.WeakKeyDictionary()

Optimizers = Sequence[tuple[torch.optim.Optimizer, Any]]  # each with its scheduler, a list of them, or None


class TrainingCallback:
    """Watches the attention of the model that a trainer trains, and treats it if asked to.

    log_every: read out and judge every that many optimizer steps, whatever the gradient accumulation;
        None for as often as the trainer itself logs.
    record_every, sample: as for `AttentionStabilityMonitor`.
    writers: likewise; in a process group only the main process writes.
    ranks: as for `AttentionStabilityMonitor`; without them all processes of the run hold parts of the batch,
        or of the heads along the dimension of the trainer's mesh that is named for tensor parallelism.
    auto_intervene: at a log step, after the optimizer's step, carry out what the monitor proposes: QK-clip or
        a temperature on weights, and, since a trainer's optimizers and schedulers are at hand here, a lower
        learning rate (in the parameter groups, and in the base rates that schedulers compute from: the whole
        rest of the schedule is scaled) or more attention dropout.

    monitor: the `AttentionStabilityMonitor` of the latest training, None before the first; what was done is in
        its `applied`. last_diagnosis: the latest snapshot, or None.

    Only training is measured: the monitor rests between an optimizer step and the next step's first batch,
    where trainers evaluate. At the end of training the model runs its own attention again, `restore()` does it
    at any other time; where a trainer does not report that it was ended by an exception, the model's next
    training puts that right.
    """

    def __init__(
        self,
        log_every: int | None = None,
        record_every: int | None = None,
        writers: Iterable[Any] = (),
        auto_intervene: bool = False,
        sample: int | None = None,
        ranks: ProcessGroups | None = None,
    ):
        self.monitor: AttentionStabilityMonitor | None = None
        self.last_diagnosis: AttentionDiagnosis | None = None
        self._log_every = log_every
        self._writers = list(writers)
        self._auto_intervene = auto_intervene
        self._ranks = ranks
        self._options = {"record_every": record_every, "auto_intervene": auto_intervene, "sample": sample}
        self._measures_next = False  # whether the step to come is to be measured

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
            writers=self._writers if main else (),
            step=step,
            ranks=self._ranks or _ranks_of(mesh),
            **self._options,
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
        """What runs from here on is no training, or not known to be."""
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
                self._carry_out_the_rest(diagnosis, optimizers)
        return diagnosis

    def _carry_out_the_rest(self, diagnosis: AttentionDiagnosis, optimizers: Optimizers) -> None:
        """What the monitor, which has changed the weights, leaves to those who have optimizers."""
        rest = self.monitor.get_intervention(diagnosis)
        if rest is None or rest["action"] not in ("reduce_lr", "increase_dropout"):
            return
        try:
            for optimizer, scheduler in optimizers if rest["action"] == "reduce_lr" else [(None, None)]:
                done = apply_intervention(optimizer, rest, scheduler=scheduler)
                self.monitor.applied.append(done)
                _log.warning(
                    "intervened at step %d: %s (%s)", diagnosis.step, done.description, rest["reason"]
                )
        except Exception:  # of whatever kind: training goes on without
            self._auto_intervene = False
            _log.warning("the attention monitor intervenes no more: %s failed", rest["action"], exc_info=True)


def _ranks_of(mesh: DeviceMesh | None) -> ProcessGroups | None:
    """The processes of the run; those that share a layer's heads are known from the trainer's mesh."""
    names = mesh.mesh_dim_names or () if mesh is not None else ()
    for name in TENSOR_PARALLEL:
        if name in names and mesh[name].size() > 1:
            return ProcessGroups.of_mesh(mesh, heads=name)
    return ProcessGroups.of_world()


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside of data parallelism, whose layers have the names that people know."""
    while isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        model = model.module
    return model
