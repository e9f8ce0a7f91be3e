"""Packed sequences: the bounds of each row's sequence, computed on the device in one launch."""

import torch
import triton
import triton.language as tl

from .launch import launch
from .tiles import ceil_div

BLOCK = 256  # positions of a program
SECTIONS = 16
_SECTIONS = tl.constexpr(SECTIONS)
LARGEST = tl.constexpr((1 << 31) - 1)  # of int32


def search_width(size: int) -> int:
    """For `count_at_most`: the least power of SECTIONS, from the first on, that is at least `size`."""
    width = SECTIONS
    while width < size:
        width *= SECTIONS
    return width


@triton.jit
def clamp(edge, length):
    """An edge of a sequence, whatever the caller's tensor holds: int32 within 0 .. length."""
    return tl.minimum(tl.maximum(edge, 0), length).to(tl.int32)


@triton.jit
def count_at_most(pointer, size, values, width):
    """How many of `size` numbers in rising order are at most each of `values`. width: of `search_width`.

    Loads wait for the loads before them, so a search looks at SECTIONS numbers at once.
    """
    found = tl.zeros_like(values)
    section = tl.arange(1, _SECTIONS + 1)[None, :]
    while width > 1:
        width = width // _SECTIONS
        last = found[:, None] + section * width - 1  # of each section
        number = tl.load(pointer + last, mask=last < size, other=LARGEST)
        found += tl.sum((number <= values[:, None]).to(tl.int32), 1) * width
    return found


@triton.jit
def store_bounds(bounds_ptr, seqlens_ptr, part, num_sequences, width, length, BLOCK: tl.constexpr):
    """The bounds of BLOCK positions; the first part stores the number of sequences, too."""
    offs = tl.arange(0, BLOCK)
    position = part * BLOCK + offs
    # As many sequences end at or before a position as come before the one that holds it.
    index = count_at_most(seqlens_ptr + 1, num_sequences, position, width)
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
@triton.jit(do_not_specialize=["num_sequences", "width", "length"])
def _bounds_kernel(bounds_ptr, seqlens_ptr, num_sequences, width, length, BLOCK: tl.constexpr):
    store_bounds(bounds_ptr, seqlens_ptr, tl.program_id(0), num_sequences, width, length, BLOCK)


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
        {"num_sequences": num_sequences, "width": search_width(num_sequences), "length": length},
        num_warps=4,
    )
    return bounds
