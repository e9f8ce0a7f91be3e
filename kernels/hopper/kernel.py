"""The sm_90 forward: warp-specialised, one persistent program per multiprocessor, exact row statistics.

One warp feeds keys and values through the bulk-copy engine to two warpgroups of 64 query rows each, so
that one's products run while the other computes exponentials. Keys are walked from the last visible tile
to the first: only the first step of a block of queries needs a mask (the diagonal of a causal mask, or
the ragged end of the keys), and it shows every row a key.

Keys and values travel in pairs: pair g is key tile g and value tile g - 1, just what one step multiplies.
The first pair of a block of queries brings the queries too. Pairs run on from block to block.

The state is that of `softmax.softmax_update` (m in raw q.k, l and w over exp2(t)), except that l, w
and the minimum stay as partials of the four threads that share a row until the loop is over. The output
is rescaled only where the maximum of some row of a warp has risen. (FlashAttention-4 lets it rise by 2^8
before it does; the largest weight is then not exactly 1, and its rounding costs collapsed rows their exactness.)
All rows have one unit: `portable.huge_rows` computes those again for which that is not enough.
"""

from dataclasses import dataclass

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ..shared import softmax
from ..shared.softmax import State, Units
from .assembly import RESCALE_32, RESCALE_32_OPERANDS, RESCALE_64, RESCALE_64_OPERANDS
from .channel import new_channel
from .names import copy_in, copy_out
from .schedule import Order, block_of_turn, turns_of_program

HALF_M = 64  # query rows of a consumer
BLOCK_M = 2 * HALF_M
BLOCK_N = 128
_HALF_M = gl.constexpr(HALF_M)
_BLOCK_N = gl.constexpr(BLOCK_N)
_FIRST = gl.constexpr(0)
_SECOND = gl.constexpr(1)
_LN_2 = softmax.LN_2
_SIZES = ["heads", "group", "num_queries", "num_keys", "num_heads", "together", "stretches", "turns"]
softmax_finish = gluon.jit(softmax.softmax_finish.fn)
_block_of_turn = gluon.jit(block_of_turn.fn)
_turns_of_program = gluon.jit(turns_of_program.fn)


@dataclass(frozen=True)
class Plan:
    """Everything that a compiled kernel is made for; the first was tuned."""

    early: bool  # wait for the next keys before the exponentials, not after them
    is_causal: bool
    ragged: bool  # the keys are no multiple of BLOCK_N
    stats: bool
    block_d: int
    block_dv: int
    stages: int  # depth of the key and value rings: what fits the shared memory

    def __repr__(self) -> str:  # part of the kernel's name
        return "plan_" + "_".join(str(int(x)).replace("-", "m") for x in vars(self).values())


@gluon.jit
def _along(x, axis: gl.constexpr, LARGEST: gl.constexpr):
    return gl.max(x, axis) if LARGEST else gl.sum(x, axis)


@gluon.jit
def _partial(x, CHAINS: gl.constexpr, LARGEST: gl.constexpr, P_L: gl.constexpr):
    """(64, 128) to (64, 4): sum (or maximum) of the columns that one thread holds, without a shuffle, in so
    many independent chains."""
    x = gl.reshape(x, [64, CHAINS // 2, 32 // CHAINS, 4, 2])
    x = _along(_along(_along(x, 2, LARGEST), 3, LARGEST), 1, LARGEST)
    return gl.convert_layout(x, P_L, assert_trivial=True)


@gluon.jit
def _count(l_i, w_i, low, p, t, PLAN: gl.constexpr, P_L: gl.constexpr):
    """Add columns to the state. `t` is 0 where a key is hidden, and p with it.

    Of numbers <= 0 the smallest is the one whose bits are the largest unsigned integer: integer maxima are
    taken while the exponentials keep the float units waiting.
    """
    l_i += _partial(p, 2, False, P_L)
    if PLAN.stats:
        w_i += _partial(p * t, 2, False, P_L)
        bits = _partial(t.to(gl.uint32, bitcast=True), 2, True, P_L)
        low = gl.minimum(low, bits.to(gl.float32, bitcast=True))
    return l_i, w_i, low


@gluon.jit
def _per_part(number, P_L: gl.constexpr):
    """A number per row, against the partials of its four threads."""
    return gl.expand_dims(gl.convert_layout(number, gl.SliceLayout(1, P_L), assert_trivial=True), 1)


@gluon.jit
def _softmax(s, m_i, l_i, w_i, low, unit, PLAN: gl.constexpr, P_L: gl.constexpr):
    """One tile of raw scores into the state (m, l, w, low); also exp2(t) and what rescales the output."""
    best = gl.max(_partial(s, 4, True, P_L), 1)
    m_new = gl.maximum(m_i, gl.convert_layout(best, gl.SliceLayout(1, s.type.layout), assert_trivial=True))
    t = s * unit - gl.expand_dims(m_new * unit, 1)
    p = gl.exp2(t)
    d = (m_i - m_new) * unit
    alpha = gl.exp2(d)
    a = _per_part(alpha, P_L)
    if PLAN.stats:
        d = _per_part(d, P_L)
        w_i = a * (w_i + l_i * d)
        low += d
    l_i, w_i, low = _count(l_i * a, w_i, low, p, t, PLAN, P_L)
    return m_new, l_i, w_i, low, p, alpha


@gluon.jit
def _turn(turn, sizes, PLAN: gl.constexpr):
    """What this program computes in one turn: batch, head, key head, first query, number of key tiles."""
    heads, group, _num_queries, num_keys, order = sizes
    bh, block = _block_of_turn(turn, order)
    start_m = block * (2 * _HALF_M)
    hi = num_keys
    if PLAN.is_causal:
        hi = gl.minimum(hi, start_m + 2 * _HALF_M)
    return bh // heads, bh % heads, bh % heads // group, start_m, gl.cdiv(hi, _BLOCK_N)


@gluon.jit
def _producer(descriptors, buffers, channel, sizes, PLAN: gl.constexpr):
    q_desc, k_desc, v_desc, _out_desc = descriptors
    q_s, k_s, v_s, _out_s = buffers
    _heads, _group, _num_queries, _num_keys, order = sizes
    Q_BYTES: gl.constexpr = 2 * q_desc.block_type.nbytes
    K_BYTES: gl.constexpr = k_desc.block_type.nbytes
    V_BYTES: gl.constexpr = v_desc.block_type.nbytes
    step = gl.to_tensor(0)
    v_batch = gl.to_tensor(0)
    v_head = gl.to_tensor(0)
    v_start = gl.to_tensor(0)
    for turn in range(_turns_of_program(order)):
        batch, head, kv_head, start_m, num_tiles = _turn(turn, sizes, PLAN)
        for j in range(num_tiles):
            channel.wait_empty(step)
            stage = channel.stage(step)
            ready = channel.ready(step)
            if j > 0:
                mbarrier.expect(ready, K_BYTES + V_BYTES)
            else:
                if step > 0:
                    mbarrier.expect(ready, Q_BYTES + K_BYTES + V_BYTES)
                else:
                    mbarrier.expect(ready, Q_BYTES + K_BYTES)
                for half in gl.static_range(2):
                    place = [batch, head, start_m + half * _HALF_M, 0]
                    slot = turn % PLAN.stages * 2 + half
                    copy_in(q_desc, place, ready, q_s.index(slot))
            if step > 0:
                place = [v_batch, v_head, v_start, 0]
                copy_in(v_desc, place, ready, v_s.index(stage))
            v_batch = batch
            v_head = kv_head
            v_start = (num_tiles - 1 - j) * _BLOCK_N
            copy_in(k_desc, [batch, kv_head, v_start, 0], ready, k_s.index(stage))
            step += 1
    channel.wait_empty(step)
    ready = channel.ready(step)
    mbarrier.expect(ready, V_BYTES)
    place = [v_batch, v_head, v_start, 0]
    copy_in(v_desc, place, ready, v_s.index(channel.stage(step)))


@gluon.jit
def _per_row(factor, acc):
    """A number per row, against the output's columns."""
    return gl.expand_dims(
        gl.convert_layout(factor, gl.SliceLayout(1, acc.type.layout), assert_trivial=True), 1
    )


@gluon.jit
def _rescale(acc, alpha, PLAN: gl.constexpr):
    operands = [acc, _per_row(alpha, acc)]
    if PLAN.block_dv == 64:
        return gl.inline_asm_elementwise(RESCALE_32, RESCALE_32_OPERANDS, operands, gl.float32, False, 32)
    else:
        return gl.inline_asm_elementwise(RESCALE_64, RESCALE_64_OPERANDS, operands, gl.float32, False, 64)


@gluon.jit
def _scores(HALF: gl.constexpr, buffers, turn, step, donor, PLAN: gl.constexpr):
    """Start q k^T of this consumer's rows and the key tile of `step`, into registers that `donor` gives up."""
    q_s, k_s, _v_s, _out_s = buffers
    q = q_s.index(turn % PLAN.stages * 2 + HALF).reshape([_HALF_M, PLAN.block_d])
    k = k_s.index(step % PLAN.stages).reshape([_BLOCK_N, PLAN.block_d])
    return warpgroup_mma(q, k.permute((1, 0)), donor, use_acc=False, is_async=True)


@gluon.jit
def _output(buffers, step, a, acc, PLAN: gl.constexpr):
    """Start acc + p v with the value tile that came with the keys of `step`."""
    _q_s, _k_s, v_s, _out_s = buffers
    v = v_s.index(step % PLAN.stages).reshape([_BLOCK_N, PLAN.block_dv])
    return warpgroup_mma(a, v, acc, is_async=True)


@gluon.jit
def _consumer(HALF: gl.constexpr, descriptors, buffers, channel, sizes, results, PLAN: gl.constexpr):
    _q_desc, _k_desc, _v_desc, out_desc = descriptors
    q_s, _k_s, _v_s, out_s = buffers
    heads, _group, num_queries, num_keys, order = sizes
    lse_ptr, entropy_ptr, max_ptr, min_ptr, unit, to_natural = results
    S_L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    O_L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, PLAN.block_dv, 16])
    P_L: gl.constexpr = gl.DistributedLinearLayout(
        [[8, 0]], [[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]], [[16, 0], [32, 0]], [], [64, 4]
    )
    A_L: gl.constexpr = gl.DotOperandLayout(0, O_L, 2)
    ROW: gl.constexpr = gl.SliceLayout(1, S_L)
    dtype: gl.constexpr = q_s.dtype
    staged = out_s.index(HALF)

    step = 0
    channel.wait_full(0)
    donor = gl.full([_HALF_M, _BLOCK_N], 0.0, gl.float32, S_L)
    scores = _scores(HALF, buffers, 0, 0, donor, PLAN)
    s = warpgroup_mma_wait(0, [scores])
    channel.release(0)
    for turn in range(_turns_of_program(order)):
        batch, head, _kv_head, start_m, num_tiles = _turn(turn, sizes, PLAN)
        start_m += HALF * _HALF_M
        offs_m = start_m + gl.arange(0, _HALF_M, ROW)
        offs_n = (num_tiles - 1) * _BLOCK_N + gl.arange(0, _BLOCK_N, gl.SliceLayout(0, S_L))
        l_i = gl.full([_HALF_M, 4], 0.0, gl.float32, P_L)
        w_i = gl.full([_HALF_M, 4], 0.0, gl.float32, P_L)
        low = gl.full([_HALF_M, 4], 0.0, gl.float32, P_L)
        # Every row sees a key of this tile, and there is nothing yet to rescale.
        seen = gl.expand_dims(offs_n, 0) < num_keys
        if PLAN.is_causal:
            seen = seen & (gl.expand_dims(offs_n, 0) <= gl.expand_dims(offs_m, 1))
        if PLAN.is_causal or PLAN.ragged:
            s = gl.where(seen, s, -float("inf"))
        m_i = gl.max(s, 1)
        t = s * unit - gl.expand_dims(m_i * unit, 1)
        p = gl.exp2(t)
        if PLAN.is_causal or PLAN.ragged:
            t = gl.where(seen, t, 0.0)  # 0 * inf is NaN: right for a visible score that is infinite
        l_i, w_i, low = _count(l_i, w_i, low, p, t, PLAN, P_L)
        acc = gl.full([_HALF_M, PLAN.block_dv], 0.0, gl.float32, O_L)
        alpha = gl.full([_HALF_M], 1.0, gl.float32, ROW)
        step += 1
        channel.wait_full(step)
        for _ in range(1, num_tiles):
            a = gl.convert_layout(p.to(dtype), A_L, assert_trivial=True)
            scores = _scores(HALF, buffers, turn, step, p, PLAN)
            acc = _rescale(acc, alpha, PLAN)  # while the scores are computed
            product = _output(buffers, step, a, acc, PLAN)
            s = warpgroup_mma_wait(1, [scores])
            step += 1
            if PLAN.early:
                channel.wait_full(step)
            m_i, l_i, w_i, low, p, alpha = _softmax(s, m_i, l_i, w_i, low, unit, PLAN, P_L)
            # A branch, always or never taken, keeps the assembler from moving the wait for the product in among
            # the exponentials.
            if PLAN.early:
                if num_keys < 0:
                    gl.store(lse_ptr, 0.0)
            elif num_keys > 0:
                channel.wait_full(step)
            acc = warpgroup_mma_wait(0, [product])
            channel.release(step - 1)
        a = gl.convert_layout(p.to(dtype), A_L, assert_trivial=True)
        acc = _rescale(acc, alpha, PLAN)
        product = _output(buffers, step, a, acc, PLAN)
        # The next rows' first scores are computed while these rows are finished. After the last turn
        # the same product runs once more on what lies in the buffers, and nobody reads it.
        donor = gl.full([_HALF_M, _BLOCK_N], 0.0, gl.float32, S_L)
        scores = _scores(HALF, buffers, turn + 1, step, donor, PLAN)

        # The four threads of a row put their partials together.
        total = gl.convert_layout(gl.sum(l_i, 1), ROW, assert_trivial=True)
        row = (batch * heads + head).to(gl.int64) * num_queries + offs_m
        inside = offs_m < num_queries
        if PLAN.stats:
            weighted = gl.convert_layout(gl.sum(w_i, 1), ROW, assert_trivial=True)
            least = m_i + gl.convert_layout(gl.min(low, 1), ROW, assert_trivial=True) / unit
            units = Units(unit, unit, float("inf"))  # one for all rows, see `portable.huge_rows`
            core, _more, normalise = softmax_finish(
                State(m_i, total, weighted, least, ()), units, to_natural, 0.0, False, False, False
            )
            gl.store(entropy_ptr + row, core.entropy, mask=inside)
            gl.store(max_ptr + row, core.max_logit, mask=inside)
            gl.store(min_ptr + row, core.min_logit, mask=inside)
            lse = core.lse
        else:
            lse = m_i * to_natural + gl.log2(total) * _LN_2
            normalise = 1.0 / total
        gl.store(lse_ptr + row, lse, mask=inside)
        acc = warpgroup_mma_wait(1, [product])
        tma.store_wait(pendings=0)
        normalised = acc * _per_row(normalise, acc)
        staged.reshape([_HALF_M, PLAN.block_dv]).store(normalised.to(dtype))
        fence_async_shared()
        copy_out(out_desc, [batch, head, start_m, 0], staged)
        s = warpgroup_mma_wait(0, [scores])
        channel.release(step)
    tma.store_wait(pendings=0)


@gluon.jit(
    do_not_specialize=[
        "heads",
        "group",
        "num_queries",
        "num_keys",
        "num_heads",
        "together",
        "stretches",
        "turns",
    ]
)
def hopper_kernel(
    q_desc,
    k_desc,
    v_desc,
    out_desc,
    rows,
    unit,
    to_natural,
    heads,
    group,
    num_queries,
    num_keys,
    num_heads,
    together,
    stretches,
    turns,
    PLAN: gl.constexpr,
):
    dtype: gl.constexpr = q_desc.dtype
    buffers = (
        gl.allocate_shared_memory(dtype, [2 * PLAN.stages, 1, 1, _HALF_M, PLAN.block_d], q_desc.layout),
        gl.allocate_shared_memory(dtype, [PLAN.stages, 1, 1, _BLOCK_N, PLAN.block_d], k_desc.layout),
        gl.allocate_shared_memory(dtype, [PLAN.stages, 1, 1, _BLOCK_N, PLAN.block_dv], v_desc.layout),
        gl.allocate_shared_memory(dtype, [2, 1, 1, _HALF_M, PLAN.block_dv], out_desc.layout),
    )
    channel = new_channel(PLAN.stages, 2)
    descriptors = (q_desc, k_desc, v_desc, out_desc)
    order = Order(num_heads, gl.cdiv(num_queries, 2 * _HALF_M), together, stretches, turns)
    sizes = (heads, group, num_queries, num_keys, order)
    lse_ptr, entropy_ptr, max_ptr, min_ptr = rows
    results = (lse_ptr, entropy_ptr, max_ptr, min_ptr, unit, to_natural)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_consumer, (_FIRST, descriptors, buffers, channel, sizes, results, PLAN)),
            (_consumer, (_SECOND, descriptors, buffers, channel, sizes, results, PLAN)),
            (_producer, (descriptors, buffers, channel, sizes, PLAN)),
        ],
        [4, 1],
        [240, 24],
    )
