"""Rows whose keys are all hidden."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from ...names import display_name
from ...statistics.heads import Snapshot
from ..extent import counted
from ..heads import Heads
from ..issue import StabilityIssue
from .wording import make_issue


def rule(history: Sequence[Snapshot], groups: Sequence[Heads]) -> Iterator[StabilityIssue]:
    """One note for all layers with such rows, padding aside, if their output is finite. `non_finite` tells of NaN."""
    if not any(heads.stats.empty_rows.any() for heads in groups):
        return
    empty = {
        layer: stats
        for layer, stats in history[-1].layers.items()
        if stats.empty_rows.any() and not stats.nonfinite_empty.any()
    }
    if not empty:
        return
    rows = sum(stats.empty_rows.sum() for stats in empty.values())
    share = rows / (rows + sum(stats.rows.sum() for stats in empty.values()))
    mask = mask_of(np.concatenate([stats.score_kind for stats in empty.values()]))
    first, last = next(iter(empty)), next(reversed(empty))
    where = f"layer {display_name(first)}"
    if len(empty) > 1:
        where = f"{counted(len(empty), 'layer')} ({display_name(first)} to {display_name(last)})"
    evidence = (
        f"the keys of {counted(rows, 'row')} ({share:.1%}) of {where} are all hidden at step {history[-1].step}, by "
        f"{mask}; such rows have no softmax, and their output is finite here"
    )
    suggestion = (
        "give each of these rows a key to see, or make sure that nothing reads their output: SDPA gives zeros, a "
        "softmax over -inf gives NaN"
    )
    brief = f"the keys of {counted(rows, 'row')} are all hidden, by {mask} -> give each row a key to see"
    place = (first if len(empty) == 1 else "", None)
    yield make_issue("empty_rows", "note", place, rows, "empty_rows", evidence, suggestion, brief)


def mask_of(score_kind: np.ndarray) -> str:
    """Where the hiding comes from, as far as `HeadStats.score_kind` knows it."""
    if (score_kind == 1).any():
        return "an additive mask"
    if (score_kind == 2).any():
        return "the mask or the scores themselves"
    return "a boolean mask, a window or the causal rule"
