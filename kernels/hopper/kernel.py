"""The sm_90 forward: warp-specialised, one persistent program per multiprocessor, exact row statistics.

One warp feeds keys and values through the bulk-copy engine to two warpgroups of 64 query rows each, so
that one's products run while the other computes exponentials. Keys are walked from the last visible tile
to the first: the first step of a block of queries needs a mask (the diagonal of a causal mask, or the ragged
end of the keys), which shows every row a key. Where keys are hidden on the left too (`Plan.intervals`), the last
steps need one as well, and a row may see no key of a tile, or none at all. See `spans` for the tiles.

See `producer` for how queries, keys and values come.

The state is that of `softmax.softmax_update` (m in raw q.k, l and w over exp2(t)), except that l, w
and the minimum stay as partials of the four threads that share a row until the loop is over. The output
is rescaled only where the maximum of some row of a warp has risen. (FlashAttention-4 lets it rise by 2^8
before it does; the largest weight is then not exactly 1, and its rounding costs collapsed rows their exactness.)
All rows have one unit: `portable.huge_rows` computes those again for which that is not enough.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma_wait,
)

from ..shared import softmax as shared
from ..shared.softmax import State, Units
from . import steps
from .channel import barriers, new_channel
from .first_tile import first_tile
from .output import again, store_output
from .plan import HALF_ROWS
from .producer import produce
from .schedule import Order
from .turns import SLOTS, bounds_of, extent_of, new_slots, read_slot, read_unit, span_of_block

_FIRST = gl.constexpr(0)
_SECOND = gl.constexpr(1)
_LN_2 = shared.LN_2
_softmax_finish = gluon.jit(shared.softmax_finish.fn)


@gluon.jit
def _step(walk, HALF: gl.constexpr, turn, tile, lo, bounds, given, PLAN: gl.constexpr, MASKED: gl.constexpr):
    """One tile of keys: the scores of it, the output of the tile before. lo: the last tile of the turn. Only a masked
    step needs bounds."""
    buffers, channel, read, _slots, sizes, _pointers, units = given
    state, p, alpha, acc, step = walk
    A_L: gl.constexpr = gl.DotOperandLayout(0, acc.type.layout, 2)
    P_L: gl.constexpr = state[1].type.layout
    a = gl.convert_layout(p.to(buffers[0].dtype), A_L, assert_trivial=True)
    scores = steps.scores(HALF, buffers, turn, step, p, PLAN)
    acc = steps.rescale(acc, alpha, PLAN)  # while the scores are computed
    product = steps.output(buffers, step, a, acc, PLAN)
    s = warpgroup_mma_wait(1, [scores])
    if PLAN.is_wide:  # noqa: SIM102  # the compiler drops this branch, and not an `and`
        if tile == lo:
            mbarrier.arrive(read.index(0), count=1)
    step += 1
    if PLAN.early:
        channel.wait_full(step)
    # Where `Plan.half_first`, the lower rows look at the right half alone, and the upper ones see all keys of it.
    HALVED: gl.constexpr = PLAN.half_first and MASKED and HALF == 1
    HIDES: gl.constexpr = steps.LEFT if PLAN.half_first and HALF == 0 else steps.ALL
    SOME: gl.constexpr = HIDES if MASKED else steps.NONE
    first_key = tile * PLAN.block_n
    never = sizes[3] < 0
    if HALVED:
        rest, s = steps.halves_of(s)
        first_key += s.shape[1]
    if MASKED:
        s = steps.hide(s, bounds, first_key, SOME)
    state, p, alpha = steps.softmax(s, state, units[0], units[2], PLAN, SOME, P_L)
    if HALVED:
        p = steps.join_halves(steps.none_of(rest, never), p)
    if not PLAN.early:  # noqa: SIM102  # the compiler drops this branch, and not an `and`
        # A branch that is always taken keeps the assembler from moving the wait for the product in among the
        # exponentials.
        if sizes[3] > 0:
            channel.wait_full(step)
    acc = warpgroup_mma_wait(0, [product])
    channel.release(step - 1)
    return state, p, alpha, acc, step


@gluon.jit
def _finish(state, bounds, head, pointers, units, record, PLAN: gl.constexpr):
    """The statistics of rows that have seen all their keys, in the order of `pointers`, and what normalises their
    output. The four threads of a row put their partials together."""
    m_i, l_i, w_i, low = state
    unit, to_natural, _floor = units
    ROW: gl.constexpr = m_i.type.layout
    total = gl.convert_layout(gl.sum(l_i, 1), ROW, assert_trivial=True)
    if PLAN.stats or PLAN.has_sinks or PLAN.bounded:
        weighted = gl.convert_layout(gl.sum(w_i, 1), ROW, assert_trivial=True)
        least = gl.convert_layout(gl.min(low, 1), ROW, assert_trivial=True)
        if PLAN.bounded:
            # A row's first tile has left its minimum without the bound of 0.
            least = m_i + gl.minimum(least, 0.0) / unit
            empty = bounds[1] == 0
            m_i = gl.where(empty, -float("inf"), m_i)
            least = gl.where(empty, float("inf"), least)
        else:
            least = m_i + least / unit
        if PLAN.is_masked:
            total = gl.where(record.refused > 0, float("nan"), total)
        sink = 0.0
        if PLAN.has_sinks:
            sink = gl.load(pointers[4] + head).to(gl.float32) / to_natural
        one = Units(unit, unit, float("inf"))  # one for all rows, see `portable.huge_rows`
        core, _more, normalise = _softmax_finish(
            State(m_i, total, weighted, least, ()), one, to_natural, sink, PLAN.has_sinks, False, False
        )
        return (core.lse, core.entropy, core.max_logit, core.min_logit), normalise
    else:
        return (m_i * to_natural + gl.log2(total) * _LN_2,), 1.0 / total


@gluon.jit
def _rows_of_block(walk, HALF: gl.constexpr, turn, block, given, out_desc, staged, PLAN: gl.constexpr):
    """The rows of one consumer in a block of queries. walk: scores of its first tile, and the step of their keys."""
    buffers, channel, read, slots, sizes, pointers, units = given
    if PLAN.shared_unit:
        units = (read_unit(slots), units[1], units[2])
        given = (buffers, channel, read, slots, sizes, pointers, units)
    s, step = walk
    heads, _group, num_queries = sizes[0], sizes[1], sizes[2]
    S_L: gl.constexpr = s.type.layout
    O_L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, PLAN.block_dv, 16])
    P_L: gl.constexpr = gl.DistributedLinearLayout(
        [[8, 0]], [[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]], [[16, 0], [32, 0]], [], [64, 4]
    )
    A_L: gl.constexpr = gl.DotOperandLayout(0, O_L, 2)
    ROW: gl.constexpr = gl.SliceLayout(1, S_L)
    dtype: gl.constexpr = buffers[0].dtype
    span = span_of_block(block, sizes, PLAN)
    if PLAN.is_wide:  # noqa: SIM102  # the compiler drops this branch, and not an `and`
        if span.hi - span.lo == 1:
            mbarrier.arrive(read.index(0), count=1)
    offs_m = block.start + HALF * HALF_ROWS + gl.arange(0, HALF_ROWS, ROW)
    bounds, mixed = (), 0
    if PLAN.bounded:
        bounds = bounds_of(offs_m, sizes, pointers[6], block, PLAN)
    if PLAN.is_pack:
        mixed = block.record.mixed
    state, p = first_tile(HALF, s, offs_m, span.hi - 1, bounds, mixed, sizes[3], units, PLAN, P_L)
    acc = gl.full([HALF_ROWS, PLAN.block_dv], 0.0, gl.float32, O_L)
    alpha = gl.full([HALF_ROWS], 1.0, gl.float32, ROW)
    step += 1
    channel.wait_full(step)
    walk = (state, p, alpha, acc, step)
    if PLAN.many_last:
        for j in range(span.hi - 1 - span.full_hi):
            walk = _step(walk, HALF, turn, span.hi - 2 - j, span.lo, bounds, given, PLAN, True)
    for j in range(span.full_lo, span.full_hi):
        tile = span.full_hi - 1 - (j - span.full_lo)
        walk = _step(walk, HALF, turn, tile, span.lo, bounds, given, PLAN, False)
    # What follows is read or computed anew: it takes no register in the loop above.
    block = read_slot(slots, again(turn), PLAN)
    start_m = block.start + HALF * HALF_ROWS
    offs_m = start_m + gl.arange(0, HALF_ROWS, ROW)
    if PLAN.bounded:
        bounds = bounds_of(offs_m, sizes, pointers[6], block, PLAN)
    if PLAN.intervals:
        span = span_of_block(block, sizes, PLAN)
        for j in range(span.full_lo - span.lo):
            walk = _step(walk, HALF, turn, span.full_lo - 1 - j, span.lo, bounds, given, PLAN, True)
    state, p, alpha, acc, step = walk
    a = gl.convert_layout(p.to(dtype), A_L, assert_trivial=True)
    acc = steps.rescale(acc, alpha, PLAN)
    product = steps.output(buffers, step, a, acc, PLAN)
    # The next rows' first scores are computed while these rows are finished. After the last turn
    # the same product runs once more on what lies in the buffers, and nobody reads it.
    donor = gl.full([HALF_ROWS, PLAN.block_n], 0.0, gl.float32, S_L)
    scores = steps.scores(HALF, buffers, turn + 1, step, donor, PLAN)

    origin, num_rows, _num_keys = extent_of(block, sizes, PLAN)
    batch, head = block.batch, block.head
    found, normalise = _finish(state, bounds, head, pointers, units, block.record, PLAN)
    acc = warpgroup_mma_wait(1, [product])
    x = (acc * steps.per_row(normalise, acc)).to(dtype)
    store_output(x, staged, out_desc, batch, head, origin + start_m, num_rows - start_m, pointers[7], PLAN)
    # Statistics come after the output, whose fence would wait for them.
    rows = (batch * heads + head).to(gl.int64) * num_queries + origin + offs_m
    for i in gl.static_range(4 if PLAN.stats else 1):
        gl.store(pointers[i] + rows, found[i], mask=offs_m < num_rows)
    s = warpgroup_mma_wait(0, [scores])
    channel.release(step)
    return s, step


@gluon.jit
def _consumer(
    HALF: gl.constexpr, descriptors, buffers, channel, read, slots, sizes, pointers, units, PLAN: gl.constexpr
):
    out_desc, staged = descriptors[3], buffers[3].index(HALF)
    S_L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, PLAN.block_n, 16])
    given = (buffers, channel, read, slots, sizes, pointers, units)
    channel.wait_full(0)
    donor = gl.full([HALF_ROWS, PLAN.block_n], 0.0, gl.float32, S_L)
    scores = steps.scores(HALF, buffers, 0, 0, donor, PLAN)
    s = warpgroup_mma_wait(0, [scores])
    channel.release(0)
    walk = (s, gl.to_tensor(0))
    turn = gl.to_tensor(0)
    block = read_slot(slots, turn, PLAN)
    while block.batch >= 0:
        walk = _rows_of_block(walk, HALF, turn, block, given, out_desc, staged, PLAN)
        turn += 1
        block = read_slot(slots, turn, PLAN)
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
        "window",
    ]
)
def hopper_kernel(
    q_desc,
    k_desc,
    v_desc,
    out_desc,
    pointers,
    units,
    heads,
    group,
    num_queries,
    num_keys,
    num_heads,
    together,
    stretches,
    turns,
    window,
    PLAN: gl.constexpr,
):
    """pointers: of lse, entropy, largest and smallest score, sinks, table of blocks, bounds; `out` of `store_output`.
    The table of a pack (see `places`) tells how many blocks there are. units: score units to log2 units
    and to nats, and the maximum of rows that have seen no key, in score units."""
    dtype: gl.constexpr = q_desc.dtype
    buffers = (
        gl.allocate_shared_memory(
            dtype, [2 * PLAN.query_slots, 1, 1, HALF_ROWS, PLAN.block_d], q_desc.layout
        ),
        gl.allocate_shared_memory(dtype, [PLAN.stages, 1, 1, PLAN.block_n, PLAN.block_d], k_desc.layout),
        gl.allocate_shared_memory(dtype, [PLAN.stages, 1, 1, PLAN.block_n, PLAN.block_dv], v_desc.layout),
        gl.allocate_shared_memory(dtype, [2, 1, 1, HALF_ROWS, PLAN.block_out], out_desc.layout),
    )
    channel = new_channel(PLAN.stages, 2)
    read = channel.empty
    if PLAN.is_wide:
        read = barriers(1, 2)
    gl.static_assert(PLAN.stages < SLOTS)
    slots = new_slots(units[0])
    descriptors = (q_desc, k_desc, v_desc, out_desc)
    num_blocks = gl.cdiv(num_queries, 2 * HALF_ROWS)
    if PLAN.is_pack:
        num_blocks = gl.load(pointers[5])
    order = Order(num_heads, num_blocks, together, stretches, turns)
    sizes = (heads, group, num_queries, num_keys, window, order)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_consumer, (_FIRST, descriptors, buffers, channel, read, slots, sizes, pointers, units, PLAN)),
            (_consumer, (_SECOND, descriptors, buffers, channel, read, slots, sizes, pointers, units, PLAN)),
            (produce, (descriptors, buffers, channel, read, slots, sizes, pointers[5], PLAN)),
        ],
        [4, 1],
        [240, 24],
    )
