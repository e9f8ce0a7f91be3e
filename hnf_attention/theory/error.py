"""How far a rounded attention row can be from the exact one: proved bounds, and what to expect.

One row: scores s over its visible keys (s_j = scale * q.k_j + bias_j), m = max s, z = s - m,
p = softmax(s), o = sum p_j v_j; u = 2^-24. All formulas are for one component of v and o.

Rounding moves the score of key j by at most eta_j, so the computed weights are p_j e^(e_j) / sum of the
same, with |e_j| <= eta_j. An error that is common to the row cancels.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from .arithmetic import FP32_UNIT, TENSOR_CORE_UNIT, Arithmetic, Format

_U = FP32_UNIT
_FLUSH = 2.0**-126  # fp32 exponentials below this may become zero
_LARGE = 300.0  # of eta: e^(2 * 300) is still a double; beyond it the saturated bounds are the smaller ones
# Rounding to nearest errs by a number that is uniform in an ulp: its root mean square in ulps.
_UNIFORM = 12.0**-0.5


def forward_error_bound(
    scores: ArrayLike,
    magnitude: ArrayLike,
    value: ArrayLike,
    head_dim: int,
    arithmetic: Arithmetic,
    *,
    scale: float | None = None,
) -> np.ndarray:
    """Largest |computed - exact| of every component of a row's output: (..., D_v), in units of v. Proved.

    scores: (..., N), exact, nats; -inf hides a key. magnitude: (..., N), A_j = scale * sum_c |q_c k_jc| +
    |bias_j|, nats; scale * |q| |k_j| + |bias_j| is an upper bound. value: (..., N, D_v). head_dim: D.
    scale: at most 1, None means D^-1/2. Inputs are those the kernel gets, already in its storage format.

        eta_j = a D A_j + u (3 A_j + |m| + 5 |z_j| + 4 + 4 blocks + 2 log f)
                a: error of one addition; f: weight_scale
                + roundings of s_j / scale and s_j, half an ulp each, where scores are stored
        E2 = min(sum p_j expm1(eta_j) |v_j - o| / sum p_j e^-eta_j,  tanh(max eta / 2) (max v - min v))
        E1 = min(sum rel_j p_j e^eta_j |v_j| / sum p_j e^-eta_j,  max rel max|v|) + tau' sum|v_j| w
        rel_j = (1 + u_j) (1 + g) (1 + h) (1 + 2u) / (1 - h) - 1,  g = gamma of (N + 3 blocks + 3) a, as Higham's
        h: g for the normaliser and what rescales blocks, which are fp32 also where a is that of 8-bit products
        |error| <= max(|rd(o + E) - o|, |rd(o - E) - o|),  E = E1 + E2,  rd: rounding to the output's format

    u_j is the weights' rounding. A flash weight that must round to 1 (the maximum's) errs only by its distance
    from 1. tau is half the smallest number of the format, tau' = tau + 2^-126. w multiplies an absolute error
    of a weight: 1 where weights are normalised first, else 1 / sum e^z, at most
    min(1, p_max e^(2 max eta)). f divides tau. The tanh is total variation under bounded errors of the
    scores. Covers both usual orders: scale, then subtract the maximum (|m| does not enter), and one fused
    multiply-add with scale * log2(e) folded in, whose rounded product with m differs between blocks.
    Every exponential errs by at most two ulps (4u), also one that rescales earlier blocks.

    The error grows linearly in |s| until it saturates at the spread of v. Overflow is another matter, see
    `overflow_paths`. Never inf or NaN for finite scores up to 1e30 and beyond. A row without a visible key
    has bound 0. For 8-bit inputs with scales, scores, magnitude and value are those of the scaled numbers.
    Raises ValueError for shapes that do not fit, and beyond 4e6 keys (3,900 with `eight_bit_flash`).

    Source: own derivation; Higham, Accuracy and Stability of Numerical Algorithms, 2002, for gamma and sums.
    """
    s, size, v = _row(scores, magnitude, value)
    visible = s > -np.inf
    keys, storage = s.shape[-1], arithmetic.storage
    m = np.max(s, -1, keepdims=True, initial=-np.inf)
    m = np.where(np.isneginf(m), 0.0, m)
    s = np.where(visible, s, m)
    z = s - m
    weight = np.where(visible, np.exp(z), 0.0)
    p = weight / np.maximum(weight.sum(-1, keepdims=True), 1.0)
    eta = _score_error(size, np.abs(m), np.abs(z), keys, head_dim, arithmetic)
    if arithmetic.score_roundings:
        eta = eta + _stored(np.abs(s) + eta, head_dim**-0.5 if scale is None else scale, storage)
    eta = np.where(visible, eta, 0.0)
    worst = eta.max(-1, initial=0.0)[..., None]
    any_key = visible.any(-1, keepdims=True)
    lowest, highest, total = _extent(v, visible)
    spread = np.where(any_key, highest - lowest, 0.0)
    largest = np.maximum(np.abs(lowest), np.abs(highest))

    out = _weighted(p, v)
    capped = np.minimum(eta, _LARGE)
    shrunk = np.maximum((p * np.exp(-capped)).sum(-1, keepdims=True), np.exp(-_LARGE))
    moved = _weighted(p * np.expm1(capped), np.abs(v - out[..., None, :])) / shrunk
    moved = np.minimum(np.where(worst < _LARGE, moved, np.inf), np.tanh(worst / 2) * spread)

    unit = np.full_like(s, arithmetic.weight_unit)
    if not arithmetic.normalised:
        # A score lies at most this far below the computed maximum, or above it after a fused multiply-add.
        # Both 1 - e^-x and e^x - 1 are at most expm1(x).
        top = np.max(np.where(visible, s + eta, -np.inf), -1, keepdims=True, initial=-np.inf)
        near_one = np.expm1(np.clip(np.where(visible, top - s + eta, 1.0), 0.0, 1.0))
        unit = np.where(near_one <= arithmetic.weight_unit / 2.0, np.minimum(near_one, unit), unit)
    relative, g = _relative(unit, keys, arithmetic)
    summed = _weighted(relative * p * np.exp(capped), np.abs(v)) / shrunk
    saturated = relative.max(-1, initial=0.0)[..., None] * largest
    summed = np.minimum(np.where(worst < _LARGE, summed, np.inf), saturated)
    summed = summed + _floor(total, p.max(-1, initial=0.0)[..., None], worst, g, arithmetic)

    before = moved + summed
    # o is computed in fp64. Its error, from score errors 2^-29 of fp32's, is far below this share of E.
    slack = 2.0**-20 * before + (keys + 8) * 2.0**-52 * largest
    before = before + slack
    edges = out + before, out - before
    above, below = (np.abs(_round(edge, arithmetic.output_format) - out) for edge in edges)
    after = np.maximum(above, below) + slack
    return np.where(any_key, after, 0.0)


def forward_error_bound_from_norms(
    magnitude: ArrayLike,
    value_max: ArrayLike,
    value_range: ArrayLike,
    head_dim: int,
    keys: int,
    arithmetic: Arithmetic,
    *,
    max_weight: ArrayLike | tuple[ArrayLike, ArrayLike] | None = None,
    max_abs_score: ArrayLike | None = None,
) -> np.ndarray:
    """`forward_error_bound` of any component of any row, from a few numbers of a head. Proved, less tight.

    magnitude: largest A_j, or scale * max|q| max|k|, nats. value_max: max|v|; value_range: max v - min v of
    a component, at most 2 max|v|. keys: N. max_abs_score: where known, else the magnitude. max_weight:
    p_max where known, exact up to the rounding of scores in fp64 (lower it by any larger error); of many rows
    a pair, the smallest and the largest. The mean distance of v from o is at most half its range, and with
    p_max >= 1/2 at most 2 p_max (1 - p_max) of it: a collapsed row is a well conditioned one.

        E2 = min(tanh(eta / 2), e^eta expm1(eta) 2 p_max (1 - p_max)) range,    E1 with max|v|,
        |error| <= (E1 + E2)(1 + u_out) + u_out max|v| + tau

    Arguments broadcast; units of v. Source: own derivation, as above.
    """
    size, largest, spread = (np.asarray(x, np.float64) for x in (magnitude, value_max, value_range))
    top = size if max_abs_score is None else np.minimum(np.asarray(max_abs_score, np.float64), size)
    eta = _score_error(size, top, 2.0 * top, keys, head_dim, arithmetic)
    storage = arithmetic.storage
    if arithmetic.score_roundings:
        eta = eta + (top + eta) * ((1.0 + storage.unit) ** 2 - 1.0) + storage.smallest
    share = np.tanh(eta / 2)
    pair = max_weight if isinstance(max_weight, tuple) else (max_weight, max_weight)
    least, p_max = (np.asarray(1.0 if x is None else x, np.float64) for x in pair)
    if max_weight is not None:
        capped = np.minimum(eta, _LARGE)
        # fp64 may round p_max to 1: add the scores' rounding to 1 - p_max, because e^(2 eta) multiplies it.
        rest = np.minimum(1.0 - least + 2.0**-52 * (4.0 * top + 8.0), 1.0)
        sharp = np.exp(capped) * np.expm1(capped) * 2.0 * least * rest
        share = np.where((least >= 0.5) & (eta < _LARGE), np.minimum(share, sharp), share)
    relative, g = _relative(np.float64(arithmetic.weight_unit), keys, arithmetic)
    before = share * spread + relative * largest + _floor(keys * largest, p_max, eta, g, arithmetic)
    output = arithmetic.output_format
    return before * (1.0 + output.unit) + output.unit * largest + output.smallest / 2.0


def expected_error(
    scores: ArrayLike,
    magnitude: ArrayLike,
    value: ArrayLike,
    arithmetic: Arithmetic,
    *,
    scale: float | None = None,
) -> np.ndarray:
    """Root mean square of the error that `forward_error_bound` bounds: (..., D_v), to first order.

        rms^2 = sum_j (p_max r(P_j))^2 v_j^2 + sum_j (p_j t_j (v_j - o_j))^2 + r(o)^2

    with P_j = e^z_j, which flash attention rounds; eager attention rounds p_j, and has r(p_j) for p_max r(P_j).
    r(x) = ulp(x) / sqrt(12), but 0 for the maximum's weight, exactly 1 before normalisation.
    t_j^2 = (u A_j / 2)^2, plus r(s_j)^2 per rounding of a stored score: two, or one if `scale` is given as a
    power of two. Arguments as there.
    An estimate with no guarantee: rounding errors are taken as independent, so ties, common signs and
    rows of one key are not covered. For bf16 and fp16; in fp32 the order of the sums decides, which no
    formula knows: ValueError.

    Source: own derivation; Higham and Mary, SIAM J. Sci. Comput. 41, 2019, for the probabilistic model.
    """
    storage = arithmetic.storage
    if storage.bits >= 24:
        raise ValueError(f"expected arithmetic with bf16 or fp16 storage, got {storage.name}")
    s, size, v = _row(scores, magnitude, value)
    visible = s > -np.inf
    m = np.max(s, -1, keepdims=True, initial=-np.inf)
    s = np.where(visible, s, np.where(np.isneginf(m), 0.0, m))
    unnormalised = np.where(visible, np.exp(s - np.where(np.isneginf(m), 0.0, m)), 0.0)
    total = np.maximum(unnormalised.sum(-1, keepdims=True), 1.0)
    p = unnormalised / total
    if arithmetic.normalised:
        weights = _rounding(p, storage)
    else:
        factor = arithmetic.weight_scale
        weights = (
            np.where(unnormalised == 1.0, 0.0, _rounding(unnormalised * factor, storage) / factor) / total
        )
    roundings = arithmetic.score_roundings
    if roundings and scale is not None and _power_of_two(scale):
        roundings = 1
    score = (_U * size / 2.0) ** 2 + roundings * _rounding(s, storage) ** 2
    out = _weighted(p, v)
    moved = np.sqrt(_weighted(p**2 * np.minimum(score, 1.0), (v - out[..., None, :]) ** 2))
    last = _rounding(out, arithmetic.output_format)
    return np.sqrt(_weighted(weights**2, v**2) + moved**2 + last**2)


def _row(scores: ArrayLike, magnitude: ArrayLike, value: ArrayLike) -> tuple[np.ndarray, ...]:
    s, size, v = (np.asarray(x, np.float64) for x in (scores, magnitude, value))
    if s.ndim < 1 or v.ndim < 2 or v.shape[-2] != s.shape[-1] or size.shape[-1:] not in ((), s.shape[-1:]):
        raise ValueError(
            f"expected scores (..., N), magnitude of that shape and value (..., N, D_v), got {s.shape}, "
            f"{size.shape} and {v.shape}"
        )
    return s, size, v


def _extent(v: np.ndarray, visible: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Smallest, largest and summed |v| over the visible keys, (..., D_v); 0 where there is none."""
    if visible.size and visible.all():  # the usual case, without a copy of v for every row
        return v.min(-2), v.max(-2), np.abs(v).sum(-2)
    seen = visible[..., None]
    some = seen.any(-2)
    lowest = np.min(np.where(seen, v, np.inf), -2, initial=np.inf)
    highest = np.max(np.where(seen, v, -np.inf), -2, initial=-np.inf)
    total = np.abs(np.where(seen, v, 0.0)).sum(-2)
    return np.where(some, lowest, 0.0), np.where(some, highest, 0.0), total


def _score_error(
    size: np.ndarray,
    top: np.ndarray,
    distance: np.ndarray,
    keys: int,
    head_dim: int,
    arithmetic: Arithmetic,
) -> np.ndarray:
    """eta without the storing of scores: by how much rounding moves a score against the others, nats."""
    blocks = arithmetic.blocks(keys)
    product = arithmetic.accumulation * head_dim * size
    # The scale of the weights is added in the exponent, which rounds once more.
    shifted = 2.0 * np.log(arithmetic.weight_scale)
    eta = product + _U * (3.0 * size + top + 5.0 * distance + 4.0 * (1 + blocks) + shifted)
    # What first-order counts leave out: (1 + u)^k <= e^(k u) <= 1 + k u (1 + k u).
    return eta * (1.0 + 2.0 * arithmetic.accumulation * (head_dim + 8))


def _stored(top: np.ndarray, scale: float, storage: Format) -> np.ndarray:
    """Error of a score of at most `top` whose product q.k is stored, and stored again once scaled, nats."""
    product = scale * _half_ulp(top / scale, storage)
    return product if _power_of_two(scale) else product + _half_ulp(top + product, storage)


def _power_of_two(scale: float) -> bool:
    return np.frexp(scale)[0] == 0.5


def _relative(unit: np.ndarray, keys: int, arithmetic: Arithmetic) -> tuple[np.ndarray, float]:
    """rel and g of `forward_error_bound`."""
    count, unit_of_sums = keys + 3 * arithmetic.blocks(keys) + 3, arithmetic.accumulation
    additions = count * unit_of_sums
    if additions >= 0.5:
        steps = 1.0 + (3.0 / arithmetic.block if arithmetic.block else 0.0)
        most = (0.5 / unit_of_sums - 6.0) / steps
        raise ValueError(f"expected fewer keys than such sums can hold (about {most:.3g}), got {keys}")
    g = additions / (1.0 - additions)
    in_fp32 = count * min(unit_of_sums, TENSOR_CORE_UNIT)
    h = in_fp32 / (1.0 - in_fp32)
    return (1.0 + unit) * (1.0 + g) * (1.0 + h) * (1.0 + 2.0 * _U) / (1.0 - h) - 1.0, g


def _floor(
    total: np.ndarray, p_max: np.ndarray, eta: np.ndarray, g: float, arithmetic: Arithmetic
) -> np.ndarray:
    """What weights that underflow cost; total: sum|v_j|."""
    share: float | np.ndarray = 1.0
    if not arithmetic.normalised:
        share = np.where(eta > 1.0, 1.0, np.minimum(1.0, p_max * np.exp(2.0 * np.minimum(eta, 1.0))))
    smallest = arithmetic.storage.smallest / arithmetic.weight_scale
    return (smallest / 2.0 + _FLUSH) * total * share * (1.0 + 2.0 * g)


def _weighted(weights: np.ndarray, values: np.ndarray) -> np.ndarray:
    """sum_j weights (..., N) * values (..., N, D_v)."""
    return (weights[..., None, :] @ values)[..., 0, :]


def _ulp(x: np.ndarray, storage: Format) -> np.ndarray:
    _, exponent = np.frexp(x)
    return np.maximum(np.ldexp(1.0, exponent - storage.bits), storage.smallest)


def _half_ulp(x: np.ndarray, storage: Format) -> np.ndarray:
    """Largest error of rounding a number of at most that size."""
    return _ulp(x, storage) / 2.0


def _round(x: np.ndarray, storage: Format) -> np.ndarray:
    """To the nearest number of the format, ties to even; as if it had no largest one."""
    ulp = _ulp(x, storage)
    return np.round(x / ulp) * ulp


def _rounding(x: np.ndarray, storage: Format) -> np.ndarray:
    """Root mean square of the error of rounding x to that format, where its last digits are random."""
    return np.minimum(np.abs(x), _UNIFORM * _ulp(x, storage))
