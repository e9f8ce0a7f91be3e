"""Watching a training run. Nothing in here may end it: a fault is logged once and its part switched off."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from ..diagnosis import AttentionDiagnosis, StabilityIssue, diagnose
from ..diagnosis.issue import grouped, heads_text
from ..errors import InputError
from ..instrumentation import Instrumentation, instrument
from ..interventions import Applied, Intervention, InterventionPolicy, apply_intervention
from ..interventions.intervention import reduce_lr
from ..names import display_name
from ..statistics.heads import Snapshot
from .process_groups import ProcessGroups
from .recorder import NothingMeasured, Recorder

_log = logging.getLogger("hnf_attention")

WEIGHT_ACTIONS = ("qk_clip", "temperature")  # what auto_intervene does without being asked


class AttentionStabilityMonitor:
    """Measures a model's attention while it trains, reports issues, proposes fixes.

        monitor = AttentionStabilityMonitor(model, log_every=100)
        for batch in loader:
            loss = train_step(model, batch)
            diagnosis = monitor.on_step()                 # None between log steps
            if diagnosis and diagnosis.has_issues():
                intervention = monitor.get_intervention(diagnosis)
                if intervention:
                    apply_intervention(optimizer, intervention)

    log_every: read out and judge every that many steps.
    record_every: which steps in between are measured as well: None for none, 1 for all, k for every k-th.
    writers: objects with a `write(diagnosis)` method, or callables; each gets every diagnosis. `restore()`
        calls the `close()` of those that have one. `hnf_attention.integrations` has some.
    auto_intervene: at a log step, carry out what the monitor proposes on weights (QK-clip, temperature);
        learning rates and dropout are left to `get_intervention`. What was done is in `applied`.
    sample: as for `instrument`: where attention is probed, measure 1 of that many blocks of rows.
    step: how many steps were done before, where a run resumes: their numbers go on from there.

    A snapshot is made of every forward since the `on_step()` before it that was measured: evaluation counts
    like training, whatever `model.training` says (a fine-tune may well train in eval mode). To leave an
    evaluation out, set `monitor.instrumentation.measuring = False` for it and put its old value back.

    ranks: the processes whose measurements are put together at each log step; without them each process of a
        process group judges its own part of the batch. All of them must call `on_step()` equally often.

    Raises ValueError or TypeError for bad arguments; `on_step` and `get_intervention` raise nothing.
    New issues are logged once per (layer, head, kind), and again when a warning becomes an error.
    """

    def __init__(
        self,
        model: nn.Module,
        log_every: int = 100,
        record_every: int | None = None,
        writers: Iterable[Any] = (),
        auto_intervene: bool = False,
        sample: int | None = None,
        step: int = 0,
        ranks: ProcessGroups | None = None,
    ):
        self._writers = [_writer(number, writer) for number, writer in enumerate(writers)]
        if auto_intervene:
            _check_auto_intervene(ranks)
        self.instrumentation: Instrumentation = instrument(model, sample=sample)
        try:
            self._recorder = Recorder(self.instrumentation, log_every, record_every, step, ranks)
        except ValueError:
            self.instrumentation.restore()
            raise
        #: What auto_intervene did, newest last.
        self.applied: deque[Applied] = deque(maxlen=1_000)
        self.model = model
        self._policy = InterventionPolicy(model)
        self._auto_intervene = auto_intervene
        self._heads_are_split = ranks is not None and ranks.heads is not None
        self._left_over: tuple[AttentionDiagnosis, Intervention | None] | None = None
        self._announced: set[tuple[str, int | None, str, str]] = set()
        self._off: set[str] = set()  # parts that failed, or were ended
        self._told_of_nothing = False

    @property
    def history(self) -> Sequence[Snapshot]:
        """Snapshots so far, oldest first."""
        return self._recorder.history

    @property
    def step(self) -> int:
        """How many steps `on_step` has ended, and those done before."""
        return self._recorder.step

    def on_step(self) -> AttentionDiagnosis | None:
        """End a training step: call it after `optimizer.step()`. A diagnosis at log steps, else None."""
        snapshot = self._guarded("recording", self._advance)
        if snapshot is None:
            return None
        diagnosis = self._guarded("diagnosis", diagnose, self.history, self.instrumentation.coverage)
        if diagnosis is None:
            return None
        self._guarded("logging", self._announce, diagnosis.issues)
        for name, write, _ in self._writers:
            self._guarded(name, write, diagnosis)
        if self._auto_intervene:
            self._guarded("auto_intervene", self._intervene, diagnosis)
        return diagnosis

    def get_intervention(self, diagnosis: AttentionDiagnosis) -> Intervention | None:
        """The fix for a diagnosis of this monitor, as a dict that `apply_intervention` takes; None for none.

        With auto_intervene, what is left of it to do by hand. None where `ranks.heads` splits layers.
        """
        if self._heads_are_split:
            return None  # the diagnosis numbers heads over all processes; the weights here are of some
        if self._left_over is not None and self._left_over[0] is diagnosis:
            return self._left_over[1]
        return self._guarded("advice", self._policy.propose, diagnosis)

    def restore(self) -> None:
        """End the monitoring; the model runs its own attention. Interventions stay applied."""
        self._recorder.stop()
        self.instrumentation.restore()
        self._off.add("recording")
        for name, _, close in self._writers:
            if name not in self._off:  # one that failed has had its line in the log
                self._guarded(f"closing of {name}", close)
        self._writers = []

    def __enter__(self) -> AttentionStabilityMonitor:
        return self

    def __exit__(self, *_: object) -> None:
        self.restore()

    def _guarded(self, part: str, action: Callable[..., Any], *arguments: Any) -> Any:
        """The action's result; None once it has failed, after one line in the log."""
        if part in self._off:
            return None
        try:
            return action(*arguments)
        except Exception as error:  # of whatever kind: training goes on without this part
            self._off.add(part)
            told = isinstance(error, InputError)  # says all there is to say
            _log.warning(
                "the attention monitor goes on without its part %r, which failed%s",
                part,
                f": {error}" if told else "",
                exc_info=not told,
            )
            return None

    def _advance(self) -> Snapshot | None:
        try:
            return self._recorder.advance()
        except NothingMeasured as problem:
            if not self._told_of_nothing:
                self._told_of_nothing = True
                _log.warning("nothing to report at step %d: %s", self._recorder.step, problem)
            return None
        except Exception:
            self._recorder.stop()
            raise

    def _announce(self, issues: list[StabilityIssue]) -> None:
        new = [issue for issue in issues if _key(issue) not in self._announced]
        for group in grouped(new):
            worst = group[0]
            level = logging.ERROR if worst.severity == "error" else logging.WARNING
            message = "%s in %s%s: %s -> %s"
            where = display_name(worst.layer), heads_text(group)
            _log.log(level, message, worst.issue_type, *where, worst.evidence, worst.suggestion)
        for issue in new:
            self._announced.add(_key(issue))
            if issue.severity == "error":  # a later fall back to a warning is no news
                self._announced.add((*_key(issue)[:3], "warning"))

    def _intervene(self, diagnosis: AttentionDiagnosis) -> None:
        proposed = self._policy.propose(diagnosis)
        self._left_over = diagnosis, proposed
        if proposed is None or proposed["action"] not in WEIGHT_ACTIONS:
            return
        on_weights = Intervention({k: v for k, v in proposed.items() if k != "lr_factor"})
        done = apply_intervention(None, on_weights, self.model)
        self.applied.append(done)
        _log.warning("intervened at step %d: %s (%s)", diagnosis.step, done.description, proposed["reason"])
        slower = proposed.get("lr_factor")
        self._left_over = diagnosis, None if slower is None else reduce_lr(slower, proposed["reason"])


def _key(issue: StabilityIssue) -> tuple[str, int | None, str, str]:
    return issue.layer, issue.head, issue.issue_type, issue.severity


def _check_auto_intervene(ranks: ProcessGroups | None) -> None:
    """Raise ValueError where the processes of a group would not all make the same change."""
    if _world_size() == 1:
        return
    if ranks is None or ranks.heads is not None or ranks.processes != _world_size():
        raise ValueError(
            "expected auto_intervene=False, or ranks=ProcessGroups(batch=<the group of all processes>): each process "
            f"would change its weights by its own statistics, got ranks={ranks}"
        )


def _world_size() -> int:
    ready = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if ready else 1


def _writer(number: int, writer: Any) -> tuple[str, Callable[[AttentionDiagnosis], Any], Callable[[], Any]]:
    """Its name, and what writes and closes it."""
    write = getattr(writer, "write", writer)
    if not callable(write):
        raise TypeError(f"expected writers with a write(diagnosis) method, or callables, got {writer!r}")
    return f"writer {number} ({type(writer).__name__})", write, getattr(writer, "close", lambda: None)
