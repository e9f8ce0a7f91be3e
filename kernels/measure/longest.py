"""The longest query and key of each head: one launch that reads both once."""

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ..shared.descriptors import strided
from ..shared.launch import launch
from ..shared.plan import Plan
from ..shared.tiles import block_dim, ceil_div
from .lengths import lengths

_BLOCK, _COLUMNS = 128, 64  # rows and columns that a program loads at once
_PROGRAMS, _LEAST_BLOCKS = 2048, 4  # that fill a large card; blocks that are worth the start of a program


@dataclass(frozen=True, repr=False)
class LongestPlan(Plan):
    """What the kernel is compiled for."""

    head_dim: int
    block: int
    block_d: int
    columns: int
    has_padding: bool = False  # `lengths` could skip rows


@functools.cache
def _plan(head_dim: int) -> LongestPlan:
    width = block_dim(head_dim)
    return LongestPlan(head_dim, _BLOCK, width, min(width, _COLUMNS))


@triton.jit
def _raise_to(square_ptr, x, head, batch, length, PLAN: tl.constexpr):
    """Raise the number of one head of x by this program's share of its rows; inf if one is NaN or inf."""
    pointers = x.ptr + head.to(tl.int64) * x.stride_h
    slot, slots = tl.program_id(0), tl.num_programs(0)
    _, top, broken = lengths(pointers, x, None, 0, 0, batch, length, 0, length, slot, slots, PLAN)
    top = tl.where(broken > 0, float("inf"), tl.maximum(top, 0.0))
    # Numbers that are not negative are ordered as their bits are.
    tl.atomic_max(square_ptr.to(tl.pointer_type(tl.int32)), top.to(tl.int32, bitcast=True))


@triton.jit(do_not_specialize=["batch", "heads", "num_queries", "num_keys"])
def _longest_kernel(squares_ptr, q, k, batch, heads, num_queries, num_keys, PLAN: tl.constexpr):
    """Squared lengths of the longest rows: those of the query heads, then those of the key heads."""
    head = tl.program_id(1)
    if head < heads:
        _raise_to(squares_ptr + head, q, head, batch, num_queries, PLAN)
    else:
        _raise_to(squares_ptr + head, k, head - heads, batch, num_keys, PLAN)


def longest_squares(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """The squared lengths of the longest query and key of each head, (H + H_kv,) fp32; inf beside NaN or inf.

    query (B, H, M, D), key (B, H_kv, N, D); D <= 256; fp16, bf16 or fp32; any strides, but an inner stride other than 1
    is copied. 0 for heads without rows.
    """
    batch, heads, num_queries, head_dim = query.shape
    kv_heads, num_keys = key.shape[1:3]
    query, key = (x if x.stride(3) == 1 else x.contiguous() for x in (query, key))
    squares = torch.zeros(heads + kv_heads, dtype=torch.float32, device=query.device)
    blocks = batch * ceil_div(max(num_queries, num_keys), _BLOCK)
    slots = min(ceil_div(_PROGRAMS, heads + kv_heads), ceil_div(blocks, _LEAST_BLOCKS))
    if slots:
        launch(
            _longest_kernel,
            (slots, heads + kv_heads, 1),
            _plan(head_dim),
            query.device,
            {"squares_ptr": squares, "q": strided(query), "k": strided(key)},
            {"batch": batch, "heads": heads, "num_queries": num_queries, "num_keys": num_keys},
            num_warps=4,
        )
    return squares
