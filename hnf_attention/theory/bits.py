"""How many significand bits a tolerance costs.

Tolerance eps: error of the output over the spread max v - min v of that component. "Bits" are those of
`Format.bits`, the implicit one included: bf16 has 8, fp16 11, fp32 24; rounding errs by u = 2^-bits, relative.

stored: what is rounded. "query_key", both q and k; "scores"; "weights", e^(s - max s) before the division by
the sum of unrounded ones, as in flash attention (the maximum's, 1, is exact).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

STORED = ("query_key", "scores", "weights")
TOLERANCE = 0.01  # the tolerance of required bits that are reported without one being asked for
_RMS = 0.4246  # root mean square of a relative rounding error over its unit, mantissas log-uniform
# Typical bits leave room for so many standard deviations of the rounding error: all components of a row have to
# meet the tolerance, with these bits and with more. Calibrated in bench/theory_soundness.py.
_DEVIATIONS = 1.6
_MOST = 1100  # bits: beyond it there is no double to round to


def required_bits(
    stored: str, size: ArrayLike, tolerance: ArrayLike, *, max_weight: ArrayLike | None = None
) -> np.ndarray:
    """Bits in which storing something cannot move any output by more than the tolerance. Proved, float64.

    size, and the largest unit u that keeps the tolerance; D, `_allowed_move`, is how far the scores may move:
        "query_key": A = largest scale * sum_c |q_c k_jc| (or scale |q| max|k|), nats: scores move by
            (2u + u^2) A, so u = sqrt(1 + D / A) - 1;
        "scores": largest |s|, nats: they move by u |s|, so u = D / |s|;
        "weights": max|v| / (max v - min v), 1 for one-signed v from 0 on, larger where v has an offset:
            all but the maximum's are rounded, so the output moves by at most u sum p_j |v_j| over the
            others, and u = eps / (size (1 - p_max)).
    bits = ceil(-log2 u), at least 1. max_weight: p_max where known, of many rows the smallest, exact up
    to the rounding of scores in fp64 (lower it by any larger error); None or NaN: unknown.

        D = (log1p(eps / x) - log1p(-eps / (1 - x))) / 2,    x = min(1 - p_max, (1 - eps) / 2)

    which is 2 atanh eps for p_max up to (1 + eps) / 2, and more for sharper rows. Proof: a component moves by at
    most its spread times max |p'(S) - p(S)| over sets S of keys. Scores that move by at most D give a set of
    weight x at most x E / (x E + 1 - x), E = e^2D: a gain of phi(x) = x (1 - x) (E - 1) / (1 + x (E - 1)). What S
    loses, its complement gains. One of the two lacks the largest weight: its weight x is at most r = 1 - p_max, its
    gain at most phi(x). The other gains at most phi(1 - x), which is at most phi(x) where x <= 1/2. So the move is at
    most max phi over [0, min(r, 1/2)]. phi is concave with its top tanh(D / 2) at 1 / (1 + e^D). The D that solves
    phi(x) = eps is least at x = (1 - eps) / 2.
    The bits are tight: some row of these numbers needs all of them if every rounding has the worst sign
    (tests/test_theory_bits.py).

    tolerance: above 0; from 1 on, one bit will do. Arguments broadcast; sizes up to the largest double.
    Grows with log2 of the scores; the HNF proposal's log2(kappa n^2 / eps) grows with the scores themselves.
    Assumes no underflow. With a learned sink, 0 counts as one of the values. Source: own derivation.
    `required_bits_of_row` is the tighter one. Raises ValueError for another `stored`, a negative size or
    tolerance <= 0.
    """
    size, eps = _checked(stored, size, tolerance)
    rest = np.float64(1.0)
    if max_weight is not None:
        # fp64 may round p_max to 1: add the scores' rounding to 1 - p_max, because e^2D multiplies it.
        known = np.minimum(1.0 if stored == "weights" else size, 1e300)
        rest = 1.0 - np.asarray(max_weight, np.float64) + 2.0**-52 * (4.0 * known + 8.0)
        rest = np.where(np.isnan(rest), 1.0, np.clip(rest, 0.0, 1.0))
    with np.errstate(divide="ignore"):
        if stored == "weights":
            log_unit = np.log2(eps) - np.log2(size) - np.log2(rest)
        else:
            # In log2: the ratio of a tolerance and 1e300 has no double.
            log_ratio = np.log2(_allowed_move(eps, rest) / 2.0) - np.log2(size)
            if stored == "scores":
                log_unit = 1.0 + log_ratio
            else:
                ratio = np.exp2(np.minimum(log_ratio, 1.0))
                log_unit = log_ratio + 1.0 - np.log2(1.0 + np.sqrt(1.0 + 2.0 * ratio))
    return np.where(eps >= 1.0, 1.0, np.maximum(np.ceil(-log_unit), 1.0))


def _allowed_move(eps: np.ndarray, rest: np.ndarray) -> np.ndarray:
    """D of `required_bits`, nats: what all scores may move by; rest = 1 - p_max, above 0."""
    eps = np.minimum(eps, 1.0 - 2.0**-53)
    x = np.minimum(rest, (1.0 - eps) / 2.0)
    return (np.log1p(eps / x) - np.log1p(-eps / (1.0 - x))) / 2.0


def _gain(move: np.ndarray, rest: np.ndarray) -> np.ndarray:
    """max phi of `required_bits`: what keys without the largest weight can gain where scores move by `move`."""
    capped = np.minimum(move, 300.0)
    grown, x = np.expm1(2.0 * capped), np.minimum(rest, 1.0 / (1.0 + np.exp(capped)))
    return np.where(move < 300.0, x * (1.0 - x) * grown / (1.0 + x * grown), 1.0)


def typical_bits(stored: str, size: ArrayLike, spread: ArrayLike, tolerance: ArrayLike) -> np.ndarray:
    """Bits that usually suffice, to first order and from few numbers: an estimate with no guarantee.

        bits = ceil(log2(1.6 * 0.42 size spread / eps)), at least 1

    size: "query_key": sqrt(2) scale sqrt(sum_c (q_c k_jc)^2), about sqrt(2 / D) of the sound size;
    "scores": |s|, both of the keys that hold the weight; "weights": 1. spread: `rounding_spread`.
    Source: own derivation. Raises ValueError as `required_bits`.
    """
    size, eps = _checked(stored, size, tolerance)
    with np.errstate(divide="ignore"):
        bits = np.log2(_DEVIATIONS * _RMS) + np.log2(size) + np.log2(spread) - np.log2(eps)
    return np.where(eps >= 1.0, 1.0, np.maximum(np.ceil(bits), 1.0))


def rounding_spread(stored: str, weights: ArrayLike) -> np.ndarray:
    """Root mean square move of the output, over the spread of v, under independent errors of unit size.

    Of the scores: sqrt(sum p_j^2 (1 - p_j)^2) / 4; relative ones of the weights: sqrt(sum p_j^2) / 4. For
    values independent of the weights p (..., N), whose deviation is a quarter of their spread. (...).
    Source: own derivation.
    """
    _check_stored(stored)
    p = np.asarray(weights, np.float64)
    moved = p if stored == "weights" else p * (1.0 - p)
    return np.sqrt((moved**2).sum(-1)) / 4.0


def required_bits_of_row(
    stored: str,
    scores: ArrayLike,
    size: ArrayLike,
    value: ArrayLike,
    tolerance: ArrayLike,
    *,
    typical: bool = False,
) -> np.ndarray:
    """Bits that keep every component of a row's output within the tolerance, from the whole row: (...).

    scores: (..., N), nats, -inf hides a key. value: (..., N, D_v). size, (..., N): for "query_key" A_j = scale
    * sum_c |q_c k_jc| (scores move by (2u + u^2) A_j), for "scores" |s_j| (they move by u |s_j|), not read for
    "weights". The fewest bits at which

        min(sum p_j expm1(D_j) |v_j - o| / sum p_j e^-D_j, max phi (max v - min v)) <= eps (max v - min v)

    D_j is the move of a score; phi, as in `required_bits`, is at most tanh(max D / 2). For "weights" the left side
    is u sum p_j |v_j| over all keys but the maxima. Proved.

    typical: root mean square moves t_j = 1.6 * 0.42 u size_j in place of the largest, taken as independent:
    sum (p_j (e^t_j - 1) / (1 + p_j (e^t_j - 1)))^2 (v_j - o)^2 <= (eps spread)^2, with size_j =
    sqrt(2) scale sqrt(sum_c (q_c k_jc)^2) for "query_key". An estimate, calibrated with `_DEVIATIONS`.
    Components whose v has no spread need no bits. Source: own derivation. Raises ValueError as `required_bits`.
    """
    size, eps = _checked(stored, size, tolerance)
    s, v = np.asarray(scores, np.float64), np.asarray(value, np.float64)
    visible = s > -np.inf
    m = np.max(s, -1, keepdims=True, initial=-np.inf)
    z = np.where(visible, s - np.where(np.isneginf(m), 0.0, m), -np.inf)
    size = np.where(visible, size, 0.0)
    weight = np.exp(z)
    total = np.maximum(weight.sum(-1, keepdims=True), 1.0)
    p = weight / total
    others = np.arange(s.shape[-1]) != z.argmax(-1)[..., None]
    rest = (weight * others).sum(-1, keepdims=True) / total  # 1 - p_max, without its cancellation
    v = np.where(visible[..., None], v, _weighted(p, v)[..., None, :])
    extent = v.max(-2) - v.min(-2)
    allowed = eps[..., None] * extent
    if stored == "weights":
        p = np.where(z == 0.0, 0.0, p)
    distance = v if stored == "weights" else v - _weighted(p, v)[..., None, :]
    bits = np.full(np.broadcast_shapes(s.shape[:-1], v.shape[:-2], eps.shape), np.nan)
    for tried in range(1, _MOST):
        if typical:
            moved = _typical_move(stored, p, size, distance, 2.0**-tried)
        else:
            moved = _largest_move(stored, p, size, distance, 2.0**-tried, extent, rest)
        enough = (moved <= allowed).all(-1)
        bits = np.where(np.isnan(bits) & enough, tried, bits)
        if not np.isnan(bits).any():
            break
    return bits


def _largest_move(stored, p, size, distance, unit, extent, rest):
    if stored == "weights":
        return unit * _weighted(p, np.abs(distance))
    move = unit * size if stored == "scores" else (2.0 * unit + unit**2) * size
    worst = move.max(-1, initial=0.0)[..., None]
    capped = np.minimum(move, 300.0)
    inner = _weighted(p * np.expm1(capped), np.abs(distance))
    inner = inner / np.maximum((p * np.exp(-capped)).sum(-1, keepdims=True), np.exp(-300.0))
    return np.minimum(np.where(worst < 300.0, inner, np.inf), _gain(worst, rest) * extent)


def _typical_move(stored, p, size, distance, unit):
    unit = _DEVIATIONS * _RMS * unit
    if stored == "weights":
        moved = unit * p
    else:
        grown = p * np.expm1(np.minimum(unit * size, 300.0))
        moved = grown / (1.0 + grown)
    return np.sqrt(_weighted(moved**2, distance**2))


def _weighted(weights: np.ndarray, values: np.ndarray) -> np.ndarray:
    """sum_j weights (..., N) * values (..., N, D_v)."""
    return (weights[..., None, :] @ values)[..., 0, :]


def _checked(stored: str, size: ArrayLike, tolerance: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    _check_stored(stored)
    size, eps = np.asarray(size, np.float64), np.asarray(tolerance, np.float64)
    if (size < 0).any():
        raise ValueError(f"expected size >= 0, got {size.min()}")
    if (eps <= 0).any():
        raise ValueError(f"expected tolerance > 0, got {eps.min()}")
    return size, eps


def _check_stored(stored: str) -> None:
    if stored not in STORED:
        raise ValueError(f"expected stored in {STORED}, got {stored!r}")
