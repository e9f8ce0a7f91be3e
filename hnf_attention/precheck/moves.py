"""Single changes of a design that may make it stable: of heads, width, length, temperature, weights and caps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

from .design import Design
from .predict import SAFE_RATIO
from .rounding import rounded_down, rounded_up

AFTER_TRAINING = ("temperature", "qk_norm", "softcap", "seq_len")  # what can still be changed then
_SOFTCAPS = (50.0, 30.0, 20.0, 10.0)
_STEPS = (-3, -2, -1, 1, 2, 3)  # powers of two by which sizes are changed
_LEAST_HEAD_DIM = 8  # fewer make rows unequal, and kernels need 8 or 16


@dataclass(frozen=True)
class Move:
    """One change.

    text: the change in words, with the rounded numbers that `apply` uses.
    distance: how far the change goes, in doublings; QK-norm counts as 1, a soft-cap as 1.5.
    apply: makes the change on a design; None if the design cannot have it.
    """

    knob: str
    text: str
    distance: float
    apply: Callable[[Design], Design | None]


def moves(design: Design, ratio: float) -> Iterator[Move]:
    """The changes to try. ratio: the design's sigma / sigma_c."""
    for step in _STEPS:
        yield from _size_moves(design, step)
    needed = ratio / SAFE_RATIO  # the factor by which sigma has to fall
    for factor in sorted({2.0, 4.0, needed} if needed > 1 else {2.0}):
        if factor > 1.0:
            yield from _spread_moves(design, factor)
    if not design.qk_norm:
        yield Move("qk_norm", "QK-norm", 1.0, partial(replace, qk_norm=True))
    for cap in _SOFTCAPS:
        if design.softcap is None or cap < design.softcap:
            yield Move("softcap", f"soft-cap {cap:g}", 1.5, partial(replace, softcap=cap))


def _size_moves(design: Design, step: int) -> Iterator[Move]:
    """Heads, width and length times 2 to the power of `step`, if that is a whole number that fits."""
    heads = design.n_heads * 2.0**step
    if heads >= 1 and heads == int(heads) and design.d_model % heads == 0:
        text = f"{int(heads)} head{'s' * (heads > 1)} (head_dim {design.d_model // int(heads)})"
        yield Move("heads", text, abs(step), partial(_with_heads, int(heads)))
    width = design.d_model * 2.0**step
    least = design.n_heads * min(_LEAST_HEAD_DIM, design.head_dim)
    if width >= least and width == int(width) and width % design.n_heads == 0:
        text = f"d_model {int(width)} (head_dim {int(width) // design.n_heads})"
        yield Move("d_model", text, abs(step), partial(_with_width, int(width)))
    length = design.seq_len * 2.0**step
    if length >= 2 and not design.windows:
        yield Move("seq_len", f"length {int(length)}", abs(step), partial(replace, seq_len=int(length)))


def _spread_moves(design: Design, factor: float) -> Iterator[Move]:
    """A higher temperature, or smaller weights, that divide sigma by `factor`."""
    temperature = rounded_up(design.relative_temperature * factor)
    factor = temperature / design.relative_temperature
    printed = rounded_up(float(f"{factor:.12g}"))  # without the last digits, which the division adds
    text = f"temperature x {printed:.3g} (T = {temperature:.3g} sqrt(head_dim))"
    yield Move("temperature", text, math.log2(factor), partial(_at_temperature, temperature))
    if not design.qk_norm:
        shrink = math.sqrt(factor)
        query_std, key_std = rounded_down(design.query_std / shrink), rounded_down(design.key_std / shrink)
        text = f"query and key weights initialised with {query_std:.3g}"
        smaller = partial(replace, query_std=query_std, key_std=key_std)
        yield Move("init", text, math.log2(factor), smaller)


def _with_heads(heads: int, design: Design) -> Design | None:
    return design.with_heads(heads) if design.d_model % heads == 0 else None


def _with_width(width: int, design: Design) -> Design | None:
    return design.with_width(width) if width % design.n_heads == 0 else None


def _at_temperature(relative: float, design: Design) -> Design:
    return design.at_temperature(relative)
