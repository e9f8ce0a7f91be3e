"""The parts of a step of an sm_90 consumer: its two products, the softmax of one tile, and the masks."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma

from . import assembly
from .channel import place_in_ring
from .plan import HALF_ROWS

# Which halves of a tile may hold keys that a row does not see.
NONE, LEFT, RIGHT, ALL = gl.constexpr(0), gl.constexpr(1), gl.constexpr(2), gl.constexpr(3)


@gluon.jit
def _along(x, axis: gl.constexpr, LARGEST: gl.constexpr):
    return gl.max(x, axis) if LARGEST else gl.sum(x, axis)


@gluon.jit
def _partial(x, CHAINS: gl.constexpr, LARGEST: gl.constexpr, P_L: gl.constexpr):
    """(64, keys) to (64, 4): sum (or maximum) of the columns that one thread holds, without a shuffle, in so
    many independent chains."""
    HELD: gl.constexpr = x.shape[1] // 4
    x = gl.reshape(x, [64, CHAINS // 2, HELD // CHAINS, 4, 2])
    x = _along(_along(_along(x, 2, LARGEST), 3, LARGEST), 1, LARGEST)
    return gl.convert_layout(x, P_L, assert_trivial=True)


@gluon.jit
def _per_part(number, P_L: gl.constexpr):
    """A number per row, against the partials of its four threads."""
    return gl.expand_dims(gl.convert_layout(number, gl.SliceLayout(1, P_L), assert_trivial=True), 1)


@gluon.jit
def _halves(x):
    """The left and the right half of the columns of x; a thread holds columns of both."""
    rows: gl.constexpr = x.shape[0]
    width: gl.constexpr = x.shape[1]
    return x.reshape([rows, 2, width // 2]).permute((0, 2, 1)).split()


@gluon.jit
def _first_held(x, P_L: gl.constexpr):
    """(64, keys) to (64, 4): of the columns that one thread holds the first."""
    if x.shape[1] > 8:
        return _first_held(_halves(x)[0], P_L)
    else:
        first, _second = x.reshape([64, 4, 2]).split()
        return gl.convert_layout(first, P_L, assert_trivial=True)


@gluon.jit
def _of_threads(
    operands,
    PURE: gl.constexpr,
    OF_32: gl.constexpr,
    OPERANDS_32: gl.constexpr,
    OF_64: gl.constexpr,
    OPERANDS_64: gl.constexpr,
):
    """Assembly over all numbers of the first operand that a thread holds: 32, or 64."""
    if operands[0].shape[1] == 64:
        return gl.inline_asm_elementwise(OF_32, OPERANDS_32, operands, gl.float32, PURE, 32)
    else:
        return gl.inline_asm_elementwise(OF_64, OPERANDS_64, operands, gl.float32, PURE, 64)


@gluon.jit
def _largest_by_threes(s, m_i, P_L: gl.constexpr):
    """(64, keys) to (64, 4): the largest of m and the columns that one thread holds."""
    found = _of_threads(
        [s, per_row(m_i, s)],
        True,
        assembly.LARGEST_32,
        assembly.LARGEST_32_OPERANDS,
        assembly.LARGEST_64,
        assembly.LARGEST_64_OPERANDS,
    )
    return _first_held(found, P_L)


@gluon.jit
def _least_by_threes(t, P_L: gl.constexpr):
    """(64, keys) to (64, 4): the smallest of the columns that one thread holds, all <= 0."""
    found = _of_threads(
        [t],
        True,
        assembly.LEAST_32,
        assembly.LEAST_32_OPERANDS,
        assembly.LEAST_64,
        assembly.LEAST_64_OPERANDS,
    )
    return _first_held(found, P_L)


@gluon.jit
def count(l_i, w_i, low, p, t, PLAN: gl.constexpr, P_L: gl.constexpr):
    """Add columns to the state. `t` is 0 where a key is hidden, and p with it.

    Of numbers <= 0 the smallest is the one whose bits are the largest unsigned integer: integer maxima are
    taken while the exponentials keep the float units waiting.
    """
    l_i += _partial(p, 2, False, P_L)
    if PLAN.stats:
        w_i += _partial(p * t, 2, False, P_L)
        if PLAN.by_threes:
            least = _least_by_threes(t, P_L)
        else:
            least = _partial(t.to(gl.uint32, bitcast=True), 2, True, P_L).to(gl.float32, bitcast=True)
        low = gl.minimum(low, least)
    return l_i, w_i, low


@gluon.jit
def halves_of(x):
    """The left and the right half of a tile of scores (64, 128), in the layout of a smaller product."""
    left, right = _halves(x)
    H_L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, x.shape[1] // 2, 16])
    left = gl.convert_layout(left, H_L, assert_trivial=True)
    return left, gl.convert_layout(right, H_L, assert_trivial=True)


@gluon.jit
def join_halves(left, right):
    """The tile of two halves."""
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 2 * left.shape[1], 16])
    both = gl.join(left, right).permute((0, 2, 1)).reshape([left.shape[0], 2 * left.shape[1]])
    return gl.convert_layout(both, LAYOUT, assert_trivial=True)


@gluon.jit
def none_of(half, never):
    """0 in place of all scores of a half.

    never: false, which the compiler does not know. For plain zeros it takes the registers of the unused scores away,
    and then serialises every product (its remark C7511).
    """
    return gl.where(never, half, 0.0)


@gluon.jit
def _hide(s, bounds, first_key):
    first, number = bounds
    ROW: gl.constexpr = gl.SliceLayout(1, s.type.layout)
    columns = first_key + gl.arange(0, s.shape[1], gl.SliceLayout(0, s.type.layout))
    first = gl.convert_layout(first, ROW, assert_trivial=True)
    number = gl.convert_layout(number, ROW, assert_trivial=True)
    distance = gl.expand_dims(columns, 0) - gl.expand_dims(first, 1)
    return gl.inline_asm_elementwise(
        assembly.HIDE_UNLESS_LESS, "=f,f,r,r", [s, distance, gl.expand_dims(number, 1)], gl.float32, True, 1
    )


@gluon.jit
def hide(s, bounds, first_key, MASKED: gl.constexpr):
    """The scores of keys from first_key on, HIDDEN where a row does not see the key.

    bounds: the first key that each row sees, and how many it sees. A key before the first one is far behind it as an
    unsigned number. MASKED: which halves may hold such keys.
    """
    if MASKED == ALL:
        return _hide(s, bounds, first_key)
    else:
        left, right = halves_of(s)
        if MASKED == LEFT:
            left = _hide(left, bounds, first_key)
        else:
            right = _hide(right, bounds, first_key + right.shape[1])
        return join_halves(left, right)


@gluon.jit
def _zero(t, hidden):
    """t, and 0 where it is that of a HIDDEN score."""
    hidden = gl.convert_layout(hidden, gl.SliceLayout(1, t.type.layout), assert_trivial=True)
    return gl.inline_asm_elementwise(
        assembly.ZERO_WHERE_EQUAL, "=f,f,f", [t, gl.expand_dims(hidden, 1)], gl.float32, True, 1
    )


@gluon.jit
def _weights(s, shift, sums, unit, PLAN: gl.constexpr, MASKED: gl.constexpr, P_L: gl.constexpr):
    """exp2(t) of scores, t = s * unit - shift, and the sums (l, w, low) with them."""
    if MASKED != NONE and MASKED != ALL:
        left, right = halves_of(s)
        MASKED_LEFT: gl.constexpr = ALL if MASKED == LEFT else NONE
        MASKED_RIGHT: gl.constexpr = ALL if MASKED == RIGHT else NONE
        p_left, sums = _weights(left, shift, sums, unit, PLAN, MASKED_LEFT, P_L)
        p_right, sums = _weights(right, shift, sums, unit, PLAN, MASKED_RIGHT, P_L)
        return join_halves(p_left, p_right), sums
    else:
        l_i, w_i, low = sums
        shift = gl.convert_layout(shift, gl.SliceLayout(1, s.type.layout), assert_trivial=True)
        t = s * unit - gl.expand_dims(shift, 1)
        p = gl.exp2(t)
        if MASKED:
            # Of a visible score of -inf, 0 * inf is NaN, as it should be.
            t = _zero(t, gl.full([HALF_ROWS], 0.0, gl.float32, shift.type.layout) + assembly.HIDDEN * unit)
        return p, count(l_i, w_i, low, p, t, PLAN, P_L)


@gluon.jit
def softmax(s, state, unit, floor, PLAN: gl.constexpr, MASKED: gl.constexpr, P_L: gl.constexpr):
    """One tile of raw scores into the state (m, l, w, low); also exp2(t) and what rescales the output.

    MASKED: which halves may hold HIDDEN scores. A row that has seen no key has m = floor, far below any score, and
    low = inf: both make the next step right without a case of its own.
    """
    m_i, l_i, w_i, low = state
    if PLAN.by_threes:
        best = gl.max(_largest_by_threes(s, m_i, P_L), 1)
        m_new = gl.convert_layout(best, m_i.type.layout, assert_trivial=True)
    else:
        best = gl.max(_partial(s, 4, True, P_L), 1)
        m_new = gl.maximum(m_i, gl.convert_layout(best, m_i.type.layout, assert_trivial=True))
    d = (m_i - m_new) * unit
    alpha = gl.exp2(d)
    a = _per_part(alpha, P_L)
    if PLAN.stats:
        d = _per_part(d, P_L)
        w_i = a * (w_i + l_i * d)
        low += d
    sums = (l_i * a, w_i, low)
    p, sums = _weights(s, m_new * unit, sums, unit, PLAN, MASKED, P_L)
    l_i, w_i, low = sums
    if MASKED:
        low = gl.where(_per_part(m_new, P_L) == floor, float("inf"), low)
    return (m_new, l_i, w_i, low), p, alpha


@gluon.jit
def per_row(factor, acc):
    """A number per row, against the output's columns."""
    return gl.expand_dims(
        gl.convert_layout(factor, gl.SliceLayout(1, acc.type.layout), assert_trivial=True), 1
    )


@gluon.jit
def rescale(acc, alpha, PLAN: gl.constexpr):
    if PLAN.block_dv == 256:  # its products take longer than this
        return acc * per_row(alpha, acc)
    else:
        return _of_threads(
            [acc, per_row(alpha, acc)],
            False,
            assembly.RESCALE_32,
            assembly.RESCALE_32_OPERANDS,
            assembly.RESCALE_64,
            assembly.RESCALE_64_OPERANDS,
        )


@gluon.jit
def scores(HALF: gl.constexpr, buffers, turn, step, donor, PLAN: gl.constexpr):
    """Start q k^T of this consumer's rows and the key tile of `step`, into registers that `donor` gives up."""
    q_s, k_s, _v_s, _out_s = buffers
    q = q_s.index(place_in_ring(turn, PLAN.query_slots) * 2 + HALF).reshape([HALF_ROWS, PLAN.block_d])
    k = k_s.index(place_in_ring(step, PLAN.stages)).reshape([PLAN.block_n, PLAN.block_d])
    return warpgroup_mma(q, k.permute((1, 0)), donor, use_acc=False, is_async=True)


@gluon.jit
def output(buffers, step, a, acc, PLAN: gl.constexpr):
    """Start acc + p v with the value tile that came with the keys of `step`."""
    _q_s, _k_s, v_s, _out_s = buffers
    v = v_s.index(place_in_ring(step, PLAN.stages)).reshape([PLAN.block_n, PLAN.block_dv])
    return warpgroup_mma(a, v, acc, is_async=True)


@gluon.jit
def columns_of_64(x):
    """x (64, 64 to 256) as a tuple of tensors of 64 columns each."""
    if x.shape[1] == 64:
        return (x,)
    elif x.shape[1] == 128:
        return _halves(x)
    else:
        left, right = _halves(x)
        first, second = _halves(left)
        third, fourth = _halves(right)
        return first, second, third, fourth
