"""Folds measurements into snapshots, and keeps the snapshots.

Measurements are folded on the device that they were made on. The host waits for a device once per log
step, for one packed copy of all layers' accumulators (one per device, where a model spans several).
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..engine import fold
from ..reference.fold import new_accumulator
from ..statistics.fields import SUM_FIELDS
from ..statistics.heads import HeadStats, Snapshot
from .cadence import Cadence
from .process_groups import Part, ProcessGroups

if TYPE_CHECKING:
    from ..instrumentation import Instrumentation, Measurement

HISTORY_LENGTH = 10_000  # snapshots kept; older ones are dropped

_SEEN = [SUM_FIELDS.index(name) for name in ("rows", "nonfinite_rows")]

_Kind = tuple[str, int, int, torch.dtype]  # layer, heads, head dimension, dtype


class NothingMeasured(RuntimeError):
    """A snapshot was asked for, and no attention was measured since the one before."""


class Recorder:
    """Folds an instrumented model's measurements into `Snapshot`s, at the steps that a `Cadence` says.

    log_every, record_every, step: as for `Cadence`, with its errors. On a step that is not measured the model
        runs its own attention.
    ranks: the processes whose statistics a snapshot puts together.
    """

    def __init__(
        self,
        instrumentation: Instrumentation,
        log_every: int = 100,
        record_every: int | None = None,
        step: int = 0,
        ranks: ProcessGroups | None = None,
    ):
        self.cadence = Cadence(log_every, record_every, step)
        self.pending = False  # whether anything was recorded since the last snapshot
        #: The last HISTORY_LENGTH snapshots, oldest first.
        self.history: deque[Snapshot] = deque(maxlen=HISTORY_LENGTH)
        self._instrumentation = instrumentation
        self._ranks = ranks
        self._names: dict[_Kind, str] = {}
        self._accumulators: dict[tuple[_Kind, torch.device], Tensor] = {}
        # The largest sample_period since the last snapshot, by name. If no Python has run since, it is that of
        # the snapshot before: replays of a captured graph are folded all the same.
        self._periods: dict[str, int] = {}
        self._recorded: set[str] = set()  # the names recorded since the last snapshot
        instrumentation.on_measure = _weakly(self)
        instrumentation.measuring = self.cadence.measures_next

    @property
    def step(self) -> int:
        """How many steps `advance()` has ended, and those done before."""
        return self.cadence.step

    def advance(self) -> Snapshot | None:
        """End the current step. Returns its snapshot if it was a log step, else None.

        Raises NothingMeasured at a log step if nothing was measured since the last snapshot. The step counts
        all the same, and the next one goes on.
        """
        log_step = self.cadence.end_step()
        self._instrumentation.measuring = self.cadence.measures_next
        return self.read() if log_step else None

    def read(self) -> Snapshot:
        """A snapshot of everything folded since the last one; folding starts anew after it.

        Raises NothingMeasured if there is nothing; the message holds the instrumentation's coverage if it never
        measured anything.
        """
        parts = self._parts() if self._ranks is None else self._ranks.combine(self._parts)
        layers = {part.name: part.stats for part in parts}
        if not layers:
            raise NothingMeasured(self._why_nothing())
        self.pending = False
        self._recorded.clear()
        snapshot = Snapshot(self.step, layers)
        self.history.append(snapshot)
        return snapshot

    def stop(self) -> None:
        """Measure no further step: `advance()` goes on counting, the model runs its own attention."""
        self.cadence.stop()
        self._instrumentation.measuring = False

    def record(self, measurement: Measurement) -> None:
        """Fold one attention call into its layer's accumulator, on the device, without waiting for it."""
        rows = measurement.rows.lse
        num_heads, device = rows.shape[1], rows.device
        kind = (measurement.layer, num_heads, measurement.head_dim, measurement.dtype)
        place = (kind, device)
        accumulator = self._accumulators.get(place)
        if accumulator is None:
            self._names.setdefault(kind, self._name(*kind))
            # Made inside inference mode, it could not be added to outside of it.
            with torch.inference_mode(False):
                accumulator = fold.new_accumulator(num_heads, device)
            self._accumulators[place] = accumulator
        if measurement.beside is not None:
            fold.fold_measured(accumulator, measurement.rows, measurement.beside)
        else:
            query, key, options = measurement.query, measurement.key, measurement.options
            assert query is not None and key is not None and options is not None  # for the type checker
            fold.fold(accumulator, query, key, measurement.rows, options, measurement.context)
        name = self._names[kind]
        earlier = self._periods[name] if name in self._recorded else 1
        self._periods[name] = max(earlier, measurement.sample_period)
        self._recorded.add(name)
        self.pending = True

    def _name(self, layer: str, heads: int, head_dim: int, dtype: torch.dtype) -> str:
        """The layer's name; further head counts, head dimensions or dtypes under it get names of their own.

        Such calls (a module reused with other shapes, an evaluation in another dtype) are different
        heads: folding them together would mean nothing. The first kind seen keeps the plain name.
        """
        taken = layer in self._names.values()
        return f"{layer} [{heads} heads of {head_dim}, {_text(dtype)}]" if taken else layer

    def _parts(self) -> list[Part]:
        """What was measured since the last snapshot, by layer; a layer on several devices is merged."""
        found: dict[str, HeadStats] = {}
        for kind, values in self._copy_to_host():
            if not values[_SEEN].any():
                continue  # known from an earlier snapshot, not run since
            name, (_, _, head_dim, dtype) = self._names[kind], kind
            stats = HeadStats(values, head_dim, _text(dtype), self._periods[name])
            found[name] = found[name].merge(stats) if name in found else stats
        return [Part(name, stats) for name, stats in found.items()]

    @torch.no_grad()
    def _copy_to_host(self) -> list[tuple[_Kind, np.ndarray]]:
        """The accumulators' values, (NUM_FIELDS, H) each, in the order layers first ran; all start anew."""
        packed: dict[torch.device, list[Tensor]] = {}
        for (_, device), accumulator in self._accumulators.items():
            packed.setdefault(device, []).append(accumulator)
        copies = {device: fold.collect(parts).cpu().numpy() for device, parts in packed.items()}
        empty = {device: new_accumulator(1, device) for device in packed}
        offsets = dict.fromkeys(copies, 0)
        read = []
        for (kind, device), accumulator in self._accumulators.items():
            start = offsets[device]
            offsets[device] += accumulator.shape[2]
            read.append((kind, copies[device][:, start : offsets[device]]))
            accumulator.copy_(empty[device])
        return read

    def _why_nothing(self) -> str:
        try:
            self._instrumentation.require_measured()
        except RuntimeError as error:
            return str(error)
        since = f"since the snapshot at step {self.history[-1].step}" if self.history else "so far"
        return f"expected a measured forward pass before step {self.step} is read, got none {since}"


def _weakly(recorder: Recorder) -> Callable[[Measurement], None]:
    """`recorder.record` without a reference cycle: an instrumentation ends when its last user is gone."""
    reference = weakref.ref(recorder)

    def on_measure(measurement: Measurement) -> None:
        alive = reference()
        if alive is not None:
            alive.record(measurement)

    return on_measure


def _text(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
