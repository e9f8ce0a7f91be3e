"""A monitor in transformers' `Trainer`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..compat import device_mesh
from ..diagnosis import AttentionDiagnosis
from ..names import unwrapped
from .extras import require
from .series import overall
from .training import TrainingCallback

if TYPE_CHECKING:
    from transformers import TrainerCallback
else:
    TrainerCallback = require("transformers", "trainer").TrainerCallback


class AttentionStabilityCallback(TrainingCallback, TrainerCallback):
    """For transformers: `Trainer(..., callbacks=[AttentionStabilityCallback(auto_intervene=True)])`.

    Arguments and attributes are those of `TrainingCallback`; `log_every=None` takes the Trainer's `logging_steps`.
    The whole model's numbers (`attn/normalized_entropy_min`, `attn/errors`, ...) join the loss in
    `trainer.state.log_history` and in what is printed. The services of `report_to` have had their copy of the
    logs by then, so give those a writer: `WandbWriter()` logs to the Trainer's own run.
    """

    _logged: AttentionDiagnosis | None = None  # the latest one that is in the Trainer's logs

    def on_train_begin(
        self,
        args: Any,
        state: Any,
        control: Any,
        model: Any = None,
        optimizer: Any = None,
        lr_scheduler: Any = None,
        **_: Any,
    ) -> None:
        cadence = max(1, int(state.logging_steps))
        model = unwrapped(model)
        optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper runs no hooks
        optimizers = [(optimizer, lr_scheduler)]
        main, mesh = state.is_world_process_zero, device_mesh(model)
        self._begin(model, cadence, state.global_step, main, mesh, optimizers)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._resume()

    def on_optimizer_step(
        self, args: Any, state: Any, control: Any, optimizer: Any = None, lr_scheduler: Any = None, **_: Any
    ) -> None:
        self._end_step([(optimizer, lr_scheduler)])

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        latest = self.last_diagnosis
        if latest is not None and latest is not self._logged and "loss" in logs:  # not logs of an evaluation
            self._logged = latest
            numbers = overall(latest)
            logs.update(numbers)
            state.log_history[-1].update(numbers)  # a copy of `logs` that was made before

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.restore()
