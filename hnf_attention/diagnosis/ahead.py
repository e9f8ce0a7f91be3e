"""Whether what was seen since the last snapshot calls for a reading before its time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..statistics.fields import MAX_FIELDS, NUM_FIELDS, NUM_SUMS
from ..statistics.heads import HeadStats, Mark, Snapshot
from .heads import concatenate_heads

_RANGE, _KIND = (NUM_SUMS + MAX_FIELDS.index(name) for name in ("logit_range", "score_kind"))


#: Readings before their time between two regular ones, at most: enough for a line through full readings.
MOST_EARLY = 5


class Watch:
    """Says when a reading is due before its time."""

    def __init__(self) -> None:
        self._asked = 0  # for readings since the last regular one

    def restart(self) -> None:
        """A regular reading was made."""
        self._asked = 0

    def urgent(self, history: Sequence[Snapshot], marks: Sequence[Mark]) -> bool:
        """Whether the marks tell of more than the readings do. They are of some rows: a reading has to confirm it."""
        if self._asked >= MOST_EARLY:
            return False
        now = urgency_of_marks(history, marks)
        due = now > (urgency(history) if now and history else 0)
        self._asked += due
        return due


def urgency(history: Sequence[Snapshot], marks: bool = False) -> int:
    """What the scores of the last snapshot amount to: 2 for an alarm, 1 for a warning of growth, 0 for neither.

    marks: as for `concatenate_heads`.
    """
    groups = concatenate_heads(history, history[-1].layers, marks)
    if any(heads.alarming.any() for heads in groups):
        return 2
    return int(any(heads.grown.any() for heads in groups))


def urgency_of_marks(history: Sequence[Snapshot], marks: Sequence[Mark]) -> int:
    """Likewise, if the latest of these marks were the snapshot. marks: those since the last snapshot, oldest first.

    A mark holds lower bounds, so that a reading may say more.
    """
    latest = marks[-1]
    known = history[-1].layers if history else {}
    layers = {name: _stats(ranges, known.get(name)) for name, ranges in latest.ranges.items()}
    return urgency([*history, Snapshot(latest.step, layers, marks=tuple(marks[:-1]))], marks=True)


def _stats(ranges: np.ndarray, known: HeadStats | None) -> HeadStats:
    """Statistics that hold these ranges and nothing else. known: of the last snapshot; a bias in it is no score."""
    values = np.zeros((NUM_FIELDS, len(ranges)))
    values[NUM_SUMS:] = -np.inf
    values[_RANGE], values[_KIND] = ranges, 0.0
    if known is None or known.num_heads != len(ranges):
        return HeadStats(values, 1, "float32")
    values[_RANGE] = np.where(known.score_kind > 0, -np.inf, ranges)
    return HeadStats(values, known.head_dim, known.dtype)
