"""Packed sequences: the bounds of each row's sequence, computed on the device in one launch."""

import torch
import triton
import triton.language as tl

from .launch import launch
from .tiles import ceil_div

BLOCK = 256  # positions of a program


@triton.jit
def clamp(edge, length):
    """An edge of a sequence, whatever the caller's tensor holds: int32 within 0 .. length."""
    return tl.minimum(tl.maximum(edge, 0), length).to(tl.int32)


@triton.jit
def count_at_most(pointer, size, value, steps):
    """How many of `size` numbers in rising order are at most `value`, by bisection. steps: the bits of `size`."""
    low = tl.zeros_like(value)
    high = low + size
    for _ in tl.range(0, steps):
        searching = low < high
        middle = (low + high) // 2
        counts = tl.load(pointer + middle, mask=searching, other=0) <= value
        low = tl.where(searching & counts, middle + 1, low)
        high = tl.where(searching & (counts == 0), middle, high)
    return low


@triton.jit
def store_bounds(bounds_ptr, seqlens_ptr, part, num_sequences, steps, length, BLOCK: tl.constexpr):
    """The bounds of BLOCK positions; the first part stores the number of sequences, too."""
    offs = tl.arange(0, BLOCK)
    position = part * BLOCK + offs
    # As many sequences end at or before a position as come before the one that holds it.
    index = count_at_most(seqlens_ptr + 1, num_sequences, position, steps)
    first = clamp(tl.load(seqlens_ptr + index), length)
    end = clamp(tl.load(seqlens_ptr + tl.minimum(index + 1, num_sequences)), length)
    tl.store(bounds_ptr + position, first, mask=position < length)
    tl.store(bounds_ptr + length + position, end, mask=position < length)
    if part == 0:
        held = tl.zeros([BLOCK], tl.int32)
        for start in tl.range(0, num_sequences, BLOCK):
            inside = start + offs < num_sequences
            # New names: a variable that a loop assigns must keep its type, and `first` and `end` have another one.
            begins = tl.load(seqlens_ptr + start + offs, mask=inside, other=0)
            ends = tl.load(seqlens_ptr + start + offs + 1, mask=inside, other=0)
            held += (clamp(ends, length) > clamp(begins, length)).to(tl.int32)
        tl.store(bounds_ptr + 2 * length, tl.sum(held, 0))


# Every step brings a pack of other lengths, so the kernel is not specialised on its numbers.
@triton.jit(do_not_specialize=["num_sequences", "steps", "length"])
def _bounds_kernel(bounds_ptr, seqlens_ptr, num_sequences, steps, length, BLOCK: tl.constexpr):
    store_bounds(bounds_ptr, seqlens_ptr, tl.program_id(0), num_sequences, steps, length, BLOCK)


def new_bounds(seqlens: torch.Tensor, length: int) -> torch.Tensor:
    """Memory for what `sequence_bounds` returns."""
    return torch.empty(2 * length + 1, dtype=torch.int32, device=seqlens.device)


def sequence_bounds(seqlens: torch.Tensor | None, length: int) -> torch.Tensor | None:
    """A table for `masks.load_bounds` and `masks.load_num_sequences`, or None without seqlens.

    int32 (2 * length + 1,): of each position 0 .. length - 1 its sequence's first key, then its sequence's end, then
    how many sequences hold a token. Whatever `seqlens` holds, keys stay within 0 .. length.
    """
    if seqlens is None:
        return None
    bounds = new_bounds(seqlens, length)
    num_sequences = len(seqlens) - 1
    launch(
        _bounds_kernel,
        (ceil_div(length, BLOCK), 1, 1),
        BLOCK,
        seqlens.device,
        {"bounds_ptr": bounds, "seqlens_ptr": seqlens.contiguous()},
        {"num_sequences": num_sequences, "steps": num_sequences.bit_length(), "length": length},
        num_warps=4,
    )
    return bounds
