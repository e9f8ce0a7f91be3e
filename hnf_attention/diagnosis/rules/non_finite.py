"""Rows that NaN or inf reached."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from ...names import display_name
from ...statistics.heads import Snapshot
from ..heads import Heads
from ..issue import StabilityIssue
from .wording import head_name, make_issue


def rule(history: Sequence[Snapshot], heads: Heads) -> Iterator[StabilityIssue]:
    """Any row that is not finite is an error. The evidence names the layer that showed such rows first."""
    bad = heads.stats.nonfinite_rows
    if not bad.any():
        return
    total = heads.stats.rows + bad
    step, origin = _origin(history)
    for head in np.flatnonzero(bad).tolist():
        place = heads.places[head]
        share = bad[head] / total[head]
        where = "this layer is" if place[0] == origin else f"layer {display_name(origin)} was"
        evidence = (
            f"{head_name(place)}: {bad[head]:.0f} of {total[head]:.0f} rows ({share:.1%}) are not "
            f"finite at step {history[-1].step}; {where} the first to show it, at step {step}"
        )
        suggestion = (
            "restore the last checkpoint with finite weights, then lower the learning rate; "
            f"look for the overflow in {display_name(origin)} and in what feeds it"
        )
        yield make_issue("non_finite", "error", place, share, "nonfinite_rows", evidence, suggestion)


def _origin(history: Sequence[Snapshot]) -> tuple[int, str]:
    """Step and layer at which the latest run of snapshots with non-finite rows began.

    Of several layers in one snapshot, the first to run is the origin.
    """
    step, origin = history[-1].step, ""
    for snapshot in reversed(history):
        bad = (layer for layer, stats in snapshot.layers.items() if stats.nonfinite_rows.any())
        first = next(bad, None)
        if first is None:
            break
        step, origin = snapshot.step, first
    return step, origin
