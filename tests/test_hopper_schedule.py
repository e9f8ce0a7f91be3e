"""The order in which the programs of the Hopper forward take blocks: every block once, and evenly spread."""

import heapq

import pytest
import torch

pytest.importorskip("triton", reason="Triton kernels need Linux")
import triton
import triton.language as tl

from hnf_attention.kernels.hopper.schedule import (
    Order,
    block_of_turn,
    heads_together,
    order_of,
    turns_of_program,
)

# (batch * heads, blocks of queries, programs, heads that share a stretch)
SHAPES = [(3, 5, 4, 3), (1, 1, 1, 1), (7, 1, 3, 2), (9, 7, 5, 4), (5, 6, 4, 2), (4, 9, 7, 1)]


@triton.jit
def _list_blocks(taken_ptr, turns_ptr, most, order):
    """Row p of taken (programs, most, 2): the blocks of program p, in its order."""
    turns = turns_of_program(order)
    tl.store(turns_ptr + tl.program_id(0), turns)
    for turn in tl.range(0, turns):
        head, block = block_of_turn(turn, order)
        place = taken_ptr + (tl.program_id(0) * most + turn) * 2
        tl.store(place, head)
        tl.store(place + 1, block)


def taken(num_heads, num_blocks, programs, together):
    """The (head, block) pairs of each program, by the kernel's own functions."""
    stretches, most = (
        -(-whole // part) for whole, part in ((num_heads, together), (num_heads * num_blocks, programs))
    )
    pairs = torch.full((programs, most, 2), -1, dtype=torch.int32)
    turns = torch.zeros(programs, dtype=torch.int32)
    _list_blocks[(programs,)](pairs, turns, most, Order(num_heads, num_blocks, together, stretches, most))
    return [[tuple(pair) for pair in row[:n].tolist()] for row, n in zip(pairs, turns.tolist(), strict=True)]


def line_of(num_heads, num_blocks, together):
    """All (head, block) pairs, in the order in which programs take them."""
    stretches = [range(g, min(g + together, num_heads)) for g in range(0, num_heads, together)]
    line = []
    for left, heads in enumerate(reversed(stretches)):
        blocks = range(num_blocks) if left % 2 else reversed(range(num_blocks))
        line[:0] = [(head, block) for block in blocks for head in heads]
    return line


def by_formula(num_heads, num_blocks, programs, together):
    """What `taken` returns, written once more: the interpreter is too slow for large shapes."""
    line = line_of(num_heads, num_blocks, together)
    found = [[] for _ in range(programs)]
    turns = [line[k : k + programs] for k in range(0, len(line), programs)]
    for left, turn in enumerate(reversed(turns)):
        for x, pair in enumerate(turn):
            found[x if left % 2 else programs - 1 - x].insert(0, pair)
    return found


def cost(block):
    return block + 2  # key tiles of 128 under a causal mask, and the beginning and the end of a block


def greedy(num_heads, num_blocks, programs):
    """The most loaded program if each block goes to the least loaded one: 8 heads at a time, long blocks first."""
    loads = [0] * programs
    for group in range(0, num_heads, 8):
        for block in reversed(range(num_blocks)):
            for _ in range(group, min(group + 8, num_heads)):
                heapq.heapreplace(loads, loads[0] + cost(block))
    return max(loads)


@pytest.mark.parametrize(("num_heads", "num_blocks", "programs", "together"), SHAPES)
def test_every_block_is_taken_once_in_the_order_of_the_formula(num_heads, num_blocks, programs, together):
    found = taken(num_heads, num_blocks, programs, together)
    assert found == by_formula(num_heads, num_blocks, programs, together)
    every = [(head, block) for head in range(num_heads) for block in range(num_blocks)]
    assert sorted(pair for program in found for pair in program) == every


@pytest.mark.parametrize("programs", [132, 114, 16])
@pytest.mark.parametrize("num_blocks", [2, 8, 13, 16, 32, 64, 100, 128])
@pytest.mark.parametrize("num_heads", [8, 12, 16, 25, 32, 64, 128])
def test_programs_are_as_evenly_loaded_as_by_a_greedy_choice(num_heads, num_blocks, programs):
    programs = min(programs, num_heads * num_blocks)
    together = heads_together(num_heads, num_blocks, uneven=True)
    taken = by_formula(num_heads, num_blocks, programs, together)
    loads = [sum(cost(block) for _, block in program) for program in taken]
    assert max(loads) <= 1.09 * greedy(num_heads, num_blocks, programs) + 1


def test_the_numbers_of_an_order():
    assert order_of(32, 64, 132, uneven=True) == Order(32, 64, 8, 4, 16)
    assert order_of(3, 5, 15, uneven=False) == Order(3, 5, 3, 1, 1)


def test_how_many_heads_share_a_stretch():
    assert heads_together(32, 64, uneven=True) == 8
    assert heads_together(128, 8, uneven=True) == 32
    assert heads_together(128, 8, uneven=False) == 8
    assert heads_together(3, 200, uneven=True) == 3
