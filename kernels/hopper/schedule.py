"""Which blocks of queries each program of the sm_90 forward computes, and in which order: a formula, no table.

(head, block) pairs stand in one line, and the programs take them in turns. A few heads share a stretch of the line, so
that their keys and values stay in the L2 cache. Under a causal mask the cost of a block falls along one stretch and
rises along the next one. Neighbours in the line therefore cost about the same. Every second turn goes through the
programs backwards: what a program got too much of in one turn, it gets too little of in the next. The last stretch ends
with the cheapest blocks. (The blocks of a pack are sorted, see `places`, and programs take them from the line as they
become free.)
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..shared.tiles import ceil_div

# Under a causal mask a stretch has at least so many blocks. Its costs then fall over several turns, and a program's
# shares balance: by key tiles, the most loaded program has at most 9% more than a greedy choice would give it.
STRETCH = 256
_LEAST_HEADS = 8


def heads_together(num_heads: int, num_blocks: int, uneven: bool, cached: int = _LEAST_HEADS) -> int:
    """How many of `num_heads` (batch * heads) share a stretch, with `num_blocks` blocks of queries each.

    uneven: whether blocks differ in cost. cached: the keys of how many heads fit the L2 cache.
    """
    least = min(_LEAST_HEADS, cached)
    if uneven:
        least = max(least, ceil_div(STRETCH, num_blocks))
    stretches = max(1, num_heads // least)
    return ceil_div(num_heads, stretches)


class Order(NamedTuple):
    """The numbers of one order, for the host and for kernels."""

    num_heads: Any  # batch * heads
    num_blocks: Any  # of queries
    together: Any  # heads that share a stretch
    stretches: Any
    turns: Any


def order_of(
    num_heads: int, num_blocks: int, programs: int, uneven: bool, cached: int = _LEAST_HEADS
) -> Order:
    """The order in which so many programs, at most num_heads * num_blocks, compute the blocks of all heads.

    uneven, cached: as in `heads_together`.
    """
    together = heads_together(num_heads, num_blocks, uneven, cached)
    turns = ceil_div(num_heads * num_blocks, programs)
    return Order(num_heads, num_blocks, together, ceil_div(num_heads, together), turns)


# A kernel takes the numbers that need a division from the host: the compiler would divide in every turn.
@triton.jit
def turns_of_program(order):
    """How many blocks this program computes."""
    # The last turn goes backwards and may end before it reaches the first programs.
    missing = order.turns * tl.num_programs(0) - order.num_heads * order.num_blocks
    return tl.where(tl.program_id(0) < missing, order.turns - 1, order.turns)


@triton.jit
def block_of_turn(turn, order):
    """(batch * heads + head, block of queries) of this program in one turn."""
    programs, program = tl.num_programs(0), tl.program_id(0)
    backwards = (order.turns - turn) % 2 == 1
    return block_at(turn * programs + tl.where(backwards, programs - 1 - program, program), order)


@triton.jit
def block_at(place, order):
    """(batch * heads + head, block of queries) at a place in the line."""
    size = order.together * order.num_blocks
    stretch = place // size
    first = stretch * order.together
    members = tl.minimum(order.together, order.num_heads - first)  # the last stretch may have fewer heads
    inside = place - stretch * size
    block = inside // members
    falling = (order.stretches - stretch) % 2 == 1
    return first + inside - block * members, tl.where(falling, order.num_blocks - 1 - block, block)
