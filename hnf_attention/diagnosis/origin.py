"""Where a NaN or inf came from, as far as the snapshots know it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ..names import display_name
from ..statistics.heads import HeadStats, Snapshot
from .issue import number_text
from .thresholds import threshold
from .trends import product_size

# Causes. The first five arise in the layer itself, from finite q, k and v; the first three whatever it has learned.
EMPTY, FP16, MASK = "empty rows", "fp16 product", "mask"
PRODUCT, OUTPUT = "product", "output"
SCORES, INPUT = "scores", "input"
NOT_LEARNED = (EMPTY, FP16, MASK)


class First(NamedTuple):
    """The first step between two snapshots in which a layer held NaN or inf, and what of it did.

    step, forward: numbers; see `HeadSteps`. heads: which. tensors: "query", "key", "value", "out", or some of them.
    """

    step: int
    forward: int
    heads: list[int]
    tensors: list[str]


class Origin(NamedTuple):
    """The first layer, in the order they ran, that is not finite, in the first snapshot of the latest run of such.

    before: the last finite layer that ran before it, None if it was the first. cause: one of the causes above: SCORES
    if its q and k are not known, INPUT if q, k or v are not finite themselves. coarse: steps between the last finite
    snapshot and this one, if there are several in which the weights may have changed; else 0. first: what the steps
    before the snapshot showed, None if they were finite or nothing was taken of them.
    """

    snapshot: Snapshot
    layer: str
    before: str | None
    cause: str
    coarse: int
    first: First | None = None

    @property
    def stats(self) -> HeadStats:
        return self.snapshot.layers[self.layer]

    @property
    def known(self) -> bool:
        """Whether the place is known. What arises from finite inputs is; broken inputs may have an older cause."""
        return self.cause not in (SCORES, INPUT) or not self.coarse


def find_origin(history: Sequence[Snapshot]) -> Origin | None:
    """Of the latest snapshot's NaN and inf; None if it has none."""
    found = None
    for place, snapshot in reversed(list(enumerate(history))):
        bad = next((layer for layer, stats in snapshot.layers.items() if broken_heads(stats).any()), None)
        if bad is None:
            break
        found = place, bad
        if snapshot.jumped:  # what was before belongs to a state that the run left
            break
    if found is None:
        return None
    place, layer = found
    snapshot = history[place]
    earlier = find_first(snapshot)
    if earlier is not None:
        layer, first = earlier
        cause = OUTPUT if first.tensors == ["out"] else INPUT
        return Origin(snapshot, layer, _before(snapshot, layer), cause, 0, first)
    covered = snapshot.step - history[place - 1].step if place else snapshot.step
    changing = getattr(snapshot, "training", True)  # the weights of a finished model stay as they are
    # Layers before it, too: one of them may have broken first.
    names = list(snapshot.layers)
    own = [snapshot.layers[name] for name in names[: names.index(layer) + 1]]
    every_step = all(np.isfinite(stats.between_max_logit).any() for stats in own)
    coarse = covered if changing and covered > 1 and not every_step else 0
    return Origin(snapshot, layer, _before(snapshot, layer), _cause(snapshot.layers[layer]), coarse)


def find_first(snapshot: Snapshot) -> tuple[str, First] | None:
    """The layer that was the first to hold NaN or inf in the steps before a snapshot; None if none did.

    Of the layers of one forward, it is the one that ran first.
    """
    numbers = {
        layer: np.fmin.reduce(stats.first_nonfinite_forward, initial=np.nan)
        for layer, stats in snapshot.layers.items()
    }
    known = {layer: number for layer, number in numbers.items() if np.isfinite(number)}
    if not known:
        return None
    layer = min(known, key=known.__getitem__)  # the first of equals
    stats, number = snapshot.layers[layer], known[layer]
    firsts = {
        "query": stats.first_nonfinite_query,
        "key": stats.first_nonfinite_key,
        "value": stats.first_nonfinite_value,
        "out": stats.first_nonfinite_out,
    }
    heads = np.flatnonzero(stats.first_nonfinite_forward == number)
    tensors = [name for name, first in firsts.items() if (first == number).any()]
    step = np.fmin.reduce(stats.first_nonfinite_step[heads])
    return layer, First(int(step), int(number), heads.tolist(), tensors)


def first_seen(history: Sequence[Snapshot]) -> list[str]:
    """One sentence on the layer and the step in which a run of NaN or inf was first seen; [] if none was."""
    origin = find_origin(history)
    if origin is None:
        return []
    layer = display_name(origin.layer)
    if origin.first is not None:
        heads = number_text(origin.first.heads)
        return [f"the monitor first saw it at step {origin.first.step}, in layer {layer},{heads}"]
    since = f", in one of the {origin.coarse} steps up to it" if origin.coarse else ""
    return [f"the monitor first saw it at step {origin.snapshot.step}{since}, in layer {layer}"]


def _before(snapshot: Snapshot, layer: str) -> str | None:
    """The layer that ran before this one."""
    names = list(snapshot.layers)
    return names[names.index(layer) - 1] if layer != names[0] else None


def broken_heads(stats: HeadStats) -> np.ndarray:
    """Heads, boolean (H,), with NaN or inf in q, k, v, the scores or the output."""
    return (stats.nonfinite_rows + stats.nonfinite_out + broken_inputs(stats)) > 0


def broken_inputs(stats: HeadStats) -> np.ndarray:
    """How many queries, keys and values of each head, (H,), hold NaN or inf."""
    return stats.nonfinite_query + stats.nonfinite_key + stats.nonfinite_value


def fp16_product(stats: HeadStats) -> tuple[np.ndarray, np.ndarray]:
    """|q.k| before the usual scale, (H,) each: the largest that was seen, and what no pair of tokens exceeds.

    The second counts pairs that a mask hides: their products are stored too. NaN where q or k is not known.
    """
    root = stats.head_dim**0.5
    return product_size(stats) * root, stats.score_magnitude * root


def _cause(stats: HeadStats) -> str:
    if broken_inputs(stats).any():
        return INPUT
    if stats.nonfinite_empty.any():
        return EMPTY
    bad = broken_heads(stats)
    products = np.stack(fp16_product(stats))[:, bad]
    if stats.dtype == "float16" and (products > threshold("fp16_product")).any():
        return FP16
    if not stats.nonfinite_rows.any():
        return OUTPUT
    if np.isnan(stats.query_norm[bad]).all():
        return SCORES
    return MASK if (stats.score_kind[bad] > 0).any() else PRODUCT
