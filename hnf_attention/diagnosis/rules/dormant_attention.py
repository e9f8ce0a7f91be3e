"""A model none of whose heads attends to anything but its sink."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from ...statistics.heads import Snapshot
from ..extent import counted
from ..heads import Heads
from ..issue import StabilityIssue
from ..thresholds import threshold
from .wording import make_issue


def rule(history: Sequence[Snapshot], groups: Sequence[Heads]) -> Iterator[StabilityIssue]:
    """One warning for the model if every judged head of every layer rests on its sink and lets no gradient through.

    Some such heads are normal. If all are, each layer gives every position the same output.
    """
    judged = [heads.stats.judged_rows > 0 for heads in groups]
    sink = np.concatenate([heads.stats.sink_mass[known] for heads, known in zip(groups, judged)])
    if not sink.size or not (sink > threshold("dormant_sink")).all():
        return
    share = np.concatenate([heads.stats.jacobian_trace_bound[known] for heads, known in zip(groups, judged)])
    if not (share < threshold("lost_gradient")).all():
        return
    evidence = (
        f"all {counted(sink.size, 'judged head')} of {counted(len(history[-1].layers), 'layer')} put at least "
        f"{sink.min():.1%} of their weight on their sink at step {history[-1].step}, and at most {share.max():.2g} of "
        "the softmax gradient gets through: attention copies one token to all positions"
    )
    suggestion = (
        "check that attention has learned anything: start anew with smaller query and key weights, a longer warm-up or "
        "QK-norm; in a finished model, check that its weights belong to this architecture and its text to it"
    )
    brief = (
        f"all {sink.size} judged heads put at least {sink.min():.1%} of their weight on their sink -> restart with "
        "smaller query and key weights, or QK-norm"
    )
    yield make_issue(
        "dormant_attention", "warning", ("", None), sink.min(), "dormant_sink", evidence, suggestion, brief
    )
