"""Attention output and row statistics in one pass."""

import triton
import triton.language as tl

from ...reference.attention import empty_output
from ..shared.descriptors import describe
from ..shared.launch import launch
from ..shared.softmax import block_dim, ceil_div, new_rows, scheduled_block
from ..shared.tiles import forward_tiles, grid_1d
from .attend import attend, call_arguments, finish, store_rows


@triton.jit(do_not_specialize=["window"])
def _forward_kernel(
    q_desc,
    k_desc,
    v_desc,
    out_ptr,
    lse_ptr,
    entropy_ptr,
    max_ptr,
    min_ptr,
    more_ptr,
    stride_more,
    stride_out_b,
    stride_out_h,
    stride_out_m,
    mask_ptr,
    sink_ptr,
    bounds_ptr,
    stride_mask_b,
    stride_mask_h,
    stride_mask_m,
    stride_mask_n,
    num_bh,
    heads,
    num_queries,
    num_keys,
    scale,
    softcap,
    window,
    VALUE_DIM: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HEAD_GROUP: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
    PACKED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SINKS: tl.constexpr,
    MASK: tl.constexpr,
    NATURAL: tl.constexpr,
    EXACT: tl.constexpr,
    EXTENDED: tl.constexpr,
):
    start_m, bh = scheduled_block(num_queries, BLOCK_M, HEAD_GROUP, True)
    if bh >= num_bh:
        return
    m_i, l_i, w_i, low, more, acc = attend(
        q_desc,
        k_desc,
        v_desc,
        mask_ptr,
        bounds_ptr,
        stride_mask_b,
        stride_mask_h,
        stride_mask_m,
        stride_mask_n,
        bh // heads,
        bh % heads,
        start_m,
        num_queries,
        num_keys,
        scale,
        softcap,
        window,
        GROUP,
        BLOCK_M,
        BLOCK_N,
        BLOCK_D,
        BLOCK_DV,
        CAUSAL,
        WINDOWED,
        PACKED,
        SOFTCAP,
        MASK,
        NATURAL,
        EXACT,
        EXTENDED,
        True,
    )
    core, more, normalise = finish(
        m_i, l_i, w_i, low, more, sink_ptr, bh % heads, scale, SINKS, NATURAL, EXTENDED
    )
    out = acc * normalise[:, None]
    offs_m = start_m + tl.arange(0, BLOCK_M)
    row = bh.to(tl.int64) * num_queries + offs_m
    inside = offs_m < num_queries
    store_rows(
        core, more, lse_ptr, entropy_ptr, max_ptr, min_ptr, more_ptr, stride_more, row, inside, EXTENDED
    )
    offs_d = tl.arange(0, BLOCK_DV)
    out_ptr += (bh // heads).to(tl.int64) * stride_out_b + (bh % heads).to(tl.int64) * stride_out_h
    pointers = out_ptr + offs_m[:, None].to(tl.int64) * stride_out_m + offs_d[None, :]
    inside_out = inside[:, None] & (offs_d[None, :] < VALUE_DIM)
    tl.store(pointers, out.to(out_ptr.dtype.element_ty), mask=inside_out)


def forward(query, key, value, options, tiles=None, extended=False):
    """(out, lse, entropy, max_logit, min_logit, more), the last as `primitives.new_rows` says.

    query (B, H, M, D), key (B, H_kv, N, D), value (B, H_kv, N, D_v); D, D_v <= 256; fp16, bf16 or
    fp32; any strides. Statistics are fp32 (B, H, M). `options` are validated `Options`.
    """
    batch, heads, num_queries, head_dim = query.shape
    num_keys, value_dim = value.shape[2:]
    out = empty_output(query, value_dim)
    idle = batch * heads * num_queries * num_keys == 0
    rows = new_rows((batch, heads, num_queries), query.device, extended, blank=idle)
    if idle:
        return out.zero_(), *rows
    tiles = tiles or forward_tiles(head_dim, value_dim, query.dtype, options, extended)
    shared, constants, kind, launched = call_arguments(query, key, options, extended, tiles)
    arguments = (
        describe(query, tiles.block_m),
        describe(key, tiles.block_n),
        describe(value, tiles.block_n),
        out,
        *rows,
        rows[0].numel(),
        *out.stride()[:3],
        *shared,
    )
    constants = {"VALUE_DIM": value_dim, "BLOCK_DV": block_dim(value_dim), **constants}
    grid = (grid_1d(ceil_div(num_queries, tiles.block_m), batch * heads), 1, 1)
    kind = (*kind, rows[0].numel(), out.stride())
    launch(_forward_kernel, grid, kind, arguments, constants, **launched)
    return out, *rows
