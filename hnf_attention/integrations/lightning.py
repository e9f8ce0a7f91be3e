"""A monitor in Lightning's `Trainer`."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from .extras import require
from .series import overall
from .training import Optimizers, TrainingCallback

if TYPE_CHECKING:
    from lightning.pytorch import Callback
else:
    # Lightning's older name is a package of its own. Where both are installed, callbacks of one work in the other.
    _OLDER = find_spec("lightning") is None and find_spec("pytorch_lightning") is not None
    Callback = require("pytorch_lightning" if _OLDER else "lightning.pytorch", "lightning").Callback


class AttentionStabilityCallback(TrainingCallback, Callback):
    """For Lightning: `Trainer(..., callbacks=[AttentionStabilityCallback(auto_intervene=True)])`.

    Arguments and attributes are those of `TrainingCallback`; `log_every=None` takes the Trainer's
    `log_every_n_steps`. The whole model's numbers (`attn/normalized_entropy_min`, `attn/errors`, ...) go to the
    Trainer's loggers. A step is a batch after which an optimizer has stepped, also where a module steps
    several of them itself.
    """

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._optimizer_steps = trainer.global_step
        cadence = trainer.log_every_n_steps or 100  # 0: it logs nothing itself
        mesh = getattr(pl_module, "device_mesh", None)  # of ModelParallelStrategy; older versions have none
        step, main = _batches_that_stepped(trainer), trainer.is_global_zero
        self._begin(pl_module, cadence, step, main, mesh, _optimizers(trainer))

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._resume()

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # Not in on_before_zero_grad: Lightning calls that between forward and backward, where a change of
        # weights would break the gradient. Here the optimizer and its schedulers have stepped.
        if trainer.global_step == self._optimizer_steps:  # gradients are being accumulated
            return self._rest()
        self._optimizer_steps = trainer.global_step
        diagnosis = self._end_step(_optimizers(trainer))
        if diagnosis is not None:
            for logger in trainer.loggers:
                logger.log_metrics(overall(diagnosis), step=_batches_that_stepped(trainer))

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.restore()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self.restore()


def _batches_that_stepped(trainer: Any) -> int:
    """The axis of Lightning's own logs, which counts a batch once however many optimizers it steps."""
    return getattr(trainer.fit_loop.epoch_loop, "_batches_that_stepped", trainer.global_step)


def _optimizers(trainer: Any) -> Optimizers:
    return [(each, _schedulers(trainer, each)) for each in trainer.optimizers]


def _schedulers(trainer: Any, optimizer: Any) -> list[Any]:
    found = (config.scheduler for config in trainer.lr_scheduler_configs)
    return [scheduler for scheduler in found if getattr(scheduler, "optimizer", None) is optimizer]
