"""Watching a training run. A fault in here never ends it: the part that failed is logged once and switched off."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, ParamSpec, Protocol, TypeVar

import torch
from torch import nn

from ..diagnosis import AttentionDiagnosis, StabilityIssue, diagnose
from ..diagnosis.issue import grouped, heads_text
from ..errors import InputError
from ..instrumentation import Instrumentation, instrument
from ..interventions import Applied, Intervention, InterventionPolicy, apply_intervention, learning_rate
from ..names import display_name
from ..statistics.heads import Snapshot
from .process_groups import ProcessGroups
from .recorder import NothingMeasured, Recorder

_log = logging.getLogger("hnf_attention")
_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")

WEIGHT_ACTIONS = ("qk_clip", "temperature")  # what auto_intervene does without being asked


class DiagnosisWriter(Protocol):
    """What a monitor needs of a writer; a `close()` without arguments is called if there is one."""

    def write(self, diagnosis: AttentionDiagnosis, /) -> object:
        """Take a diagnosis."""


Writer = DiagnosisWriter | Callable[[AttentionDiagnosis], object]


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

    log_every: every that many steps is a log step, which is measured, read and judged.
    record_every: which steps in between are measured as well: None for none, 1 for all, k for every k-th.
    writers: objects with a `write(diagnosis)` method, or callables; each gets every diagnosis. `restore()`
        calls the `close()` of those that have one. `hnf_attention.integrations` has some.
    auto_intervene: at a log step, carry out what the monitor proposes on weights (QK-clip, temperature).
        Learning rates and dropout are left to `get_intervention`. What was done is in `applied`.
    sample: as for `instrument`: where attention is probed, measure 1 of that many blocks of rows.
    step: how many steps were done before, for a run that resumes; numbers go on from there.
    ranks: the processes whose measurements are put together at each log step. Without it, each process of a
        process group judges its own part of the batch. All of them must call `on_step()` equally often.

    A snapshot holds every measured forward since the last one. Evaluation counts like training, whatever
    `model.training` says: some fine-tunes train in eval mode. To leave an evaluation out, set
    `monitor.instrumentation.measuring = False` for it, and put the old value back after it.

    Raises ValueError or TypeError for bad arguments; `on_step` and `get_intervention` raise nothing.
    New issues are logged once per (layer, head, type), and again when a warning becomes an error.
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
        ranks: ProcessGroups | None = None,
    ):
        self._writers = [_writer_part(number, writer) for number, writer in enumerate(writers)]
        if auto_intervene:
            _check_auto_intervene(ranks)
        self.instrumentation: Instrumentation = instrument(model, sample=sample, holder=self)
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
        # The latest diagnosis that auto_intervene treated, and what of its fix is left to the user.
        self._left_over: tuple[AttentionDiagnosis, Intervention | None] | None = None
        self._announced: set[tuple[str, int | None, str, str]] = set()
        self._off: set[str] = set()  # parts that failed, or were ended
        self._told_of_nothing = False

    def __repr__(self) -> str:
        cadence, off = self._recorder.cadence, f"; off: {', '.join(sorted(self._off))}" if self._off else ""
        return (
            f"AttentionStabilityMonitor of {type(self.model).__name__} at step {self.step}: "
            f"log_every {cadence.log_every}, record_every {cadence.record_every}, "
            f"{len(self.history)} snapshots, {len(self.applied)} interventions applied{off}"
        )

    @property
    def history(self) -> Sequence[Snapshot]:
        """Snapshots so far, oldest first."""
        return self._recorder.history

    @property
    def step(self) -> int:
        """How many steps `on_step` has ended, and those done before."""
        return self._recorder.step

    def on_step(self) -> AttentionDiagnosis | None:
        """End a training step: call it after `optimizer.step()`. Returns a diagnosis at log steps, else None."""
        snapshot = self._guarded("recording", self._advance)
        if snapshot is None:
            return None
        diagnosis = self._guarded("diagnosis", diagnose, self.history, self.instrumentation.coverage)
        if diagnosis is None:
            return None
        self._guarded("logging", self._announce, diagnosis.issues)
        for writer in self._writers:
            self._guarded(writer.name, writer.write, diagnosis)
        if self._auto_intervene:
            self._guarded("auto_intervene", self._intervene, diagnosis)
        return diagnosis

    def get_intervention(self, diagnosis: AttentionDiagnosis) -> Intervention | None:
        """The fix for a diagnosis of this monitor, as a dict that `apply_intervention` takes; None for none.

        With auto_intervene, what is left to do by hand. None if `ranks.heads` splits layers: the diagnosis then
        numbers heads over all processes, and this one holds the weights of some.
        """
        if self._heads_are_split:
            return None
        if self._left_over is not None and self._left_over[0] is diagnosis:
            return self._left_over[1]
        return self._guarded("advice", self._policy.propose, diagnosis)

    def restore(self) -> None:
        """End the monitoring; the model runs its own attention. Interventions stay applied."""
        self._recorder.stop()
        self.instrumentation.restore()
        self._off.add("recording")
        for writer in self._writers:
            if writer.name not in self._off:  # one that failed was logged already
                self._guarded(f"closing of {writer.name}", writer.close)
        self._writers = []

    def __enter__(self) -> AttentionStabilityMonitor:
        return self

    def __exit__(self, *_: object) -> None:
        self.restore()

    def _guarded(
        self,
        part: str,
        action: Callable[_Arguments, _Result],
        *args: _Arguments.args,
        **kwargs: _Arguments.kwargs,
    ) -> _Result | None:
        """The action's result. None from its first failure on, which is logged."""
        if part in self._off:
            return None
        try:
            return action(*args, **kwargs)
        except Exception as error:  # of whatever kind: training goes on without this part
            self._off.add(part)
            explained = isinstance(error, InputError)  # its message is all that there is to say
            _log.warning(
                "the attention monitor switched its part %r off, which failed%s; training goes on",
                part,
                f": {error}" if explained else "",
                exc_info=not explained,
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
        factor = proposed.get("lr_factor")
        rest = None if factor is None else learning_rate.propose(factor, proposed["reason"])
        self._left_over = diagnosis, rest


class _WriterPart(NamedTuple):
    """A writer as a part of the monitor, with the name that it has in the log."""

    name: str
    write: Callable[[AttentionDiagnosis], object]
    close: Callable[[], object]


def _writer_part(number: int, writer: Writer) -> _WriterPart:
    write = getattr(writer, "write", writer)
    if not callable(write):
        raise TypeError(f"expected writers with a write(diagnosis) method, or callables, got {writer!r}")
    return _WriterPart(
        f"writer {number} ({type(writer).__name__})", write, getattr(writer, "close", lambda: None)
    )


def _key(issue: StabilityIssue) -> tuple[str, int | None, str, str]:
    return issue.layer, issue.head, issue.issue_type, issue.severity


def _check_auto_intervene(ranks: ProcessGroups | None) -> None:
    """Raise ValueError if the processes of a group would not all make the same change."""
    if _world_size() == 1:
        return
    if ranks is None or ranks.heads is not None or ranks.processes != _world_size():
        raise ValueError(
            "expected auto_intervene=False, or ranks=ProcessGroups(batch=<the group of all processes>), "
            f"got ranks={ranks}: each process would change its weights by its own statistics"
        )


def _world_size() -> int:
    ready = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if ready else 1
