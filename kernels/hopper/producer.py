"""The warp of the sm_90 forward that feeds queries, keys and values through the bulk-copy engine.

Keys and values travel in pairs: pair g is key tile g and value tile g - 1, just what one step multiplies. The first
pair of a block of queries brings the queries too. Pairs run on from block to block.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from .channel import place_in_ring
from .names import copy_in
from .plan import HALF_ROWS
from .turns import (
    block_at_place,
    block_of_turn,
    extent_of,
    next_place,
    num_turns,
    span_of_block,
    write_end,
    write_slot,
)


@gluon.jit
def _copy_queries(q_desc, q_s, batch, head, start_m, turn, ready, PLAN: gl.constexpr):
    for half in gl.static_range(2):
        place = [batch, head, start_m + half * HALF_ROWS, 0]
        slot = place_in_ring(turn, PLAN.query_slots) * 2 + half
        copy_in(q_desc, place, ready, q_s.index(slot))


@gluon.jit
def _bring(carried, turn, block, given, PLAN: gl.constexpr):
    """The pairs of one block of queries, and where the values of its last pair lie: they come with the next one."""
    descriptors, buffers, channel, read, slots, sizes = given
    q_desc, k_desc, v_desc, _out_desc = descriptors
    q_s, k_s, v_s, _out_s = buffers
    step, v_batch, v_head, v_start = carried
    Q_BYTES: gl.constexpr = 2 * q_desc.block_type.nbytes
    K_BYTES: gl.constexpr = k_desc.block_type.nbytes
    V_BYTES: gl.constexpr = v_desc.block_type.nbytes
    batch, head = block.batch, block.head
    kv_head = head // sizes[1]
    origin = extent_of(block, sizes, PLAN)[0]
    start_m = origin + block.start
    span = span_of_block(block, sizes, PLAN)
    for j in range(span.hi - span.lo):
        channel.wait_empty(step)
        stage = channel.stage(step)
        ready = channel.ready(step)
        if j > 0:
            mbarrier.expect(ready, K_BYTES + V_BYTES)
        else:
            write_slot(slots, turn, block, PLAN)
            if step > 0:
                mbarrier.expect(ready, Q_BYTES + K_BYTES + V_BYTES)
            else:
                mbarrier.expect(ready, Q_BYTES + K_BYTES)
            if not PLAN.is_wide:
                _copy_queries(q_desc, q_s, batch, head, start_m, turn, ready, PLAN)
        if step > 0:
            place = [v_batch, v_head, v_start, 0]
            copy_in(v_desc, place, ready, v_s.index(stage))
        v_batch = batch
        v_head = kv_head
        v_start = origin + (span.hi - 1 - j) * PLAN.block_n
        copy_in(k_desc, [batch, kv_head, v_start, 0], ready, k_s.index(stage))
        if PLAN.is_wide:  # noqa: SIM102  # the compiler drops this branch, and not an `and`
            if j == 0:
                mbarrier.wait(read.index(0), (turn & 1) ^ 1)
                _copy_queries(q_desc, q_s, batch, head, start_m, turn, ready, PLAN)
        step += 1
    return step, v_batch, v_head, v_start


@gluon.jit
def produce(descriptors, buffers, channel, read, slots, sizes, table_ptr, PLAN: gl.constexpr):
    """read: the barrier at which consumers arrive when they have read their queries, where those have one place.
    slots: see `turns`."""
    v_desc, v_s = descriptors[2], buffers[2]
    V_BYTES: gl.constexpr = v_desc.block_type.nbytes
    given = (descriptors, buffers, channel, read, slots, sizes)
    zero = gl.to_tensor(0)
    carried = (zero, zero, zero, zero)
    turns = zero
    if PLAN.is_pack:
        block = block_at_place(gl.program_id(0), sizes, table_ptr)
        while block.batch >= 0:
            number = next_place(table_ptr)
            carried = _bring(carried, turns, block, given, PLAN)
            block = block_at_place(number, sizes, table_ptr)
            turns += 1
    else:
        turns = num_turns(sizes[5])
        for turn in range(turns):
            carried = _bring(carried, turn, block_of_turn(turn, sizes, table_ptr, PLAN), given, PLAN)
    step, v_batch, v_head, v_start = carried
    channel.wait_empty(step)
    ready = channel.ready(step)
    write_end(slots, turns)
    mbarrier.expect(ready, V_BYTES)
    copy_in(v_desc, [v_batch, v_head, v_start, 0], ready, v_s.index(channel.stage(step)))
