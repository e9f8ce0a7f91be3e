"""Faults on purpose: `FaultInjector().fail("fold", step=3)` makes one stage of the monitor raise in one training step.

    injector = FaultInjector().fail("fold", step=3).fail("writer", step=6, error=OSError("no room"))
    with injector:
        run = train(injector=injector)
    assert injector.raised == {"fold": 1, "writer": 1}

`train` runs the same tiny training with and without a monitor, so that the two can be compared bit by bit.
"""

from __future__ import annotations

import functools
import logging
import signal
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from hnf_attention import AttentionStabilityMonitor
from hnf_attention.diagnosis import judge
from hnf_attention.engine import fold
from hnf_attention.instrumentation import expected, handle, keeping, measurer, observer, patches
from hnf_attention.instrumentation.interceptors import sdpa
from hnf_attention.interventions import good_states, policy, scaling
from hnf_attention.monitoring import (
    accumulators,
    extremes,
    history,
    marks,
    monitor,
    notes,
    recorder,
)
from hnf_attention.run_log import recording, writer

#: Each stage as the places of the functions that do it; of a tuple of functions it is the first one.
STAGES: dict[str, tuple[tuple[Any, str], ...]] = {
    # of an attention call that is measured
    "find": ((observer, "measuring_owner"),),
    "describe": ((sdpa, "call_of"),),
    "probe": ((measurer.api, "attend"),),
    "context": ((fold, "beside"),),
    "deliver": ((measurer.Measurer, "_deliver"),),
    "accumulator": ((accumulators.Lane, "_new"),),
    "fold": ((fold, "fold"),),
    # of one that is kept
    "repeats": ((observer, "repeats"),),
    "find keeper": ((observer, "keeping_owner"),),
    "in short": ((sdpa, "_plain_of"),),
    "expect": ((expected.Expected, "begins"),),
    "take": ((expected.Expected, "take"),),
    "keep": ((keeping.Keeper, "add"),),
    "hand on": ((keeping.Keeper, "finish"),),
    "extremes": ((extremes.StepExtremes, "record"),),
    # of a forward
    "forward begins": ((recorder.Recorder, "begin_forward"),),
    "forward ends": ((recorder.Recorder, "end_forward"),),
    "lane": ((accumulators.Lane, "end"),),
    # of a step
    "cadence": ((recorder.Recorder, "_measure"),),
    "scalars": ((notes.Notes, "keep"),),
    "good states": ((good_states.TrainingState, "save"),),
    "marks": ((marks.Marks, "take"),),
    # of a log step
    "settle": ((accumulators.Lane, "settle"),),
    "copy": ((recorder, "_copy_to_host"),),
    "reset": ((accumulators.Lane, "reset"),),
    "history": ((history.History, "append"),),
    "coverage": ((handle, "Coverage"),),
    "rule": ((judge, "HEAD_RULES"),),
    "rule of the model": ((judge, "MODEL_RULES"),),
    "diagnosis": ((monitor, "diagnose"),),
    "logging": ((monitor, "log_transitions"),),
    "notes": ((notes.Notes, "hand_over"),),
    "run log": ((writer.RunLogWriter, "write"),),
    "proposal": ((policy.InterventionPolicy, "propose"),),
    "intervention": ((scaling.ScaleHeads, "_do"),),
    # of the thread that writes the run log
    "record": ((recording.Recording, "record"),),
    "disk": ((writer._Database, "add"),),
    "shrink": ((writer._Database, "shrink"),),
    # of the end
    "release": ((patches.Patch, "release"),),
}


class FaultInjector:
    """Makes stages raise. Each `fail` adds one fault; inside the `with` block they are in place.

    step: the training step, which the training tells by setting it. raised: how often each stage raised.
    hides: whether each stage raises an error of its own in the place of a signal handler's, as libraries do.
    """

    def __init__(self, hides: bool = False) -> None:
        self._hides = hides
        self.step = 0
        self.raised: Counter[str] = Counter()
        self._faults: dict[str, list[tuple[int | None, BaseException | signal.Signals]]] = {}
        self._undo: list[tuple[Any, str, Any]] = []

    def fail(
        self, stage: str, step: int | None = None, error: BaseException | signal.Signals | None = None
    ) -> FaultInjector:
        """Have the stage raise `error` at each of its calls in the step; None for each step, and a RuntimeError.

        A signal is sent to this process in place of an error. Raises KeyError for a stage that is none of STAGES.
        """
        STAGES[stage]
        self._faults.setdefault(stage, []).append((step, error or RuntimeError(f"a fault in {stage!r}")))
        return self

    def __enter__(self) -> FaultInjector:
        for stage in self._faults:
            for owner, name in STAGES[stage]:
                original = vars(owner)[name]
                self._undo.append((owner, name, original))
                if isinstance(original, tuple):
                    made: Any = (self._failing(stage, original[0]), *original[1:])
                else:
                    made = self._failing(stage, original)
                setattr(owner, name, made)
        return self

    def __exit__(self, *_: object) -> None:
        while self._undo:
            setattr(*self._undo.pop())

    def _interrupt(self, number: signal.Signals) -> None:
        try:
            signal.raise_signal(number)
        except BaseException:
            if not self._hides:
                raise
            raise RuntimeError("the library was interrupted") from None

    def _failing(self, stage: str, original: Any) -> Any:
        @functools.wraps(original)
        def failing(*args: Any, **kwargs: Any) -> Any:
            for step, error in self._faults[stage]:
                if step in (None, self.step):
                    self.raised[stage] += 1
                    if isinstance(error, signal.Signals):
                        self._interrupt(error)
                        continue
                    raise error.with_traceback(None)
            return original(*args, **kwargs)

        return failing


class Attention(nn.Module):
    """raises: in the next forward, after its attention has run."""

    def __init__(self, width: int = 16, heads: int = 2):
        super().__init__()
        self.heads, self.raises = heads, None
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        x = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        if self.raises is not None:
            error, self.raises = self.raises, None
            raise error
        return self.out(x.transpose(1, 2).flatten(2))


class Model(nn.Module):
    def __init__(self, layers: int = 2):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Attention() for _ in range(layers))

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x


@dataclass
class Run:
    """What a training gave. error: what came out of it. said: the lines of the log at WARNING or above."""

    model: nn.Module
    losses: list[float] = field(default_factory=list)
    diagnoses: list[Any] = field(default_factory=list)
    error: BaseException | None = None
    said: list[str] = field(default_factory=list)
    off: dict[str, str] = field(default_factory=dict)
    snapshots: list[int] = field(default_factory=list)

    def same_as(self, plain: Run) -> bool:
        """Whether weights and losses are equal bit by bit."""
        weights = zip(self.model.parameters(), plain.model.parameters(), strict=True)
        return self.losses == plain.losses and all(torch.equal(mine, theirs) for mine, theirs in weights)


class _Said(logging.Handler):
    def __init__(self, run: Run):
        super().__init__(logging.WARNING)
        self._run = run

    def emit(self, record: logging.LogRecord) -> None:
        self._run.said.append(record.getMessage())


def train(
    steps: int = 8,
    injector: FaultInjector | None = None,
    monitored: bool = True,
    before_step: Any = None,
    sharp: float = 1.0,
    states: bool = False,
    **options: Any,
) -> Run:
    """Train the model; before_step(model, step) may break it. options: of the monitor. states: keep `GoodStates`.

    An error that comes out ends the training, and is in the run.
    """
    model = Model()
    with torch.no_grad():
        for layer in model.layers:
            layer.qkv.weight[:32] *= sharp
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    run, random = Run(model), torch.Generator().manual_seed(1)
    said, log = _Said(run), logging.getLogger("hnf_attention")
    log.addHandler(said)
    made: Any = nullcontext()
    try:
        if monitored:
            kept = monitor.GoodStates(model, optimizer, every=2, keep=2, margin=2) if states else None
            made = AttentionStabilityMonitor(model, good_states=kept, **({"log_every": 2} | options))
        with made as watching:
            for step in range(1, steps + 1):
                if injector is not None:
                    injector.step = step
                if before_step is not None:
                    before_step(model, step)
                loss = model(torch.randn(2, 12, 16, generator=random)).square().mean()
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                run.losses.append(loss.item())
                if watching is not None:
                    run.diagnoses.append(watching.on_step(loss=loss))
                    run.off = {name: outage.reason for name, outage in watching.status.off.items()}
                    run.snapshots = [snapshot.step for snapshot in watching.history]
            if injector is not None:
                injector.step = 0
    except BaseException as error:
        run.error = error
    finally:
        log.removeHandler(said)
    return run
