"""Squared lengths of queries and keys, and which tensors hold NaN or inf: what the fold reads beside the rows."""

import triton
import triton.language as tl


@triton.jit
def load_columns(pointers, columns, inside, HEAD_DIM: tl.constexpr):
    """Some columns of the rows at `pointers`, fp32; zeros of rows that are not inside."""
    mask = inside[:, None] & (columns < HEAD_DIM)[None, :]
    return tl.load(pointers[:, None] + columns[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def without_nan(squares):
    return tl.where(squares == squares, squares, 0.0).to(tl.float64)


@triton.jit
def largest(squares, inside):
    """The maximum over a block. A vector of maxima, kept until the end, would take too many registers."""
    return tl.max(tl.where(inside & (squares == squares), squares, -float("inf")), 0)


@triton.jit
def is_broken(number):
    """Whether a number is NaN or inf: their product with 0 is NaN. x - x may be fused with a product that x is."""
    return number * 0.0 != 0.0


@triton.jit
def lengths(
    x_ptr,
    x,
    skip_ptr,
    skip_stride_b,
    skip_stride_m,
    batch,
    length,
    first,
    end,
    slot,
    slots,
    PLAN: tl.constexpr,
):
    """Of this slot's share of the rows of one head of x: sum and maximum of squared lengths, number of broken rows.

    Rows at `end` or later, and those that are skipped, have length 0. The sum leaves out those before `first` too.
    """
    total = tl.full([PLAN.block], 0.0, tl.float64)
    broken = tl.full([PLAN.block], 0, tl.int32)
    top = -float("inf")
    blocks = tl.cdiv(length, PLAN.block)
    BLOCK_D: tl.constexpr = PLAN.block_d
    COLUMNS: tl.constexpr = PLAN.columns
    for work in tl.range(slot, batch * blocks, slots):
        b = (work // blocks).to(tl.int64)
        row = work % blocks * PLAN.block + tl.arange(0, PLAN.block)
        pointers = x_ptr + b * x.stride_b + row.to(tl.int64) * x.stride_m
        counts = row < end
        if PLAN.has_padding:
            skipped = tl.load(skip_ptr + b * skip_stride_b + row * skip_stride_m, mask=row < length, other=1)
            counts = counts & (skipped == 0)
        squares = tl.full([PLAN.block], 0.0, tl.float32)
        for start in tl.static_range(0, BLOCK_D, COLUMNS):
            values = load_columns(pointers, start + tl.arange(0, COLUMNS), row < length, PLAN.head_dim)
            squares += tl.sum(values * values, 1)
        broken += is_broken(squares).to(tl.int32)
        squares = tl.where(counts, squares, 0.0)
        total += tl.where(row >= first, without_nan(squares), 0.0)
        top = tl.maximum(top, largest(squares, row < length))
    return tl.sum(total, 0), top, tl.sum(broken, 0)


@triton.jit
def broken_values(value_ptr, stride_b, stride_n, batch, num_keys, slot, slots, PLAN: tl.constexpr):
    """How many values of one head are NaN or inf, of this slot's share."""
    broken = tl.full([PLAN.block], 0, tl.int32)
    blocks = tl.cdiv(num_keys, PLAN.block)
    for work in tl.range(slot, batch * blocks, slots):
        n = work % blocks * PLAN.block + tl.arange(0, PLAN.block)
        pointers = value_ptr + (work // blocks).to(tl.int64) * stride_b + n * stride_n
        broken += is_broken(tl.load(pointers, mask=n < num_keys, other=0.0).to(tl.float32)).to(tl.int32)
    return tl.sum(broken, 0).to(tl.float32)
