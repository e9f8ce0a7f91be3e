"""Judging snapshots by the thresholds that a user chose."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence

from ..diagnosis import AttentionDiagnosis, diagnose
from ..diagnosis.thresholds import THRESHOLDS
from ..instrumentation import Coverage
from ..statistics.heads import Snapshot


class Judge:
    """`diagnose` with other thresholds.

    thresholds: name of a threshold to its value; those that are not named keep theirs.
    Raises ValueError for an unknown name or a value that is no finite number.
    """

    def __init__(self, thresholds: Mapping[str, float] | None = None) -> None:
        self._thresholds = dict(thresholds or {})
        for name, value in self._thresholds.items():
            if name not in THRESHOLDS:
                close = difflib.get_close_matches(str(name), THRESHOLDS, n=3) or sorted(THRESHOLDS)
                raise ValueError(f"expected names of thresholds, such as {', '.join(close)}; got {name!r}")
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise ValueError(f"expected the threshold {name!r} to be a finite number, got {value!r}")

    def __call__(self, history: Sequence[Snapshot], coverage: Coverage) -> AttentionDiagnosis:
        """Judge the latest snapshot in the light of the earlier ones."""
        options = {"thresholds": self._thresholds} if self._thresholds else {}
        return diagnose(history, coverage, **options)
