"""Watching a training run. A fault in here never ends it: the part that failed is logged, rests and is tried again."""

from __future__ import annotations

import logging
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..diagnosis import AttentionDiagnosis, StabilityIssue, diagnose
from ..diagnosis.ahead import Watch
from ..diagnosis.origin import first_seen
from ..diagnosis.thresholds import checked_thresholds, overridden
from ..diagnosis.triage import NonFiniteTrace
from ..errors import report
from ..instrumentation import Instrumentation, instrument
from ..interventions import Applied, GoodStates, Intervention, InterventionPolicy
from ..names import unwrapped
from ..replay import trace_non_finite
from ..statistics.heads import Mark, Snapshot
from . import state
from .history import HISTORY_BYTES
from .lines import log_transitions
from .notes import Notes
from .parts import MonitorStatus, Parts
from .ranks import AUTO, Ranks, resolve
from .recorder import NothingMeasured, Recorder
from .transitions import IssueTracker
from .treatment import Treatment, check_auto_intervene, check_good_states
from .writers import Writer, writer_part

_log = logging.getLogger("hnf_attention")

STATE_FORMAT = 1
NO_COVERAGE = "what was not measured could not be listed"


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

    log_every: every that many steps is a log step, which is measured, read and judged. So is a step in between if the
        extremes of the steps before it tell of growth that the last reading did not show; see `every_step`.
    record_every: which steps in between are measured as well: None for none, 1 for all, k for every k-th.
    writers: objects with a `write(diagnosis)` method, or callables; each gets every diagnosis. `restore()`
        calls the `close()` of those that have one. `hnf_attention.integrations` has some.
    auto_intervene: at a log step, carry out what the monitor proposes: on weights alone (QK-clip, temperature), and
        with `good_states` restarts and learning rates too. The rest is left to `get_intervention`. The readings that
        follow tell whether each is kept, was not enough, or is reverted: `applied` has the account.
    sample: as for `instrument`: where attention is probed, measure 1 of that many blocks of rows.
    step: how many steps were done before, for a run that resumes; numbers go on from there.
    ranks: the processes whose measurements are put together at each log step. "auto" takes all processes of
        torch.distributed, as in data parallelism; if the weights show that processes hold different heads, it warns
        once and takes each process alone. None takes this process alone. All must call `on_step()` equally often.
        One process alone writes, logs and calls `on_alert`: the first one of `ranks`.
    mode, attention_classes: as for `instrument`. "probe" leaves the model's outputs bit-identical.
    thresholds: other values for names of `hnf_attention.diagnosis.thresholds.THRESHOLDS`.
    on_alert: gets the list of the errors and warnings that are new or worse, at each log step with some.
    history_bytes: the most memory that `history` takes. Older snapshots are thinned when it is reached.
    every_step: take the extremes of the training steps that are not measured: the first NaN or inf, and lower bounds of
        the largest scores. See `HeadStats.between_max_logit` and what stands beside it.
    good_states: `GoodStates(model, optimizer)`, of which the monitor ends each step. Its schedulers are those of the
        run. In a run of one process, errors are then answered by a restart from one of them.

    A snapshot holds the forwards under grad since the last one, and evaluation forwards only if there was no other;
    `Snapshot.holds` says which. A forward that raised is left out. `with monitor.paused():` leaves out all inside.

    Raises ValueError or TypeError for bad arguments; `on_step` and `get_intervention` raise nothing.
    Issues are logged when they are new, worse, better or gone, a line for each group of heads; see
    `monitoring.transitions`. A part that fails is logged, and tried again after 1, 2, 4, ... log steps; see `status`.
    """

    def __init__(
        self,
        model: nn.Module,
        log_every: int = 100,
        record_every: int | None = None,
        writers: Iterable[Writer] = (),
        auto_intervene: bool = False,
        sample: int | None = None,
        step: int = 0,
        ranks: Ranks = AUTO,
        *,
        mode: str = "probe",
        attention_classes: Iterable[str | type[nn.Module]] = (),
        thresholds: Mapping[str, float] | None = None,
        on_alert: Callable[[list[StabilityIssue]], object] | None = None,
        history_bytes: int = HISTORY_BYTES,
        every_step: bool = True,
        good_states: GoodStates | None = None,
    ):
        writers = list(writers)
        self._writers = [writer_part(number, writer) for number, writer in enumerate(writers)]
        self._thresholds = checked_thresholds(thresholds)
        if on_alert is not None and not callable(on_alert):
            raise TypeError(f"expected on_alert to be None or a callable, got {on_alert!r}")
        self._on_alert = on_alert
        self.instrumentation: Instrumentation = instrument(
            model, mode=mode, sample=sample, attention_classes=attention_classes, holder=self
        )
        try:
            #: The model, without the wrappers of data parallelism.
            self.model = unwrapped(model)
            check_good_states(good_states, self.model, step)
            self._together, self._leads = resolve(ranks, self.model)
            groups = None if self._together is None else self._together.groups
            self.instrumentation.queries_split = groups is not None and groups.queries is not None
            if auto_intervene:
                check_auto_intervene(self._together)
            self._recorder = Recorder(
                self.instrumentation, log_every, record_every, step, self._together, history_bytes, every_step
            )
            self._treatment = Treatment(self.model, good_states, auto_intervene)
        except BaseException:
            self.instrumentation.restore()
            raise
        if self._together is not None:
            # A monitor that is dropped without `restore` leaves, too.
            weakref.finalize(self, self._together.leave, _ended()).atexit = False
        self._notes = Notes(writers if self._leads else ())
        self._tracker = IssueTracker()
        #: What may fail without ending the run.
        self.parts = Parts(log_every)
        self._told_of_nothing = False
        self._watch = Watch()

    def __repr__(self) -> str:
        cadence, off = self._recorder.cadence, self.parts.off
        return (
            f"AttentionStabilityMonitor of {type(self.model).__name__} at step {self.step}: "
            f"log_every {cadence.log_every}, record_every {cadence.record_every}, "
            f"{len(self.history)} snapshots, {len(self.applied)} interventions applied"
            f"{'; off: ' if off else ''}{', '.join(sorted(off))}"
        )

    @property
    def applied(self) -> deque[Applied]:
        """What auto_intervene did, newest last, each with its outcome and account."""
        return self._treatment.applied

    @property
    def history(self) -> Sequence[Snapshot]:
        """The snapshots that are kept, oldest first."""
        return self._recorder.history

    @property
    def step(self) -> int:
        """How many steps `on_step` has ended, and those done before."""
        return self._recorder.step

    @property
    def status(self) -> MonitorStatus:
        """Which parts of the monitor are off now, why, since which step, and when they are tried again.

        With the layers that could not be measured at the last attempt.
        """
        return MonitorStatus(self.parts.off, self.instrumentation.failing)

    def paused(self) -> AbstractContextManager[None]:
        """A context inside which nothing is measured, for an evaluation in the middle of training."""
        return self._recorder.paused()

    def on_step(
        self, loss: float | Tensor | None = None, grad_norm: float | Tensor | None = None
    ) -> AttentionDiagnosis | None:
        """End a training step: call it after `optimizer.step()`. Returns a diagnosis at log steps, else None.

        loss, grad_norm: of the step, for writers that keep them. A tensor is copied on its device, read at log steps.
        """
        try:
            return self._end_step(loss, grad_norm)
        except Exception as error:  # the monitor never ends a run
            report("a step could not be ended", error)
            return None

    def _end_step(
        self, loss: float | Tensor | None, grad_norm: float | Tensor | None
    ) -> AttentionDiagnosis | None:
        log_step, parts = self._recorder.end_step(), self.parts
        if loss is not None or grad_norm is not None:
            parts.run("scalars", self._notes.keep, self.step, {"loss": loss, "grad_norm": grad_norm})
        parts.run("good_states", self._treatment.end_step, self.step)
        if not log_step:
            marks = parts.run("marks", self._recorder.new_marks)
            if marks and parts.run("marks", self._is_urgent, marks):
                self._recorder.read_soon()
            return None
        parts.begin_log_step(self.step)
        if self.step % self._recorder.cadence.log_every == 0:
            self._watch.restart()
        snapshot = parts.run("recording", self._read)
        self._recorder.rest(parts.rests("recording", 1))
        if snapshot is None:
            return None
        diagnosis = parts.run("diagnosis", self._diagnose) or self._unjudged(snapshot)
        parts.run("logging", self._announce, diagnosis)
        parts.run("notes", self._notes.hand_over)
        for writer in self._writers if self._leads else ():
            writer.take(diagnosis)
            parts.run(writer.name, writer.write)
        parts.run("restarts", self._treatment.policy.see, diagnosis)
        if self._treatment.auto and not diagnosis.not_judged:
            parts.run("auto_intervene", self._treatment.act, diagnosis)
            parts.run("accounts", self._notes.account, self.step, self.applied)
        return diagnosis

    def get_intervention(self, diagnosis: AttentionDiagnosis | None) -> Intervention | None:
        """The fix for a diagnosis of this monitor, as a dict that `apply_intervention` takes; None for none.

        None for None, which `on_step` gives between log steps. With auto_intervene, what is left to do by hand.
        None if `ranks.heads` splits layers: the diagnosis then numbers heads over all processes, and this one holds
        the weights of some. None, too, once the processes' statistics are not put together any more: each would
        change its copy of the weights in another way.
        """
        if self._together is not None and (self._together.groups.heads or self._together.lost):
            return None
        return self.parts.run("advice", self._treatment.propose, diagnosis)

    def trace(
        self,
        batch: Any,
        loss: Callable[[Any], Tensor] | None = None,
        *,
        optimizer: torch.optim.Optimizer | None = None,
        scaler: torch.amp.GradScaler | None = None,
        wide: bool = True,
        folder: str | Path | None = None,
    ) -> NonFiniteTrace:
        """Run one step again, unmeasured, and say where NaN or inf begins; see `trace_non_finite`.

        A note of the answer says in which step the monitor first saw NaN or inf, if it did. Raises as
        `trace_non_finite` does.
        """
        with self.paused():
            found = trace_non_finite(
                self.model,
                batch,
                loss,
                optimizer=optimizer,
                scaler=scaler,
                wide=wide,
                folder=folder,
                step=self.step,
            )
        notes = [*found.notes, *first_seen(self.history)]
        if self.instrumentation.mode != "probe":
            notes.append(
                f"the trace ran the model's own attention, the monitor has mode={self.instrumentation.mode!r}"
            )
        return replace(found, notes=tuple(notes))

    def restore(self) -> None:
        """End the monitoring; the model runs its own attention. Interventions stay applied."""
        # Names of their own: parts that rest after a fault would be left out.
        self.parts.run("end of recording", self._recorder.stop)
        self.parts.run("last notes", self._notes.hand_over)
        if self._together is not None:
            self._together.leave(_ended())
        self.instrumentation.restore()
        self.parts.end("recording", "restore() was called")
        for writer in self._writers if self._leads else ():
            writer.end()
            self.parts.run(f"closing of {writer.name}", writer.close)
        self._writers = []

    def state_dict(self) -> dict[str, Any]:
        """What the monitor knows, as JSON types, for a checkpoint: steps, history, reported issues, advice given.

        With good states, also how many steps led to the weights: their `done`.
        """
        return {
            "format": STATE_FORMAT,
            "step": self.step,
            "done": self._treatment.done,
            "fields": state.fields(),
            "history": [state.dump(snapshot) for snapshot in self.history],
            "repeated": sorted(self._recorder.repeated),
            "issues": self._tracker.state_dict(),
            "policy": self._treatment.policy.state_dict(),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave in an earlier run; call it before the first step.

        A history of another version of this package, whose statistics have other fields, is left out with a warning.
        Good states that the monitor was given begin anew, at the step and with the `done` of the earlier run's.
        Raises ValueError for a dict that is no such state; the monitor is as it was then.
        """
        given = state_dict.get("format") if isinstance(state_dict, Mapping) else type(state_dict).__name__
        if given != STATE_FORMAT:
            raise ValueError(f"expected a state_dict of a monitor, of format {STATE_FORMAT}, got {given!r}")
        try:
            readable = state_dict["fields"] == state.fields()
            history = [state.load(snapshot) for snapshot in state_dict["history"]] if readable else []
            tracker, policy = IssueTracker(), InterventionPolicy(self.model)
            tracker.load_state_dict(state_dict["issues"])
            policy.load_state_dict(state_dict["policy"])
            done = state.checked_done(state_dict.get("done"))
            self._recorder.resume(state_dict["step"], history, state_dict["repeated"])
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"expected a state_dict of a monitor, got one with {error!r}") from None
        self._tracker, self._treatment.policy = tracker, policy
        self._treatment.resume(self.step, done)
        if not readable:
            _log.warning("the attention monitor's history is of another version, so it starts anew")

    def __enter__(self) -> AttentionStabilityMonitor:
        return self

    def __exit__(self, *_: object) -> None:
        self.restore()

    def _read(self) -> Snapshot | None:
        self._recorder.jumped |= self._treatment.jumped()
        try:
            return self._recorder.read()
        except NothingMeasured as problem:
            if not self._told_of_nothing and not self.instrumentation.failing:  # which was logged
                self._told_of_nothing = True
                _log.warning("nothing to report at step %d: %s", self._recorder.step, problem)
            return None
        finally:
            self._note_lost_processes()

    def _is_urgent(self, marks: Sequence[Mark]) -> bool:
        with overridden(self._thresholds):
            return self._watch.urgent(self.history, marks)

    def _diagnose(self) -> AttentionDiagnosis:
        coverage = self.parts.run("coverage", lambda: self.instrumentation.coverage)
        found = diagnose(self.history, coverage, self._thresholds, self.parts.run)
        return found if coverage is not None else replace(found, not_measured={"": NO_COVERAGE})

    def _unjudged(self, snapshot: Snapshot) -> AttentionDiagnosis:
        """The numbers alone, for those who keep them."""
        outage = self.parts.off.get("diagnosis")
        why = {"all": "judging failed" if outage is None else outage.reason}
        return AttentionDiagnosis(
            [],
            dict(snapshot.layers),
            snapshot.step,
            [snapshot],
            thresholds=self._thresholds,
            not_judged=why,
        )

    def _note_lost_processes(self) -> None:
        if self._together is None or self._together.lost is None or "ranks" in self.parts.off:
            return
        self.parts.end("ranks", self._together.lost)
        if self._treatment.auto:
            self._treatment.auto = False
            why = "each process would change its weights by its own statistics"
            self.parts.end("auto_intervene", why)
            _log.warning("the attention monitor intervenes no more: %s", why)

    def _announce(self, diagnosis: AttentionDiagnosis) -> None:
        news = self._tracker.update(diagnosis.issues, judged=not diagnosis.not_judged)
        if not self._leads:
            return
        alerts = [issue for issue in (*news.new, *news.worse) if issue.severity != "note"]
        if alerts and self._on_alert is not None:
            self.parts.run("on_alert", self._on_alert, alerts)
        log_transitions(news, diagnosis.step)


def _ended() -> str:
    ready = torch.distributed.is_available() and torch.distributed.is_initialized()
    who = f"process {torch.distributed.get_rank()}" if ready else "a process"
    return f"{who} ended its monitor"
