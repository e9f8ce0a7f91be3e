"""Rows whose keys are all hidden."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from ...statistics.heads import Snapshot
from ..extent import counted
from ..heads import Heads
from ..issue import StabilityIssue
from .wording import make_issue


def rule(history: Sequence[Snapshot], heads: Heads) -> Iterator[StabilityIssue]:
    """A note for each layer with such rows, padding aside, whose output is finite. `non_finite` tells of NaN in it."""
    empty, stats = heads.stats.empty_rows, heads.stats
    if not empty.any():
        return
    kind = stats.score_kind
    finite = heads.in_layer(stats.nonfinite_empty > 0) == 0
    for number in np.unique(heads.layer[(empty > 0) & finite]).tolist():
        inside = heads.layer == number
        rows, layer = empty[inside].sum(), heads.layers[number]
        share = rows / (rows + stats.rows[inside].sum())
        mask = mask_of(kind[inside])
        evidence = (
            f"the keys of {counted(rows, 'row')} ({share:.1%}) are all hidden at step {history[-1].step}, by {mask}; "
            "such rows have no softmax, and their output is finite here"
        )
        suggestion = (
            "give each of these rows a key to see, or make sure that nothing reads their output: SDPA gives zeros, a "
            "softmax over -inf gives NaN"
        )
        brief = f"the keys of {counted(rows, 'row')} are all hidden, by {mask} -> give each row a key to see"
        yield make_issue("empty_rows", "note", (layer, None), rows, "empty_rows", evidence, suggestion, brief)


def mask_of(score_kind: np.ndarray) -> str:
    """Where the hiding comes from, as far as `HeadStats.score_kind` knows it."""
    if (score_kind == 1).any():
        return "an additive mask"
    if (score_kind == 2).any():
        return "the mask or the scores themselves"
    return "a boolean mask, a window or the causal rule"
