"""Design advice by search: which change of heads, width, temperature, ... makes a design stable, with what margin."""

from __future__ import annotations

import decimal
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np

from .. import theory
from .design import Design
from .predict import SAFE_RATIO, largest_score, sigma_ratio, verdict

_SOFTCAPS = (50.0, 30.0, 20.0, 10.0)
_STEPS = (-3, -2, -1, 1, 2, 3)  # powers of two by which sizes are changed
AFTER_TRAINING = ("temperature", "qk_norm", "softcap", "seq_len")
_LEAST_HEAD_DIM = 8  # fewer make rows unequal, and kernels need 8 or 16


@dataclass(frozen=True)
class Neighbour:
    """A design near the one asked about.

    change: in words; its numbers are rounded, and are those that were judged. sigma_ratio: of its worst layer.
    margin: SAFE_RATIO over it. verdict: what a check of the design says: "stable", "marginal" or "unstable".
    distance: how far it is, in doublings; QK-norm counts as one, a soft-cap as one and a half.
    """

    change: str
    sigma_ratio: float
    margin: float
    verdict: str
    distance: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        if self.verdict == "stable":
            return f"{self.change}: sigma / sigma_c {self.sigma_ratio:.2f}, margin {self.margin:.2f}"
        text = f"{self.change} helps but is not enough: still {self.verdict}, sigma / sigma_c {self.sigma_ratio:.2f}"
        if self.margin >= 1.0:
            return f"{text}, whose largest score is too large"
        if self.margin == 0.0:  # the ratio is infinite
            return text
        return f"{text}, scores {up(1.0 / self.margin):.3g} times as spread as is stable"


@dataclass(frozen=True)
class _Move:
    knob: str
    text: str
    design: Design
    distance: float


def worst_ratio(design: Design) -> float:
    return max(sigma_ratio(design, layer) for layer in _different_layers(design))


def _largest(design: Design) -> float:
    return max(largest_score(design, layer) for layer in _different_layers(design))


def _different_layers(design: Design) -> range:
    return range(design.n_layers if design.layer_scale or design.windows else 1)


def up(x: float) -> float:
    """To three significant digits, of the number as it is printed: 1.1 stays 1.1. `down` likewise."""
    return float(decimal.Context(prec=3, rounding=decimal.ROUND_UP).create_decimal(repr(float(x))))


def down(x: float) -> float:
    return float(decimal.Context(prec=3, rounding=decimal.ROUND_DOWN).create_decimal(repr(float(x))))


def neighbours(
    design: Design,
    ratio: float | None = None,
    largest: float | None = None,
    *,
    trained: bool = False,
    limit: int = 6,
) -> list[Neighbour]:
    """The nearest stable designs, one or two changes away, nearest first; of each kind of change the nearest.

    After them, up to three changes that help but are not enough alone. ratio, largest: what the design's own sigma
    ratio and largest score were measured or read from weights to be, in place of the predicted ones: others are
    judged by how their prediction differs from the design's. trained: without changes that a trained model
    cannot have.
    """
    predicted = worst_ratio(design), _largest(design)
    correction = [
        1.0 if known is None or guess == 0 else known / guess
        for known, guess in zip((ratio, largest), predicted, strict=True)
    ]
    now = predicted[0] * correction[0]
    moves = [move for move in _moves(design, now) if not trained or move.knob in AFTER_TRAINING]
    single = _best([_judged([move], move.design, correction) for move in moves])
    enough = {kind[0] for kind, found in single.items() if found.verdict == "stable"}
    # Two changes are only worth telling where neither would do alone.
    coarse = [move for move in moves if move.distance <= 1.5 and move.knob not in enough]
    double = []
    for one, two in combinations(coarse, 2):
        both = None if one.knob == two.knob else _apply_both(design, one, two)
        if both is not None:
            double.append(_judged([one, two], both, correction))
    found = [*single.values(), *_best(double).values()]
    stable = sorted((x for x in found if x.verdict == "stable"), key=lambda x: x.distance)
    helpful = [x for x in single.values() if x.verdict != "stable" and x.sigma_ratio < 0.95 * now]
    return stable[:limit] + sorted(helpful, key=lambda x: x.sigma_ratio)[:3]


def margins(design: Design, ratio: float) -> dict[str, float]:
    """How far each knob alone may go before sigma / sigma_c passes SAFE_RATIO, closed form.

    temperature: least T / sqrt(head_dim). init_std, d_model: largest. seq_len: least number of keys.
    """
    room = min(SAFE_RATIO / max(ratio, 1e-300), 1e100)
    found = {"temperature": design.relative_temperature / room}
    if not design.qk_norm:
        found["init_std"] = math.sqrt(design.query_std * design.key_std * room)
        found["d_model"] = design.d_model * room
    keys = min(design.keys(layer) for layer in range(design.n_layers))
    # sigma / sqrt(2 ln n) = ratio now.
    exponent = math.log(keys) / room**2
    found["seq_len"] = math.exp(exponent) if exponent < 700 else math.inf
    return found


def _judged(moves: list[_Move], design: Design, correction: list[float]) -> tuple[tuple[str, ...], Neighbour]:
    ratio, largest = worst_ratio(design) * correction[0], _largest(design) * correction[1]
    text = " and ".join(move.text for move in moves)
    margin, distance = SAFE_RATIO / max(ratio, 1e-300), sum(move.distance for move in moves)
    found = Neighbour(text, ratio, margin, verdict(ratio, largest), distance)
    return tuple(move.knob for move in moves), found


def _best(judged: list[tuple[tuple[str, ...], Neighbour]]) -> dict[tuple[str, ...], Neighbour]:
    """Of each kind of change the nearest stable one, else the most stable one."""
    best: dict[tuple[str, ...], Neighbour] = {}
    for kind, found in judged:
        other = best.get(kind)
        if other is None or _order(found) < _order(other):
            best[kind] = found
    return best


def _order(found: Neighbour) -> tuple[bool, float]:
    return (False, found.distance) if found.verdict == "stable" else (True, -found.margin)


def _moves(design: Design, ratio: float) -> Iterator[_Move]:
    for step in _STEPS:
        heads = design.n_heads * 2.0**step
        if heads == int(heads) and heads >= 1 and design.d_model % int(heads) == 0:
            new = design.with_heads(int(heads))
            yield _Move("heads", f"{new.n_heads} heads (head_dim {new.head_dim})", new, abs(step))
        width = design.d_model * 2.0**step
        least = design.n_heads * min(_LEAST_HEAD_DIM, design.head_dim)
        if width == int(width) and int(width) % design.n_heads == 0 and width >= least:
            new = _with_width(design, int(width))
            yield _Move("d_model", f"d_model {new.d_model} (head_dim {new.head_dim})", new, abs(step))
        length = design.seq_len * 2.0**step
        if length >= 2 and not design.windows:
            new = replace(design, seq_len=int(length))
            yield _Move("seq_len", f"length {new.seq_len}", new, abs(step))
    needed = ratio / SAFE_RATIO  # what sigma has to fall by, in closed form
    for factor in sorted({2.0, 4.0, needed} if needed > 1 else {2.0}):
        if factor > 1.0:
            temperature = up(design.relative_temperature * factor)
            new = replace(design, scale=1.0 / (temperature * math.sqrt(design.head_dim)))
            factor = temperature / design.relative_temperature
            printed = up(float(f"{factor:.12g}"))  # less what the division adds
            text = f"temperature x {printed:.3g} (T = {temperature:.3g} sqrt(head_dim))"
            yield _Move("temperature", text, new, math.log2(factor))
            if not design.qk_norm:
                shrink = math.sqrt(factor)
                query_std, key_std = down(design.query_std / shrink), down(design.key_std / shrink)
                new = replace(design, query_std=query_std, key_std=key_std)
                text = f"query and key weights initialised with {new.query_std:.3g}"
                yield _Move("init", text, new, math.log2(factor))
    if not design.qk_norm:
        yield _Move("qk_norm", "QK-norm", replace(design, qk_norm=True), 1.0)
    for cap in _SOFTCAPS:
        if design.softcap is None or cap < design.softcap:
            yield _Move("softcap", f"soft-cap {cap:g}", replace(design, softcap=cap), 1.5)


def _with_width(design: Design, d_model: int) -> Design:
    head_dim = d_model // design.n_heads
    scale = design.scale * math.sqrt(design.head_dim / head_dim)
    return replace(design, d_model=d_model, head_dim=head_dim, scale=scale)


def _apply_both(design: Design, one: _Move, two: _Move) -> Design | None:
    """The second move made on the first one's design; None where the two cannot be had together."""
    base = one.design
    if two.knob == "heads":
        heads = two.design.n_heads
        return base.with_heads(heads) if base.d_model % heads == 0 else None
    if two.knob == "d_model":
        width = two.design.d_model
        return _with_width(base, width) if width % base.n_heads == 0 else None
    changed = {
        "seq_len": {"seq_len": two.design.seq_len},
        "temperature": {"scale": base.scale * two.design.scale / design.scale},
        "init": {"query_std": two.design.query_std, "key_std": two.design.key_std},
        "qk_norm": {"qk_norm": True},
        "softcap": {"softcap": two.design.softcap},
    }
    return replace(base, **changed[two.knob])


def sentence(design: Design, ratio: float, keys: int) -> str:
    """Why a design is not stable, in its own numbers."""
    critical = float(theory.critical_std(keys))
    factor = 1.0 if design.qk_norm else float(theory.row_spread(design.head_dim))
    temperature = design.relative_temperature * ratio / SAFE_RATIO
    text = (
        f"{design.d_model}-dim attention with {design.n_heads} heads at length {keys}: sigma / sigma_c is {ratio:.2f} "
        f"(stable up to {SAFE_RATIO:g}); the spread of scores may be {SAFE_RATIO * critical:.2f} nats and is "
        f"{ratio * critical:.2f} in the sharpest row of a hundred"
    )
    if factor > 1.3:
        text += f", {factor:.2f} times the mean because head_dim {design.head_dim} makes rows unequal"
    if np.isfinite(temperature):
        text += f". It takes a temperature of {up(temperature):.3g} sqrt(head_dim)"
    return text + "."
