"""One training run of the demo, watched by the monitor exactly as a user would watch theirs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from ...diagnosis import AttentionDiagnosis
from ...errors import InputError
from ...interventions import GoodStates, apply_intervention
from ...monitoring.monitor import AttentionStabilityMonitor
from ...run_log import RunLogWriter
from ...statistics.heads import Snapshot
from .loss import FINAL_WINDOW
from .model import GPT, HELD_OUT_BYTES, TEXT_BYTES, batches, held_out_loss, standard_library_text

STATES_EVERY, STATES_KEPT = 20, 4  # so that one is always 40 steps old


@dataclass(frozen=True)
class Config:
    """The demo's model, and the training recipe that breaks it.

    The learning rate warms up to a peak that is ten times too high. The attention temperature is a sixteenth of
    the usual one. So the scores run away while the loss still falls.
    """

    seed: int = 0
    steps: int = 400
    layers: int = 4
    width: int = 64
    heads: int = 4
    context: int = 64
    batch_size: int = 16
    peak_learning_rate: float = 3e-2
    warmup_steps: int = 200
    sharpness: float = 16.0  # 1 / attention temperature, in units of the usual one
    log_every: int = 5
    device: str = "cpu"

    def __post_init__(self) -> None:
        least = max(FINAL_WINDOW, self.log_every)
        if self.steps < least:
            raise InputError(f"expected at least {least} steps, got {self.steps}")


# The same story from a smaller model in less time. It needs as many steps as a stall of the loss takes to show: of ten
# seeds, two had none in 300 steps, and the last one showed at step 330.
QUICK = Config(
    layers=2,
    width=48,
    context=32,
    batch_size=8,
    peak_learning_rate=5e-2,
    warmup_steps=150,
    log_every=10,
)


@dataclass
class Run:
    """The results of one run.

    losses: losses[i] is the loss of step i + 1. lost_steps: of them, those that rewinds gave up. held_out_loss: at the
    end, on text that no run trains on; NaN before. interventions: step and intervention.
    first_issue, first_error: the first diagnosis with an issue of any severity, and with an error.
    """

    treated: bool
    losses: list[float] = field(default_factory=list, repr=False)
    first_issue: AttentionDiagnosis | None = field(default=None, repr=False)
    first_error: AttentionDiagnosis | None = field(default=None, repr=False)
    last_diagnosis: AttentionDiagnosis | None = field(default=None, repr=False)
    history: list[Snapshot] = field(default_factory=list, repr=False)
    interventions: list[tuple[int, dict[str, Any]]] = field(default_factory=list, repr=False)
    lost_steps: int = 0
    held_out_loss: float = math.nan


Observer = Callable[[Run, AttentionDiagnosis | None], None]


class Training:
    """The model with its optimizer, schedule and data, all from the seed of the configuration."""

    def __init__(self, config: Config) -> None:
        self.config = config
        torch.manual_seed(config.seed)
        model = GPT(config.layers, config.width, config.heads, config.context, config.sharpness)
        self.model = model.to(config.device)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=config.peak_learning_rate, weight_decay=0.0
        )
        self.scheduler = torch.optim.lr_scheduler.LinearLR(
            self.optimizer, start_factor=1 / config.warmup_steps, total_iters=config.warmup_steps - 1
        )
        text = standard_library_text(TEXT_BYTES + HELD_OUT_BYTES)
        self._data = batches(text[:TEXT_BYTES], config.batch_size, config.context, config.seed)
        self._held_out = text[TEXT_BYTES:]

    def step(self) -> float:
        """Train one step. Returns its loss, nats per byte."""
        inputs, targets = (part.to(self.config.device) for part in next(self._data))
        loss = F.cross_entropy(self.model(inputs).flatten(0, 1), targets.flatten())
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.scheduler.step()
        return loss.item()

    def held_out_loss(self) -> float:
        """The loss on text that no run trains on, nats per byte."""
        return held_out_loss(self.model, self._held_out, self.config.context)


def train(config: Config, treated: bool, observe: Observer, writer: RunLogWriter | None = None) -> Run:
    """Train from the seed; if `treated`, apply what the monitor proposes. `observe` is called after each step.

    A treated run makes up for the steps that a rewind gave up, as a run does that goes on from a checkpoint: the
    weights of both runs have `config.steps` steps behind them.

    writer: keeps the run with its losses and interventions.
    """
    training = Training(config)
    model, optimizer = training.model, training.optimizer
    states = None
    if treated:
        states = GoodStates(model, optimizer, STATES_EVERY, STATES_KEPT, scheduler=training.scheduler)
    writers = [] if writer is None else [writer]
    monitor = AttentionStabilityMonitor(model, config.log_every, writers=writers, good_states=states)
    run = Run(treated)
    while len(run.losses) - run.lost_steps < config.steps:
        run.losses.append(training.step())
        diagnosis = monitor.on_step(loss=run.losses[-1])
        if diagnosis is not None:
            run.last_diagnosis = diagnosis
            if diagnosis.has_issues():
                run.first_issue = run.first_issue or diagnosis
                if diagnosis.errors:
                    run.first_error = run.first_error or diagnosis
                intervention = monitor.get_intervention(diagnosis) if treated else None
                if intervention:
                    done = apply_intervention(optimizer, intervention)
                    run.interventions.append((diagnosis.step, dict(intervention)))
                    if writer is not None:
                        action, text = intervention["action"], done.description
                        writer.event(diagnosis.step, "intervention", action=action, text=text)
        if states is not None:
            run.lost_steps = states.step - states.done
        observe(run, diagnosis)
    run.history = list(monitor.history)
    monitor.restore()
    run.held_out_loss = training.held_out_loss()
    return run
