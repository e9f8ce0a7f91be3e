"""The first tile of keys that the rows of an sm_90 consumer walk. Most masks hide keys of it."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from . import steps
from .plan import HALF_ROWS


@gluon.jit
def _unless_hidden(x, other, offs_m, first_key, num_keys, PLAN: gl.constexpr, RIGHT: gl.constexpr):
    """x of keys from first_key on, `other` where a row does not see the key. RIGHT: all rows see the left half."""
    if RIGHT:
        left, right = steps.halves_of(x)
        right = _unless_hidden(right, other, offs_m, first_key + right.shape[1], num_keys, PLAN, False)
        return steps.join_halves(left, right)
    else:
        offs_n = gl.expand_dims(first_key + gl.arange(0, x.shape[1], gl.SliceLayout(0, x.type.layout)), 0)
        if PLAN.is_causal:
            rows = gl.convert_layout(offs_m, gl.SliceLayout(1, x.type.layout), assert_trivial=True)
            seen = offs_n <= gl.expand_dims(rows, 1)
            if not PLAN.half_last:
                seen = seen & (offs_n < num_keys)
        else:
            seen = offs_n < num_keys
        return gl.where(seen, x, other)


@gluon.jit
def _first_of_intervals(
    s, zero, offs_m, bounds, first_key, units, PLAN: gl.constexpr, MASKED: gl.constexpr, P_L: gl.constexpr
):
    """`first_tile` of rows that may see no key of it, or not its first ones. MASKED: see `steps.hide`."""
    unit, _to_natural, floor = units
    s = steps.hide(s, bounds, first_key, MASKED)
    m_i = gl.full([HALF_ROWS], 0.0, gl.float32, offs_m.type.layout) + floor
    state = (m_i, zero, zero, zero + float("inf"))
    state, p, _alpha = steps.softmax(s, state, unit, floor, PLAN, MASKED, P_L)
    return state, p


@gluon.jit
def _first_of_rows(
    HALF: gl.constexpr, s, zero, offs_m, first_key, num_keys, unit, PLAN: gl.constexpr, P_L: gl.constexpr
):
    """`first_tile` of rows that see its first key."""
    HIDES: gl.constexpr = PLAN.is_causal or PLAN.ragged
    RIGHT: gl.constexpr = PLAN.half_last and HALF == 1
    if HIDES:
        s = _unless_hidden(s, -float("inf"), offs_m, first_key, num_keys, PLAN, RIGHT)
    top = gl.max(s, 1)
    t = s * unit - gl.expand_dims(top * unit, 1)
    p = gl.exp2(t)
    if HIDES:  # 0 * inf is NaN: right for a visible score that is infinite
        t = _unless_hidden(t, 0.0, offs_m, first_key, num_keys, PLAN, RIGHT)
    l_i, w_i, low = steps.count(zero, zero, zero, p, t, PLAN, P_L)
    return (gl.convert_layout(top, offs_m.type.layout, assert_trivial=True), l_i, w_i, low), p


@gluon.jit
def first_tile(
    HALF: gl.constexpr, s, offs_m, tile, bounds, mixed, num_keys, units, PLAN: gl.constexpr, P_L: gl.constexpr
):
    """The state and exp2(t) of rows after the first tile. There is nothing yet to rescale.

    Where `Plan.half_last`, the upper rows look at its left half alone. mixed: of the block, see `places.Place`.
    """
    unit = units[0]
    never = num_keys < 0
    zero = gl.full([HALF_ROWS, 4], 0.0, gl.float32, P_L)
    HALVED: gl.constexpr = PLAN.half_last and HALF == 0
    first_key = tile * PLAN.block_n
    if HALVED:
        s, rest = steps.halves_of(s)
    if PLAN.two_firsts:
        # The causal mask alone hides keys of it, where a block has rows of one sequence.
        if mixed > 0:
            state, p = _first_of_intervals(s, zero, offs_m, bounds, first_key, units, PLAN, steps.ALL, P_L)
        else:
            state, p = _first_of_rows(HALF, s, zero, offs_m, first_key, num_keys, unit, PLAN, P_L)
    elif PLAN.bounded:
        MASKED: gl.constexpr = steps.RIGHT if PLAN.half_left_seen and HALF == 1 else steps.ALL
        state, p = _first_of_intervals(s, zero, offs_m, bounds, first_key, units, PLAN, MASKED, P_L)
    else:
        state, p = _first_of_rows(HALF, s, zero, offs_m, first_key, num_keys, unit, PLAN, P_L)
    if HALVED:
        p = steps.join_halves(p, steps.none_of(rest, never))
    return state, p
