"""The running softmax: the state of a row, one update with a tile of scores, the merge, and the statistics.

The state of a row is (m, l, w, low): the running maximum, sum of exp2(t), sum of exp2(t) * t, and the running
minimum. t = (s - m) * unit <= 0 is the shifted score in log2 units, and `unit` converts scores to them. Scores s
are raw q.k if nothing but the scale is applied to them (unit = scale * log2 e), otherwise in nats (unit = log2 e).

One fused multiply-add makes t from s and the rounded product m * unit. The rounding error of the product is in every
t of the row. It cancels while it is small. Where |m * unit| is huge it would reach hundreds: exp2 overflows, or every
weight is 0. Such rows take a power of two in place of `unit` (see `Units`): their product is exact.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .results import Core, Extended

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


class State(NamedTuple):
    """The state of some rows; `more` is a `MoreState`, or () without extended statistics."""

    m: Any
    l: Any  # noqa: E741 (the literature's name)
    w: Any
    low: Any
    more: Any


class MoreState(NamedTuple):
    """What extended statistics need beside `State`."""

    b: Any  # sum of exp2(t) * t^2
    c: Any  # sum of exp2(t)^2
    mean: Any  # of the visible scores, unweighted
    m2: Any  # sum of their squared deviations from it
    number: Any  # how many there are
    first: Any  # exp2(t) of the first visible key


class Units(NamedTuple):
    """What converts the scores of a row to log2 units, by the size of the row's maximum.

    `fine` is scale * log2 e, and `coarse` the largest power of two <= scale. Rows with |m| >= `limit` = 2^27 / coarse
    take the coarse one. Two numbers of that size differ by 2^4 units at least, so that by either of them only the keys
    of the maximum keep a weight. Below the limit, the rounding error of m * fine is 2^4 at most: exp2(t) stays within
    fp16.
    """

    fine: Any
    coarse: Any
    limit: Any


_LARGEST_PRODUCT = tl.constexpr(134217728.0)  # 2^27


@triton.jit
def units_of(unit, EXPONENT: tl.constexpr):
    """The units of scores, where scale * log2 e is `unit`. EXPONENT: of `plan.unit_exponent`."""
    COARSE: tl.constexpr = 2.0**EXPONENT
    return Units(unit, COARSE, _LARGEST_PRODUCT / COARSE)


@triton.jit
def unit_of_row(m, units):
    """The unit of rows with the maximum m."""
    return tl.where(tl.abs(m) < units.limit, units.fine, units.coarse)


@triton.jit
def start_state(ROWS: tl.constexpr, EXTENDED: tl.constexpr):
    """The state of rows that have seen no key."""
    zeros = tl.zeros([ROWS], tl.float32)
    more = ()
    if EXTENDED:
        more = MoreState(zeros, zeros, zeros, zeros, zeros, zeros)
    m = tl.full([ROWS], -float("inf"), tl.float32)
    return State(m, zeros, zeros, tl.full([ROWS], float("inf"), tl.float32), more)


@triton.jit
def softmax_update(state, s, seen, units, MASKED: tl.constexpr, EXACT: tl.constexpr, EXTENDED: tl.constexpr):
    """The state with one tile of scores more; also exp2(t), and the factor that rescales what was summed before.

    EXACT subtracts before it scales. Otherwise one fused multiply-add does both. Its rounding of m * unit is the
    same for the whole row, so it cancels from the entropy.
    """
    unit = units.fine
    low = tl.minimum(state.low, tl.min(tl.where(seen, s, float("inf")) if MASKED else s, 1))
    m = tl.maximum(state.m, tl.max(s, 1))
    # A row that has seen nothing yet has m = -inf, which is never subtracted.
    shift = tl.where(m == -float("inf"), 0.0, m) if MASKED else m
    if EXACT:
        t = (s - shift[:, None]) * unit
    else:
        unit = unit_of_row(shift, units)
        t = tl.fma(s, unit[:, None], -(shift * unit)[:, None])
    # Exactly 0 where the maximum stays. Fused as above, every tile would add a rounding error: 1e-3 in a row of a
    # million keys.
    d = tl.where(state.m == -float("inf"), 0.0, (state.m - shift) * unit)
    alpha = tl.exp2(d)
    p = tl.exp2(t)
    # 0 * -inf is NaN: right for a visible score of -inf (an infinite input), wrong for a hidden one.
    pt = tl.where(seen, p * t, 0.0) if MASKED else p * t
    more = state.more
    if EXTENDED:
        ptt = tl.where(seen, pt * t, 0.0) if MASKED else pt * t
        b = alpha * (more.b + d * (2.0 * state.w + d * state.l)) + tl.sum(ptt, 1)
        c = alpha * alpha * more.c + tl.sum(p * p, 1)
        mean, m2, number = _add_scores(more.mean, more.m2, more.number, s, seen, MASKED)
        more = MoreState(b, c, mean, m2, number, more.first * alpha)
    w = alpha * (state.w + state.l * d) + tl.sum(pt, 1)
    return State(m, state.l * alpha + tl.sum(p, 1), w, low, more), p, alpha


@triton.jit
def _add_scores(mean, m2, count, s, seen, MASKED: tl.constexpr):
    """Mean, squared deviations and number of scores with one tile more (Chan, Golub and LeVeque 1979)."""
    if MASKED:
        number = tl.sum(tl.where(seen, 1.0, 0.0), 1)
        tile_mean = tl.sum(tl.where(seen, s, 0.0), 1) / tl.maximum(number, 1.0)
        deviation = tl.where(seen, s - tile_mean[:, None], 0.0)
    else:
        number = s.shape[1]
        tile_mean = tl.sum(s, 1) / number
        deviation = s - tile_mean[:, None]
    total = count + number
    share = number / tl.maximum(total, 1.0)
    apart = tile_mean - mean
    m2 += tl.sum(deviation * deviation, 1) + apart * apart * count * share
    return mean + apart * share, m2, total


@triton.jit
def first_weight(more, unseen, p, seen, columns, start_n, SCATTERED: tl.constexpr):
    """`more` with the first visible key of a tile, for rows that had seen no key before it.

    SCATTERED = False promises that it is the tile's first key for all of them.
    """
    place = start_n
    if SCATTERED:
        place = tl.min(tl.where(seen, columns, 2147483647), 1)[:, None]
    weight = tl.sum(tl.where(columns == place, p, 0.0), 1)
    first = tl.where(unseen, weight, more.first)
    return MoreState(more.b, more.c, more.mean, more.m2, more.number, first)


@triton.jit
def softmax_merge(a, b, unit):
    """The state of the keys of both; a state of no key changes nothing. Extended statistics are not merged."""
    m = tl.maximum(a.m, b.m)
    shift = tl.where(m == -float("inf"), 0.0, m)
    d_a = tl.where(a.m == -float("inf"), 0.0, (a.m - shift) * unit)
    d_b = tl.where(b.m == -float("inf"), 0.0, (b.m - shift) * unit)
    alpha, beta = tl.exp2(d_a), tl.exp2(d_b)
    w = alpha * (a.w + a.l * d_a) + beta * (b.w + b.l * d_b)
    return State(m, alpha * a.l + beta * b.l, w, tl.minimum(a.low, b.low), ())


@triton.jit
def softmax_finish(
    state, units, to_natural, sink, SINKS: tl.constexpr, EXTENDED: tl.constexpr, EXACT: tl.constexpr
):
    """The statistics: `Core`, and `Extended` or (); also the factor that normalises the output.

    `sink` is in score units. EXACT: as in `softmax_update`. Rows without a key give lse = -inf and entropy = 0, or
    the sink and 0. Rows that NaN or inf reached give NaN everywhere but in visible_keys.
    """
    unit = units.fine
    l_i, w_i, more = state.l, state.w, state.more
    empty = state.m == -float("inf")  # neither a key nor a sink
    shift = tl.where(empty, 0.0, state.m)
    factor = 1.0
    if SINKS:
        top = tl.maximum(state.m, sink)
        empty = top == -float("inf")
        top = tl.where(empty, 0.0, top)
        d = tl.where(state.m == -float("inf"), 0.0, (state.m - top) * unit)
        z = (sink - top) * unit
        factor = tl.exp2(d)
        e_sink = tl.exp2(z)
        # A sink of -inf is no sink: 0 * -inf must not become NaN.
        z = tl.where(z == -float("inf"), 0.0, z)
        if EXTENDED:
            b = factor * (more.b + d * (2.0 * w_i + d * l_i)) + e_sink * z * z
            c = factor * factor * more.c + e_sink * e_sink
            more = MoreState(b, c, more.mean, more.m2, more.number, factor * more.first + e_sink)
        w_i = factor * (w_i + l_i * d) + e_sink * z
        l_i = factor * l_i + e_sink
        shift = top
    broken = (l_i + w_i) != (l_i + w_i)
    nan = float("nan")
    l_safe = tl.where(empty, 1.0, l_i)
    log_l = tl.log2(l_safe) * LN_2
    # The rounding of the shift must not make the largest weight more than 1.
    top_logit = shift * to_natural
    lse = tl.where(empty & (broken == 0), -float("inf"), tl.maximum(top_logit + log_l, top_logit))
    entropy = tl.where(empty & (broken == 0), 0.0, log_l - LN_2 * w_i / l_safe)
    max_logit = tl.where(broken, nan, state.m * to_natural)
    min_logit = tl.where(broken, nan, state.low * to_natural)
    extended = ()
    if EXTENDED:
        t_mean = w_i / l_safe
        logit_var = LN_2 * LN_2 * tl.maximum(more.b / l_safe - t_mean * t_mean, 0.0)
        collision = more.c / (l_safe * l_safe)
        # lse - max_logit without the rounding of either. A fused exponent has the rounding of the maximum in it.
        log_denominator = log_l
        if SINKS:
            log_denominator -= LN_2 * d
        if not EXACT:
            peak = tl.where(state.m == -float("inf"), 0.0, state.m)
            row_unit = unit_of_row(peak, units)
            log_denominator -= LN_2 * tl.fma(peak, row_unit, -(peak * row_unit))
        score_std = tl.sqrt(more.m2 / tl.maximum(more.number, 1.0)) * to_natural
        extended = Extended(
            _unless(logit_var, empty, broken),
            _unless(collision, empty, broken),
            _unless(score_std, empty, broken),
            _unless(more.first / l_safe, empty, broken),
            _unless(more.mean * to_natural, empty, broken),
            tl.where(broken, nan, tl.where(state.m == -float("inf"), 0.0, log_denominator)),
            more.number,
        )
    core = Core(tl.where(broken, nan, lse), tl.where(broken, nan, entropy), max_logit, min_logit)
    return core, extended, factor / l_safe


@triton.jit
def _unless(number, empty, broken):
    return tl.where(broken, float("nan"), tl.where(empty, 0.0, number))
