"""Packed sequences: the bounds of each row's sequence, computed on the device in one launch."""

import torch
import triton
import triton.language as tl

from .launch import launch
from .tiles import ceil_div

_BLOCK = 256


@triton.jit
def _clamp(edge, length):
    return tl.minimum(tl.maximum(edge, 0), length).to(tl.int32)


# Every step brings a pack of other lengths, so the kernel is not specialised on its numbers.
@triton.jit(do_not_specialize=["num_sequences", "steps", "length"])
def _bounds_kernel(bounds_ptr, seqlens_ptr, num_sequences, steps, length, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    position = tl.program_id(0) * BLOCK + offs
    # Bisection: the number of sequences that end at or before a position is the index of the one that holds it.
    low = tl.zeros([BLOCK], tl.int32)
    high = low + num_sequences
    for _ in tl.range(0, steps):
        searching = low < high
        middle = (low + high) // 2
        ended = tl.load(seqlens_ptr + 1 + middle, mask=searching, other=0) <= position
        low = tl.where(searching & ended, middle + 1, low)
        high = tl.where(searching & (ended == 0), middle, high)
    first = _clamp(tl.load(seqlens_ptr + low), length)
    end = _clamp(tl.load(seqlens_ptr + tl.minimum(low + 1, num_sequences)), length)
    tl.store(bounds_ptr + position, first, mask=position < length)
    tl.store(bounds_ptr + length + position, end, mask=position < length)
    if tl.program_id(0) == 0:
        held = tl.zeros([BLOCK], tl.int32)
        for start in tl.range(0, num_sequences, BLOCK):
            inside = start + offs < num_sequences
            # New names: a variable that a loop assigns must keep its type, and `first` and `end` have another one.
            begins = tl.load(seqlens_ptr + start + offs, mask=inside, other=0)
            ends = tl.load(seqlens_ptr + start + offs + 1, mask=inside, other=0)
            held += (_clamp(ends, length) > _clamp(begins, length)).to(tl.int32)
        tl.store(bounds_ptr + 2 * length, tl.sum(held, 0))


def sequence_bounds(seqlens: torch.Tensor | None, length: int) -> torch.Tensor | None:
    """A table for `masks.load_bounds` and `masks.load_num_sequences`, or None without seqlens.

    int32 (2 * length + 1,): of each position 0 .. length - 1 its sequence's first key, then its sequence's end, then
    how many sequences hold a token. Whatever `seqlens` holds, keys stay within 0 .. length.
    """
    if seqlens is None:
        return None
    bounds = torch.empty(2 * length + 1, dtype=torch.int32, device=seqlens.device)
    num_sequences = len(seqlens) - 1
    launch(
        _bounds_kernel,
        (ceil_div(length, _BLOCK), 1, 1),
        _BLOCK,
        seqlens.device,
        {"bounds_ptr": bounds, "seqlens_ptr": seqlens.contiguous()},
        {"num_sequences": num_sequences, "steps": num_sequences.bit_length(), "length": length},
        num_warps=4,
    )
    return bounds
