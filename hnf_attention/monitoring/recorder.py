"""Folds measurements into snapshots, and keeps the snapshots.

Measurements are folded on the device that they were made on. The host waits for a device once per log
step, for one packed copy of all layers' accumulators (one per device, where a model spans several).
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..engine import fold
from ..names import call_name
from ..statistics.fields import SUM_FIELDS
from ..statistics.heads import Forwards, HeadStats, Mark, Snapshot
from .accumulators import Kind, Lane, Lanes
from .agreement import Together
from .cadence import Cadence
from .extremes import StepExtremes, decoded, with_steps
from .graphs import GraphStates
from .history import HISTORY_BYTES, History
from .marks import MARK_EVERY, Marks
from .process_groups import CallName, Part, Reading

if TYPE_CHECKING:
    from ..instrumentation import Instrumentation, Measurement
    from ..instrumentation.keeping import KeptForward

_SEEN = [SUM_FIELDS.index(name) for name in ("rows", "left_out_rows", "empty_rows", "nonfinite_rows")]


class NothingMeasured(RuntimeError):
    """A snapshot was asked for, and no attention was measured since the one before."""


class Recorder:
    """Folds an instrumented model's measurements into `Snapshot`s, at the steps that a `Cadence` says.

    log_every, record_every, step: as for `Cadence`, with its errors. On a step that is not measured the model
        runs its own attention.
    together: puts the statistics of several processes together; None for this process alone.
    history_bytes: as for `History`, with its errors.
    every_step: take the extremes of the steps that are not measured.

    A snapshot holds forwards under grad only, if there was one since the last snapshot; else the evaluation forwards.
    A forward that raised is dropped. Calls of one layer in one forward are kept apart: from the first time that a
    layer is called twice, its calls are `layer#0`, `layer#1`, ....
    """

    def __init__(
        self,
        instrumentation: Instrumentation,
        log_every: int = 100,
        record_every: int | None = None,
        step: int = 0,
        together: Together | None = None,
        history_bytes: int = HISTORY_BYTES,
        every_step: bool = False,
    ):
        self.cadence = Cadence(log_every, record_every, step)
        self._every_step = every_step
        self.pending = False  # whether anything was recorded since the last snapshot
        self.jumped = False  # whether the run was taken to another state since then
        #: The snapshots that are kept, oldest first.
        self.history = History(history_bytes)
        self.repeated: set[str] = set()  # layers that a forward called more than once
        self._instrumentation = instrumentation
        self._together = together
        self._lanes = Lanes()
        self._extremes = StepExtremes()
        # Of one process alone: all processes have the same log steps.
        marked = every_step and together is None and log_every >= 2 * MARK_EVERY
        self._marks = Marks(self._extremes, self._kind_text) if marked else None
        self._lock = threading.Lock()  # of all that is below
        self._kinds: dict[Kind, str] = {}  # in the order of their first calls, with what their names end in
        # The largest sample_period since the last snapshot. If no Python has run since, it is that of the snapshot
        # before: replays of a captured graph are folded all the same.
        self._periods: dict[Kind, int] = {}
        self._recorded: set[Kind] = set()  # since the last snapshot
        self._forwards = Forwards()
        self._untold: set[int] = set()  # numbers of forwards since the last snapshot whose end nobody tells
        self._holds = 0  # how many `paused` and `rest` there are
        self._told = False  # whether a forward of this step was told of
        self._graphs = GraphStates(self._extremes, _weakly(self, Recorder._note_graphed))
        if instrumentation.sample is None:
            instrumentation.graphs = self._graphs
        instrumentation.on_measure = _weakly(self, Recorder.record)
        instrumentation.on_forward_begin = _weakly(self, Recorder.begin_forward)
        instrumentation.on_forward_end = _weakly(self, Recorder.end_forward)
        instrumentation.on_kept = _weakly(self, Recorder.record_kept)
        self._measure()

    @property
    def step(self) -> int:
        """How many steps `advance()` has ended, and those done before."""
        return self.cadence.step

    def advance(self) -> Snapshot | None:
        """End the current step. Returns its snapshot if it was a log step, else None.

        Raises NothingMeasured at a log step if nothing was measured since the last snapshot. The step counts
        all the same, and the next one goes on.
        """
        return self.read() if self.end_step() else None

    def end_step(self) -> bool:
        """Count a step. Returns whether it was a log step, whose snapshot `read` gives."""
        log_step = self.cadence.end_step()
        if self._graphs and not self._told:
            self._note_untold_graphs()
        self._told = False
        self._measure()
        return log_step

    def new_marks(self) -> tuple[Mark, ...]:
        """Take a mark if one is due. Returns the marks since the last snapshot, if one of them is news."""
        if self._marks is None or not self.cadence.running:
            return ()
        if self.step % MARK_EVERY == 0:
            self._marks.take(self.step)
        return self._marks.news()

    def read_soon(self) -> None:
        """Make the next step a log step."""
        self.cadence.soon = True
        self._measure()

    def read(self) -> Snapshot:
        """A snapshot of everything folded since the last one; folding starts anew after it.

        Raises NothingMeasured if there is nothing; the message holds the instrumentation's coverage if it never
        measured anything.
        """
        reading = self._read() if self._together is None else self._together.combine(self._read)
        chosen = [part for part in reading.parts if part.name.training] or reading.parts
        self.repeated |= {part.name.layer for part in reading.parts if part.name.call > 0}
        # Copies, because the values of all layers, of those left out too, are parts of one array, which would be kept.
        layers = {
            self._text(part.name): replace(part.stats, values=part.stats.values.copy()) for part in chosen
        }
        if not layers:
            raise NothingMeasured(self._why_nothing())
        marks = () if self._marks is None else self._marks.end()
        kept = () if self.jumped else marks  # some may be of the state that was left
        training = chosen[0].name.training
        snapshot = Snapshot(self.step, layers, training, reading.forwards, self.jumped, kept)
        self.jumped = False
        self.history.append(snapshot)
        return snapshot

    def resume(self, step: int, history: Sequence[Snapshot], repeated: Iterable[str]) -> None:
        """Go on from an earlier run. Raises ValueError as `Cadence` does; the recorder is as it was then."""
        cadence, kept, names = self.cadence.at(step), History(self.history.limit), set(repeated)
        kept.extend(history)
        self.cadence, self.history, self.repeated = cadence, kept, names
        with self._extremes.lock:  # of steps that the earlier run will do again
            self._extremes.restart()
        self._measure()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out every call inside the context."""
        self._holds += 1
        self._measure()
        try:
            yield
        finally:
            self._holds -= 1
            self._measure()

    def stop(self) -> None:
        """Measure no further step: `advance()` goes on counting, the model runs its own attention."""
        self.cadence.stop()
        self._measure()

    def rest(self, resting: bool) -> None:
        """Measure nothing until `rest(False)`; steps are counted."""
        self.cadence.resting = resting
        self._measure()

    def _measure(self) -> None:
        goes_on = self._holds == 0 and self.cadence.running
        self._instrumentation.measuring = goes_on and self.cadence.measures_next
        # A log step is looked at whole.
        log_step = self.step + 1 == self.cadence.next_log_step
        self._instrumentation.keeping = goes_on and self._every_step and not log_step
        with self._extremes.lock:
            number = self._extremes.forwards.next_number(self.step + 1)
        self._tell_graphs(number, training=True)

    def _tell_graphs(self, number: int, training: bool) -> None:
        now = self._instrumentation
        self._graphs.tell(number, training, statistics=now.measuring, extremes=now.keeping)

    def begin_forward(self, forward: Any) -> None:
        """Say to graphs what is wanted of a forward."""
        number = 0
        if forward.training:
            with self._extremes.lock:
                number = self._extremes.forwards.number(forward.number, self.step + 1)
        self._told |= forward.training
        self._tell_graphs(number, forward.training)

    def record(self, measurement: Measurement) -> None:
        """Fold one attention call into its layer's accumulator, on the device, without waiting for it."""
        rows, forward = measurement.rows.lse, measurement.forward
        training = True if forward is None else forward.training
        told = forward is not None and forward.ends  # else the call is kept at once
        layer, heads, head_dim = measurement.layer, rows.shape[1], measurement.head_dim
        kind = Kind(layer, measurement.call, training, heads, head_dim, measurement.dtype)
        lane = self._lanes.of(forward if told else None)
        if self._every_step and forward is not None and training:
            with self._extremes.lock:
                self._extremes.forwards.number(forward.number, self.step + 1)
        try:
            with self._lock:
                self._note(kind, measurement.sample_period)
                if not told:
                    self._note_untold(forward)
            accumulator = lane.accumulator((kind, rows.device))
            if measurement.beside is not None:
                fold.fold_measured(accumulator, measurement.rows, measurement.beside)
            else:
                query, key, options = measurement.query, measurement.key, measurement.options
                assert query is not None and key is not None and options is not None  # for the type checker
                fold.fold(accumulator, query, key, measurement.rows, options, measurement.context)
        finally:
            if not told:
                self._lanes.release(lane)

    def record_kept(self, kept: KeptForward) -> None:
        """Take in calls that were not measured, of one forward under grad."""
        with self._extremes.lock:
            prepared = kept.prepared.get(self)
            if prepared is None:
                kinds = [Kind(x.layer, x.call, True, x.heads, x.head_dim, x.dtype) for x in kept.calls]
                with self._lock:
                    for kind in kinds:
                        self._note(kind, 1)
                prepared = kept.prepared[self] = self._extremes.prepared(kinds, kept)
            self._extremes.record(prepared, kept, self.step + 1)

    def _note_graphed(self, kind: Kind) -> None:
        with self._lock:
            self._note(kind, 1)

    def _note_untold_graphs(self) -> None:
        """Count the forward of a step whose beginning and end nobody told, such as in a compiled training step.

        Whether there was one is known when it is read.
        """
        with self._extremes.lock:
            self._extremes.forwards.skip(self._graphs.number)
        if self._graphs.folds:
            with self._lock:
                self.pending = True
                self._count("training")

    def _note(self, kind: Kind, period: int) -> None:
        if kind not in self._kinds:
            # Calls with other head counts, head dimensions or dtypes (a module reused with other shapes) are different
            # heads: folding them together would mean nothing. The first kind seen keeps the plain name.
            taken = any(kind[:3] == other[:3] for other in self._kinds)
            shape = f" [{kind.num_heads} heads of {kind.head_dim}, {_text(kind.dtype)}]"
            self._kinds[kind] = shape if taken else ""
        earlier = self._periods[kind] if kind in self._recorded else 1
        self._periods[kind] = max(earlier, period)
        self._recorded.add(kind)

    def _note_untold(self, forward: Any) -> None:
        self.pending = True
        if forward is not None and forward.number not in self._untold:
            self._untold.add(forward.number)
            self._count("training" if forward.training else "evaluation")

    def _count(self, which: str) -> None:
        self._forwards = self._forwards._replace(**{which: getattr(self._forwards, which) + 1})

    def end_forward(self, forward: Any) -> None:
        """Keep what a forward's calls gave, or drop it if the forward raised."""
        failed, by_graphs = bool(forward.failed), self._graphs.folds
        self._graphs.end(failed)
        if not forward.training:  # what comes next may be a training forward that nobody tells of
            with self._extremes.lock:
                number = self._extremes.forwards.next_number(self.step + 1)
            self._tell_graphs(number, training=True)
        if not self._lanes.end(forward, failed) and not by_graphs:
            return  # nothing of it was measured
        which = "failed" if failed else "training" if forward.training else "evaluation"
        with self._lock:
            self._count(which)
            self.pending |= not failed

    def _read(self) -> Reading:
        """What was measured in this process since the last snapshot; a layer on several devices is merged."""
        found: dict[Kind, HeadStats] = {}
        with self._lanes.to_read() as lanes:
            self._graphs.settle()
            copied = _copy_to_host([*lanes, self._graphs.lane], self._extremes)
            with self._lock:
                forwards, self._forwards = self._forwards, Forwards()
                kinds, periods = dict(self._kinds), dict(self._periods)
                self._recorded.clear()
                self._untold.clear()
                self.pending = False
        for kind, folded, between in copied:
            # Otherwise it is known from an earlier snapshot, and did not run since.
            if folded[_SEEN].any():
                values = with_steps(folded, between)
                stats = HeadStats(values, kind.head_dim, _text(kind.dtype), periods[kind])
                found[kind] = found[kind].merge(stats) if kind in found else stats
        if not any(kind.training for kind in found):
            forwards = forwards._replace(training=0)  # a step held no forward that nobody told of
        ordered = [kind for kind in kinds if kind in found]
        return Reading([Part(CallName(*kind[:3], kinds[kind]), found[kind]) for kind in ordered], forwards)

    def _kind_text(self, kind: Kind) -> str:
        return self._text(CallName(*kind[:3], self._kinds[kind]))

    def _text(self, name: CallName) -> str:
        repeated = name.layer in self.repeated
        return f"{call_name(name.layer, name.call) if repeated else name.layer}{name.shape}"

    def _why_nothing(self) -> str:
        try:
            self._instrumentation.require_measured()
        except RuntimeError as error:
            return str(error)
        since = f"since the snapshot at step {self.history[-1].step}" if self.history else "so far"
        return f"expected a measured forward pass before step {self.step} is read, got none {since}"


@torch.no_grad()
def _copy_to_host(
    lanes: list[Lane], extremes: StepExtremes
) -> list[tuple[Kind, np.ndarray, np.ndarray | None]]:
    """What was folded, (NUM_FOLDED, H), and the extremes of other steps, (STEP_FIELDS, H), of each kind of call.

    What is read starts anew. The host waits for each device once.
    """
    folds: dict[torch.device, list[tuple[Kind, Tensor]]] = {}
    for lane in lanes:
        for (kind, device), accumulator in lane.working.items():
            folds.setdefault(device, []).append((kind, accumulator))
    with extremes.lock:
        results: dict[torch.device, list[tuple[Kind, Tensor]]] = {}
        for (kind, device), result in extremes.results({kind for of in folds.values() for kind, _ in of}):
            results.setdefault(device, []).append((kind, result))
        copies = []
        for device in folds:
            parts = [fold.collect([x for _, x in folds[device]])]
            if device in results:
                parts.append(torch.cat([x for _, x in results[device]], 1).to(parts[0]))
            flat = torch.cat([x.flatten() for x in parts]).cpu().numpy()
            copies.append((device, np.split(flat, [parts[0].numel()])))
        read: list[tuple[Kind, np.ndarray, np.ndarray | None]] = []
        done: set[Kind] = set()
        for device, (folded, found) in copies:
            between = dict(_columns(results[device], found)) if device in results else {}
            for kind, part in _columns(folds[device], folded):
                # A layer that did not run keeps its extremes for the next reading.
                known = part[_SEEN].any() and kind in between
                read.append((kind, part, decoded(between[kind], extremes.forwards) if known else None))
                if known:
                    done.add(kind)
        extremes.restart(done)
    for lane in lanes:
        lane.reset()
    return read


def _columns(kinds: list[tuple[Kind, Tensor]], flat: np.ndarray) -> Iterator[tuple[Kind, np.ndarray]]:
    """The columns of each kind in an array (fields * sum of their heads)."""
    widths = np.cumsum([kind.num_heads for kind, _ in kinds])
    parts = np.split(flat.reshape(-1, widths[-1]), widths[:-1], axis=1)
    return zip((kind for kind, _ in kinds), parts)


def _weakly(recorder: Recorder, method: Callable[[Recorder, Any], None]) -> Callable[[Any], None]:
    """The recorder's method without a reference cycle: an instrumentation ends when its last user is gone."""
    reference = weakref.ref(recorder)

    def call(argument: Any) -> None:
        alive = reference()
        if alive is not None:
            method(alive, argument)

    return call


def _text(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
