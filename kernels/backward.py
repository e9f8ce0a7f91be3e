"""dq, dk, dv from the cotangents of out, lse and entropy: no atomics, so every run gives the same bits.

With log p = s - lse and delta'' of `reference.softmax_offset`:
    ds = p * (dp - dentropy * log p - delta''),   dp = do v^T.
One kernel walks the keys of a query block for dq; the other walks the queries (of every head that
shares the key head) of a key block for dk and dv.
"""

import torch
import triton
import triton.language as tl

from .. import reference
from ..masks import sequence_bounds
from .configs import backward_tiles
from .primitives import (
    LOG2_E,
    NO_MASK,
    bend_and_mask,
    block_dim,
    describe,
    key_range,
    load_bounds,
    load_tile,
    mask_arguments,
)


@triton.jit
def _row_dot_kernel(a_ptr, b_ptr, out_ptr, num_rows, width, ROWS: tl.constexpr, COLS: tl.constexpr):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLS)
    offsets = rows[:, None] * width + columns[None, :]
    inside = (rows[:, None] < num_rows) & (columns[None, :] < width)
    a = tl.load(a_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(b_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + rows, tl.sum(a * b, 1), mask=rows < num_rows)


def _row_dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """(a * b).sum(-1) in fp32 without an fp32 copy of either."""
    a, b = a.contiguous(), b.contiguous()
    out = torch.empty(a.shape[:-1], dtype=torch.float32, device=a.device)
    grid = (triton.cdiv(out.numel(), 32),)
    _row_dot_kernel[grid](a, b, out, out.numel(), a.shape[-1], ROWS=32, COLS=block_dim(a.shape[-1]))
    return out


@triton.jit
def _weights_and_ds(
    qk,
    dp,
    rows,
    columns,
    first_key,
    end_key,
    lse,
    offset,
    d_entropy,
    num_queries,
    scale,
    softcap,
    window,
    mask_ptr,
    stride_mask_m,
    stride_mask_n,
    CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
    PACKED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    MASK: tl.constexpr,
    HAS_D_ENTROPY: tl.constexpr,
):
    """p and d loss / d (scale * q.k) of one tile, in either orientation."""
    s, seen, slope = bend_and_mask(
        qk * scale,
        rows,
        columns,
        first_key,
        end_key,
        num_queries,
        window,
        softcap,
        mask_ptr,
        stride_mask_m,
        stride_mask_n,
        CAUSAL,
        WINDOWED,
        PACKED,
        SOFTCAP,
        MASK,
        True,
    )
    log_p = tl.where(seen, s - lse, 0.0)
    p = tl.where(seen, tl.exp2(log_p * LOG2_E), 0.0)
    inner = dp - offset
    if HAS_D_ENTROPY:
        inner -= d_entropy * log_p
    return p, tl.where(seen, p * inner * slope, 0.0)


@triton.jit(do_not_specialize=["window"])
def _dq_kernel(
    q_desc,
    k_desc,
    v_desc,
    do_desc,
    dq_ptr,
    lse_ptr,
    offset_ptr,
    d_entropy_ptr,
    bounds_ptr,
    mask_ptr,
    stride_mask_b,
    stride_mask_h,
    stride_mask_m,
    stride_mask_n,
    heads,
    num_queries,
    num_keys,
    scale,
    softcap,
    window,
    HEAD_DIM: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
    PACKED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    MASK: tl.constexpr,
    HAS_D_ENTROPY: tl.constexpr,
    HAS_D_OUT: tl.constexpr,
):
    num_blocks = tl.cdiv(num_queries, BLOCK_M)
    bh = tl.program_id(0) // num_blocks
    start_m = (num_blocks - 1 - tl.program_id(0) % num_blocks) * BLOCK_M
    batch, head = bh // heads, bh % heads
    kv_head = head // GROUP
    offs_m = start_m + tl.arange(0, BLOCK_M)
    inside = offs_m < num_queries
    row = bh.to(tl.int64) * num_queries + offs_m
    if MASK != NO_MASK:
        mask_ptr += batch.to(tl.int64) * stride_mask_b + head.to(tl.int64) * stride_mask_h
    q = load_tile(q_desc, batch, head, start_m, BLOCK_M, BLOCK_D)
    lse = tl.load(lse_ptr + row, mask=inside, other=0.0)[:, None]
    offset = tl.load(offset_ptr + row, mask=inside, other=0.0)[:, None]
    d_entropy = 0.0
    if HAS_D_ENTROPY:
        d_entropy = tl.load(d_entropy_ptr + row, mask=inside, other=0.0)[:, None]
    if HAS_D_OUT:
        do = load_tile(do_desc, batch, head, start_m, BLOCK_M, BLOCK_DV)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    first_key, end_key = 0, num_keys
    if PACKED:
        first_key, end_key = load_bounds(bounds_ptr, offs_m, num_queries)
    lo, _full_lo, _full_hi, hi = key_range(
        start_m, first_key, end_key, window, BLOCK_M, BLOCK_N, CAUSAL, WINDOWED, PACKED, MASK
    )
    for start_n in tl.range(lo, hi, BLOCK_N):
        k = load_tile(k_desc, batch, kv_head, start_n, BLOCK_N, BLOCK_D)
        qk = tl.dot(q, k.T, input_precision="ieee")
        if HAS_D_OUT:
            v = load_tile(v_desc, batch, kv_head, start_n, BLOCK_N, BLOCK_DV)
            dp = tl.dot(do, v.T, input_precision="ieee")
        else:
            dp = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        offs_n = start_n + tl.arange(0, BLOCK_N)
        _p, ds = _weights_and_ds(
            qk,
            dp,
            offs_m[:, None],
            offs_n[None, :],
            first_key[:, None] if PACKED else first_key,
            end_key[:, None] if PACKED else end_key,
            lse,
            offset,
            d_entropy,
            num_queries,
            scale,
            softcap,
            window,
            mask_ptr,
            stride_mask_m,
            stride_mask_n,
            CAUSAL,
            WINDOWED,
            PACKED,
            SOFTCAP,
            MASK,
            HAS_D_ENTROPY,
        )
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
    offs_d = tl.arange(0, BLOCK_D)
    pointers = dq_ptr + row[:, None] * HEAD_DIM + offs_d[None, :]
    dq = (dq * scale).to(dq_ptr.dtype.element_ty)
    tl.store(pointers, dq, mask=inside[:, None] & (offs_d[None, :] < HEAD_DIM))


@triton.jit(do_not_specialize=["window"])
def _dkv_kernel(
    q_desc,
    k_desc,
    v_desc,
    do_desc,
    dk_ptr,
    dv_ptr,
    lse_ptr,
    offset_ptr,
    d_entropy_ptr,
    bounds_ptr,
    mask_ptr,
    stride_mask_b,
    stride_mask_h,
    stride_mask_m,
    stride_mask_n,
    kv_heads,
    num_queries,
    num_keys,
    scale,
    softcap,
    window,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
    PACKED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    MASK: tl.constexpr,
    HAS_D_ENTROPY: tl.constexpr,
    HAS_D_OUT: tl.constexpr,
):
    num_blocks = tl.cdiv(num_keys, BLOCK_N)
    bh = tl.program_id(0) // num_blocks
    start_n = (tl.program_id(0) % num_blocks) * BLOCK_N
    batch, kv_head = bh // kv_heads, bh % kv_heads
    offs_n = start_n + tl.arange(0, BLOCK_N)
    k = load_tile(k_desc, batch, kv_head, start_n, BLOCK_N, BLOCK_D)
    if HAS_D_OUT:
        v = load_tile(v_desc, batch, kv_head, start_n, BLOCK_N, BLOCK_DV)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    # The queries that see some key of this block.
    lo = 0
    hi = num_queries
    if CAUSAL:
        lo = start_n // BLOCK_M * BLOCK_M
    if WINDOWED:
        hi = tl.minimum(hi, start_n + BLOCK_N - 1 + window)
        if not CAUSAL:
            lo = tl.maximum(start_n - window + 1, 0) // BLOCK_M * BLOCK_M
    if PACKED:
        # Queries and keys share positions: the queries of a key's sequence are its own bounds.
        first_query, end_query = load_bounds(bounds_ptr, offs_n, num_keys)
        lo = tl.maximum(tl.min(first_query, 0) // BLOCK_M * BLOCK_M, lo)
        hi = tl.minimum(tl.max(end_query, 0), hi)
    for member in tl.range(0, GROUP):
        head = kv_head * GROUP + member
        first_row = (batch * (kv_heads * GROUP) + head).to(tl.int64) * num_queries
        head_mask_ptr = mask_ptr
        if MASK != NO_MASK:
            head_mask_ptr += batch.to(tl.int64) * stride_mask_b + head.to(tl.int64) * stride_mask_h
        for start_m in tl.range(lo, hi, BLOCK_M):
            offs_m = start_m + tl.arange(0, BLOCK_M)
            inside = offs_m < num_queries
            first_key, end_key = 0, num_keys
            if PACKED:
                first_key, end_key = load_bounds(bounds_ptr, offs_m[None, :], num_queries)
            q = load_tile(q_desc, batch, head, start_m, BLOCK_M, BLOCK_D)
            qk = tl.dot(k, q.T, input_precision="ieee")
            lse = tl.load(lse_ptr + first_row + offs_m, mask=inside, other=0.0)[None, :]
            offset = tl.load(offset_ptr + first_row + offs_m, mask=inside, other=0.0)[None, :]
            d_entropy = 0.0
            if HAS_D_ENTROPY:
                d_entropy = tl.load(d_entropy_ptr + first_row + offs_m, mask=inside, other=0.0)[None, :]
            if HAS_D_OUT:
                do = load_tile(do_desc, batch, head, start_m, BLOCK_M, BLOCK_DV)
                dp = tl.dot(v, do.T, input_precision="ieee")
            else:
                dp = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
            p, ds = _weights_and_ds(
                qk,
                dp,
                offs_m[None, :],
                offs_n[:, None],
                first_key,
                end_key,
                lse,
                offset,
                d_entropy,
                num_queries,
                scale,
                softcap,
                window,
                head_mask_ptr,
                stride_mask_m,
                stride_mask_n,
                CAUSAL,
                WINDOWED,
                PACKED,
                SOFTCAP,
                MASK,
                HAS_D_ENTROPY,
            )
            if HAS_D_OUT:
                dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    inside_keys = (offs_n < num_keys)[:, None]
    row = (bh.to(tl.int64) * num_keys + offs_n)[:, None]
    offs_d = tl.arange(0, BLOCK_D)[None, :]
    dk = (dk * scale).to(dk_ptr.dtype.element_ty)
    tl.store(dk_ptr + row * HEAD_DIM + offs_d, dk, mask=inside_keys & (offs_d < HEAD_DIM))
    if HAS_D_OUT:
        offs_dv = tl.arange(0, BLOCK_DV)[None, :]
        dv = dv.to(dv_ptr.dtype.element_ty)
        tl.store(dv_ptr + row * VALUE_DIM + offs_dv, dv, mask=inside_keys & (offs_dv < VALUE_DIM))


def backward(query, key, value, options, out, lse, entropy, d_out, d_lse, d_entropy, tiles=None):
    """`reference.backward` on the device: same arguments and result, D and D_v up to 256, not fp64."""
    batch, heads, num_queries, head_dim = query.shape
    kv_heads, num_keys = key.shape[1:3]
    has_d_out = value is not None and d_out is not None
    d_query, d_key = (torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (query, key))
    d_value = None if value is None else torch.zeros(value.shape, dtype=value.dtype, device=value.device)
    delta = _row_dot(d_out, out) if has_d_out and out.numel() else None
    offset = reference.softmax_offset(delta, lse, entropy, d_lse, d_entropy)
    d_sinks = None
    if options.sinks is not None:
        d_sinks = reference.sink_gradient(options.sinks, lse, offset, d_entropy)
    if lse.numel() == 0 or num_keys == 0:
        return reference.Gradients(d_query, d_key, d_value, d_sinks)
    value_dim = value.shape[3] if has_d_out else 16
    tiles = tiles or backward_tiles(head_dim, value_dim, query.dtype)
    mask, mask_strides, mask_kind = mask_arguments(options.attn_mask, (batch, heads, num_queries, num_keys))
    q_desc, k_desc = describe(query, tiles.block_m), describe(key, tiles.block_n)
    descriptors = [q_desc, k_desc, k_desc, q_desc]
    if has_d_out:
        descriptors[2:] = describe(value, tiles.block_n), describe(d_out, tiles.block_m)
    rows = [
        lse,
        offset.contiguous(),
        None if d_entropy is None else d_entropy.contiguous(),
        None if options.seqlens is None else sequence_bounds(options.seqlens, slice(0, num_keys), num_keys),
        mask,
        *mask_strides,
    ]
    numbers = [num_queries, num_keys, options.scale, options.softcap or 0.0, options.window_size or 0]
    constants = {
        "HEAD_DIM": head_dim,
        "GROUP": heads // kv_heads,
        "BLOCK_M": tiles.block_m,
        "BLOCK_N": tiles.block_n,
        "BLOCK_D": block_dim(head_dim),
        "BLOCK_DV": block_dim(value_dim),
        "CAUSAL": options.is_causal,
        "WINDOWED": options.window_size is not None,
        "PACKED": options.seqlens is not None,
        "SOFTCAP": options.softcap is not None,
        "MASK": mask_kind,
        "HAS_D_ENTROPY": d_entropy is not None,
        "HAS_D_OUT": has_d_out,
        "num_warps": tiles.num_warps,
        "num_stages": tiles.num_stages,
    }
    grid = (triton.cdiv(num_queries, tiles.block_m) * batch * heads,)
    _dq_kernel[grid](*descriptors, d_query, *rows, heads, *numbers, **constants)
    grid = (triton.cdiv(num_keys, tiles.block_n) * batch * kv_heads,)
    _dkv_kernel[grid](
        *descriptors, d_key, d_value, *rows, kv_heads, *numbers, VALUE_DIM=value_dim, **constants
    )
    return reference.Gradients(d_query, d_key, d_value, d_sinks)
