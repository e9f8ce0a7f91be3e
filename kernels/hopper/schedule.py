"""Which blocks of queries each program of the sm_90 forward computes, and in which order: a formula, no table.

(head, block) pairs stand in one line, and the programs take them in turns. A few heads share a stretch of the line, so
that their keys and values stay in the L2 cache. Under a causal mask the cost of a block falls along one stretch and
rises along the next one. Neighbours in the line therefore cost about the same. Every second turn goes through the
programs backwards: what a program got too much of in one turn, it gets too little of in the next. The last stretch ends
with the cheapest blocks.
"""

import triton
import triton.language as tl

# Under a causal mask a stretch has at least so many blocks. Its costs then fall over several turns, and a program's
# shares balance: by key tiles, the most loaded program has at most 5% more than a greedy choice would give it.
STRETCH = 512
_LEAST_HEADS = 8


def heads_together(num_heads: int, num_blocks: int, is_causal: bool) -> int:
    """How many of `num_heads` (batch * heads) share a stretch, with `num_blocks` blocks of queries each."""
    least = max(_LEAST_HEADS, -(-STRETCH // num_blocks)) if is_causal else _LEAST_HEADS
    stretches = max(1, num_heads // least)
    return -(-num_heads // stretches)


@triton.jit
def turns_of_program(num_heads, num_blocks):
    """How many blocks this program computes. There are no more programs than blocks."""
    total = num_heads * num_blocks
    turns = (total + tl.num_programs(0) - 1) // tl.num_programs(0)
    # The last turn goes backwards and may end before the first programs.
    left_out = tl.program_id(0) < turns * tl.num_programs(0) - total
    return tl.where(left_out, turns - 1, turns)


@triton.jit
def block_of_turn(turn, num_heads, num_blocks, together):
    """(batch * heads + head, block of queries) of this program in one turn. together: of `heads_together`."""
    programs = tl.num_programs(0)
    turns = (num_heads * num_blocks + programs - 1) // programs
    backwards = (turns - turn) % 2 == 1
    place = turn * programs + tl.where(backwards, programs - 1 - tl.program_id(0), tl.program_id(0))
    stretch = place // (together * num_blocks)
    place = place % (together * num_blocks)
    members = tl.minimum(together, num_heads - stretch * together)
    block = place // members
    stretches = (num_heads + together - 1) // together
    falling = (stretches - stretch) % 2 == 1
    return stretch * together + place % members, tl.where(falling, num_blocks - 1 - block, block)
