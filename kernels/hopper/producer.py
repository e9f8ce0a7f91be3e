"""The warp of the sm_90 forward that feeds queries, keys and values through the bulk-copy engine.

Keys and values travel in pairs: pair g is key tile g and value tile g - 1, just what one step multiplies. The first
pair of a block of queries brings the queries too. Pairs run on from block to block.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from .names import copy_in
from .plan import HALF_ROWS
from .turns import num_turns, turn_of


@gluon.jit
def _copy_queries(q_desc, q_s, batch, head, start_m, turn, ready, PLAN: gl.constexpr):
    for half in gl.static_range(2):
        place = [batch, head, start_m + half * HALF_ROWS, 0]
        slot = turn % PLAN.query_slots * 2 + half
        copy_in(q_desc, place, ready, q_s.index(slot))


@gluon.jit
def produce(descriptors, buffers, channel, read, sizes, records_ptr, PLAN: gl.constexpr):
    """read: the barrier at which consumers arrive when they have read their queries, where those have one place."""
    q_desc, k_desc, v_desc, _out_desc = descriptors
    q_s, k_s, v_s, _out_s = buffers
    order = sizes[5]
    Q_BYTES: gl.constexpr = 2 * q_desc.block_type.nbytes
    K_BYTES: gl.constexpr = k_desc.block_type.nbytes
    V_BYTES: gl.constexpr = v_desc.block_type.nbytes
    step = gl.to_tensor(0)
    v_batch = gl.to_tensor(0)
    v_head = gl.to_tensor(0)
    v_start = gl.to_tensor(0)
    for turn in range(num_turns(order)):
        batch, head, kv_head, start_m, span, _index, _record = turn_of(turn, sizes, records_ptr, PLAN)
        for j in range(span.hi - span.lo):
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
                if not PLAN.is_wide:
                    _copy_queries(q_desc, q_s, batch, head, start_m, turn, ready, PLAN)
            if step > 0:
                place = [v_batch, v_head, v_start, 0]
                copy_in(v_desc, place, ready, v_s.index(stage))
            v_batch = batch
            v_head = kv_head
            v_start = (span.hi - 1 - j) * PLAN.block_n
            copy_in(k_desc, [batch, kv_head, v_start, 0], ready, k_s.index(stage))
            if PLAN.is_wide:  # noqa: SIM102  # the compiler drops this branch, and not an `and`
                if j == 0:
                    mbarrier.wait(read.index(0), (turn & 1) ^ 1)
                    _copy_queries(q_desc, q_s, batch, head, start_m, turn, ready, PLAN)
            step += 1
    channel.wait_empty(step)
    ready = channel.ready(step)
    mbarrier.expect(ready, V_BYTES)
    place = [v_batch, v_head, v_start, 0]
    copy_in(v_desc, place, ready, v_s.index(channel.stage(step)))
