"""What the fold reads beside the row statistics, by one launch: the key that rows share, and which rows are broken."""

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ..shared.descriptors import strided
from ..shared.gate import STATISTICS, is_off
from ..shared.launch import launch
from ..shared.plan import Plan
from ..shared.tiles import block_dim, ceil_div

_KEYS = 1024  # weights that a program holds at a time
_TILE_ELEMENTS = 4096  # elements of a tile of values or outputs
_TILES = 4  # that a program checks
_ROWS = tl.constexpr(_TILES)


@dataclass(frozen=True, repr=False)
class BesidePlan(Plan):
    """What the kernel is compiled for."""

    keys: int
    value_dim: int
    block: int  # rows of a tile
    block_dv: int
    has_out: bool


@functools.cache
def _plan(value_dim: int, has_out: bool) -> BesidePlan:
    block_dv = block_dim(value_dim)
    return BesidePlan(_KEYS, value_dim, max(1, _TILE_ELEMENTS // block_dv), block_dv, has_out)


@triton.jit
def _heaviest(shared_ptr, weights_ptr, bh, num_keys, least_rows, num_queries, PLAN: tl.constexpr):
    """Store the first key with the largest weight of a head, -1 where no weight is above 0 or one is NaN."""
    offs = tl.arange(0, PLAN.keys)
    weights_ptr += bh.to(tl.int64) * num_keys
    most = tl.full([PLAN.keys], 0.0, tl.float32)
    place = tl.full([PLAN.keys], -1, tl.int32)
    broken = tl.full([PLAN.keys], 0, tl.int32)
    for start in tl.range(0, num_keys, PLAN.keys):
        n = start + offs
        weights = tl.load(weights_ptr + n, mask=n < num_keys, other=0.0)
        broken |= (weights != weights).to(tl.int32)
        place = tl.where(weights > most, n, place)
        most = tl.maximum(most, weights)
    top = tl.max(most, 0)
    found = tl.min(tl.where(most == top, place, num_keys), 0)
    none = (top <= 0.0) | (tl.max(broken, 0) > 0) | (num_queries < least_rows)
    tl.store(shared_ptr + bh, tl.where(none, -1, found).to(tl.int64))


@triton.jit
def _sizes(sizes_ptr, x, first, num_rows, heads, length, PLAN: tl.constexpr):
    """Store NaN for rows of x (B, H, L, D_v) that hold NaN or inf, and 0 for others; rows are counted through."""
    columns = tl.arange(0, PLAN.block_dv)
    for start in tl.range(first, tl.minimum(first + _ROWS * PLAN.block, num_rows), PLAN.block):
        row = start + tl.arange(0, PLAN.block)
        inside = row < num_rows
        bh, m = row // length, row % length
        offset = (bh // heads).to(tl.int64) * x.stride_b + (bh % heads).to(tl.int64) * x.stride_h
        offset += m.to(tl.int64) * x.stride_m
        mask = inside[:, None] & (columns < PLAN.value_dim)[None, :]
        values = tl.load(x.ptr + offset[:, None] + columns[None, :] * x.stride_d, mask=mask, other=0.0)
        values = values.to(tl.float32)
        bad = tl.max((values - values != 0.0).to(tl.int32), 1)
        tl.store(sizes_ptr + row, tl.where(bad != 0, float("nan"), 0.0), mask=inside)


@triton.jit(
    do_not_specialize=["heads", "kv_heads", "num_queries", "num_keys", "least_rows", "num_bh", "value_rows"]
)
def _beside_kernel(
    shared_ptr,
    weights_ptr,
    value_sizes_ptr,
    out_sizes_ptr,
    value,
    out,
    control_ptr,
    heads,
    kv_heads,
    num_queries,
    num_keys,
    least_rows,
    num_bh,
    value_rows,
    PLAN: tl.constexpr,
):
    """A program takes the weights of one (batch, head), or some rows of all values, or some of all outputs."""
    if control_ptr is not None:  # noqa: SIM102  # the compiler drops this branch, and not an `and`
        if is_off(control_ptr, STATISTICS):
            return
    program = tl.program_id(0)
    ROWS: tl.constexpr = _ROWS * PLAN.block
    of_values = tl.cdiv(value_rows, ROWS)
    if program < num_bh:
        _heaviest(shared_ptr, weights_ptr, program, num_keys, least_rows, num_queries, PLAN)
    elif program < num_bh + of_values:
        first = (program - num_bh) * ROWS
        _sizes(value_sizes_ptr, value, first, value_rows, kv_heads, num_keys, PLAN)
    elif PLAN.has_out:
        first = (program - num_bh - of_values) * ROWS
        _sizes(out_sizes_ptr, out, first, num_bh * num_queries, heads, num_queries, PLAN)


def beside(
    weights: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor | None,
    num_queries: int,
    least_rows: int,
    control: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """(shared_key, value_size, out_size) of a call: see the fold's context.

    weights: fp32 (B, H, N), contiguous. value (B, H_kv, N, D_v), out (B, H, M, D_v) or None; D_v <= 256, any strides.
    Fewer queries than least_rows share no key. Sizes are fp32 (B, H_kv, N) and (B, H, M): NaN where a row holds NaN or
    inf, else 0. control: as for `probe`.
    """
    batch, heads, num_keys = weights.shape
    kv_heads, device = value.shape[1], value.device
    shared = torch.empty(batch, heads, dtype=torch.int64, device=device)
    value_sizes = torch.empty(batch, kv_heads, num_keys, device=device)
    out_sizes = None if out is None else torch.empty(batch, heads, num_queries, device=device)
    plan = _plan(value.shape[3], out is not None)
    rows = _TILES * plan.block
    programs = batch * heads + ceil_div(value_sizes.numel(), rows)
    if out_sizes is not None:
        programs += ceil_div(out_sizes.numel(), rows)
    numbers = heads, kv_heads, num_queries, num_keys, least_rows, batch * heads, value_sizes.numel()
    names = "heads", "kv_heads", "num_queries", "num_keys", "least_rows", "num_bh", "value_rows"
    launch(
        _beside_kernel,
        (programs, 1, 1),
        plan,
        device,
        {
            "shared_ptr": shared,
            "weights_ptr": weights,
            "value_sizes_ptr": value_sizes,
            "out_sizes_ptr": out_sizes,
            "value": strided(value),
            "out": strided(out),
            "control_ptr": control,
        },
        dict(zip(names, numbers)),
        num_warps=4,
    )
    return shared, value_sizes, out_sizes
