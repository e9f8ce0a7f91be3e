"""Advice by search: which changes make a design stable, and by what margin."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

from .. import theory
from . import rates
from .costs import Cost, cost
from .design import Design
from .moves import AFTER_TRAINING, Move, moves
from .predict import SAFE_RATIO, STABLE, VERDICTS, verdict, worst_layer
from .rounding import rounded_up

_LIMIT, _HELPFUL = 6, 3  # stable changes, and changes that only help, that are offered
_LEAST_HELP = 0.95  # a change helps if it leaves less than this share of sigma / sigma_c, or of the harm
_COARSE = 1.5  # doublings: further changes are not combined
_Judged = tuple[tuple[str, ...], "Neighbour"]


@dataclass(frozen=True)
class Neighbour:
    """A design near the one asked about.

    change: the change in words. Its numbers are rounded, and the rounded design is the one that was judged.
    sigma_ratio: of its worst layer. margin: SAFE_RATIO over it.
    verdict: what a check of this design says, at the same learning rate: "stable", "marginal" or "unstable".
    distance: how far the change goes, in doublings; QK-norm counts as 1, a soft-cap as 1.5.
    cost: what its attention costs, over what the design's costs; None if that was not asked.
    harm_probability: how often attention harmed such runs at that rate; None if the verdict counts no rate.
    """

    change: str
    sigma_ratio: float
    margin: float
    verdict: str
    distance: float
    cost: Cost | None = None
    harm_probability: float | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        harm = (
            "" if self.harm_probability is None else f"harm {self.harm_probability:.0%} at the learning rate"
        )
        if self.verdict == STABLE:
            text = f"{self.change}: sigma / sigma_c {self.sigma_ratio:.2f}, margin {self.margin:.2f}"
            return f"{text}, {harm}" if harm else text
        text = f"{self.change} helps but is not enough: still {self.verdict}, sigma / sigma_c {self.sigma_ratio:.2f}"
        if rates.verdict(self.harm_probability) == self.verdict:
            return f"{text}, {harm}"
        if self.margin >= 1.0:
            return f"{text}; the largest score is still too large"
        if self.margin == 0.0:  # the ratio is infinite
            return text
        return f"{text}; the spread of scores is {rounded_up(1.0 / self.margin):.3g} times the stable one"


def neighbours(
    design: Design,
    ratio: float | None = None,
    largest: float | None = None,
    *,
    trained: bool = False,
    plan: rates.TrainingPlan | None = None,
) -> list[Neighbour]:
    """Designs one or two changes away: the nearest stable ones, then those that help but are not enough.

    Of each kind of change, only the best is offered.
    ratio, largest: the design's own sigma / sigma_c and largest |score| (nats), if they were measured or read from
        weights. The prediction for each neighbour is then corrected by the same factor as the design's own.
    trained: leaves out changes that are only possible before training. They are also left out if the design's spread
        was measured, because no formula says how it depends on widths and weights.
    plan: the training run that each neighbour is judged for, as the design is. Widths whose runs are not known are
        left out if the design's own are.
    """
    plan = plan or rates.TrainingPlan()
    predicted = worst_layer(design)
    correction = [
        1.0 if known is None or guess == 0 else known / guess
        for known, guess in zip((ratio, largest), predicted, strict=True)
    ]
    now, largest_now = (x * factor for x, factor in zip(predicted, correction, strict=True))
    harm = rates.counted_harm(design, plan)
    by_spread, by_rate = verdict(now, largest_now), rates.verdict(harm)
    own = max(by_spread, by_rate, key=VERDICTS.index)
    # What the verdict rests on is what a change has to make smaller.
    rate_counts = by_rate != STABLE and by_rate == own

    def badness(found: Neighbour) -> float:
        return found.harm_probability or 0.0 if rate_counts else found.sigma_ratio

    worst = harm or 0.0 if rate_counts else now
    tried = [
        move for move in moves(design, now) if not (trained or design.spread) or move.knob in AFTER_TRAINING
    ]
    single = _best(_judged(design, tried, 1, correction, plan), badness)
    # Two changes are offered only if neither is enough alone.
    enough = {knobs[0] for knobs, found in single.items() if found.verdict == STABLE}
    coarse = [move for move in tried if move.distance <= _COARSE and move.knob not in enough]
    double = _best(_judged(design, coarse, 2, correction, plan), badness)
    stable = [found for found in (*single.values(), *double.values()) if found.verdict == STABLE]
    helpful = [
        found
        for found in single.values()
        if found.verdict != STABLE
        and badness(found) < _LEAST_HELP * worst
        and VERDICTS.index(found.verdict) <= VERDICTS.index(own)
    ]
    nearest = sorted(stable, key=lambda found: found.distance)[:_LIMIT]
    return nearest + sorted(helpful, key=badness)[:_HELPFUL]


def margins(design: Design, ratio: float) -> dict[str, float]:
    """How far each knob alone may go before sigma / sigma_c passes SAFE_RATIO, in closed form.

    temperature: the least T / sqrt(head_dim). init_std, d_model: the largest. seq_len: the least number of keys.
    """
    room = min(SAFE_RATIO / max(ratio, 1e-300), 1e100)
    found = {"temperature": design.relative_temperature / room}
    if not design.qk_norm and not design.spread:
        found["init_std"] = math.sqrt(design.query_std * design.key_std * room)
        found["d_model"] = design.d_model * room
    keys = min(design.keys(layer) for layer in range(design.n_layers))
    # sigma / sqrt(2 ln keys) is the ratio now, and sigma stays.
    exponent = math.log(keys) / room**2
    found["seq_len"] = math.exp(exponent) if exponent < 700 else math.inf
    return found


def explanation(design: Design, ratio: float, keys: int) -> str:
    """Why a design is not stable, in its own numbers."""
    critical = float(theory.critical_std(keys))
    factor = 1.0 if design.qk_norm else float(theory.row_spread(design.head_dim))
    temperature = design.relative_temperature * ratio / SAFE_RATIO
    text = (
        f"{design.d_model}-dim attention with {design.n_heads} heads at length {keys}: sigma / sigma_c is {ratio:.2f} "
        f"(stable up to {SAFE_RATIO:g}). In the sharpest row of a hundred the scores spread by "
        f"{ratio * critical:.2f} nats; up to {SAFE_RATIO * critical:.2f} nats are stable."
    )
    if factor > 1.3:
        text += f" That row spreads {factor:.2f} times the mean, because head_dim {design.head_dim} makes rows unequal."
    if math.isfinite(temperature):
        text += f" A temperature of {rounded_up(temperature):.3g} sqrt(head_dim) is enough."
    return text


def _judged(
    design: Design,
    tried: Sequence[Move],
    together: int,
    correction: Sequence[float],
    plan: rates.TrainingPlan,
) -> Iterable[_Judged]:
    """The knobs and the verdict of every combination of so many changes of different knobs."""
    counted = rates.counted_harm(design, plan) is not None
    for chosen in combinations(tried, together):
        knobs = tuple(move.knob for move in chosen)
        changed: Design | None = design
        for move in chosen:
            changed = None if changed is None else move.apply(changed)
        if changed is None or len(set(knobs)) < together:
            continue
        harm = rates.counted_harm(changed, plan)
        if counted and harm is None:  # leaving the rate out is no cure for it
            continue
        ratio, largest = (x * factor for x, factor in zip(worst_layer(changed), correction, strict=True))
        found = Neighbour(
            change=" and ".join(move.text for move in chosen),
            sigma_ratio=ratio,
            margin=SAFE_RATIO / max(ratio, 1e-300),
            verdict=max(verdict(ratio, largest), rates.verdict(harm), key=VERDICTS.index),
            distance=sum(move.distance for move in chosen),
            cost=cost(design, changed),
            harm_probability=harm,
        )
        yield knobs, found


def _best(
    judged: Iterable[_Judged], badness: Callable[[Neighbour], float]
) -> dict[tuple[str, ...], Neighbour]:
    """For each kind of change the nearest stable one, else the one of the least badness."""

    def order(found: Neighbour) -> tuple[bool, float]:
        return (False, found.distance) if found.verdict == STABLE else (True, badness(found))

    best: dict[tuple[str, ...], Neighbour] = {}
    for knobs, found in judged:
        other = best.get(knobs)
        if other is None or order(found) < order(other):
            best[knobs] = found
    return best
