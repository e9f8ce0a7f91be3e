"""dk and dv: every key block walks the queries that see it, of all the heads that share its key head.

Tiles are transposed (keys x queries), so that P^T and dS^T come out of one product in the registers
that the next one reads them from.
"""

import triton
import triton.language as tl

from ..shared.softmax import NO_MASK, load_rows, load_tile, scheduled_block
from .gradient import query_range, softmax_gradient, softmax_weights, walk_bounds, walk_position


@triton.jit
def _walk_queries(
    dk,
    dv,
    k,
    v,
    q_desc,
    do_desc,
    tiles,
    batch,
    head,
    bh,
    offs_n,
    scaled_lse_desc,
    offset_desc,
    scaled_d_entropy_desc,
    num_queries,
    num_keys,
    scale,
    softcap,
    window,
    bounds_ptr,
    mask_ptr,
    stride_mask_m,
    stride_mask_n,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
    PACKED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    MASK: tl.constexpr,
    NATURAL: tl.constexpr,
    HAS_D_OUT: tl.constexpr,
    HAS_D_ENTROPY: tl.constexpr,
    MASKED: tl.constexpr,
):
    BOTH_ENDS: tl.constexpr = CAUSAL or WINDOWED or PACKED
    begin, end = walk_bounds(tiles, BOTH_ENDS, MASKED)
    for start in tl.range(begin, end, BLOCK_M):
        start_m = walk_position(start, tiles, BOTH_ENDS, MASKED)
        offs_m = start_m + tl.arange(0, BLOCK_M)
        # Loads that follow each other share one barrier.
        q = load_tile(q_desc, batch, head, start_m, BLOCK_M, BLOCK_D)
        do = q
        if HAS_D_OUT:
            do = load_tile(do_desc, batch, head, start_m, BLOCK_M, BLOCK_DV)
        qk = tl.dot(k, q.T, input_precision="ieee")
        dp = 0.0
        if HAS_D_OUT:
            dp = tl.dot(v, do.T, input_precision="ieee")
        scaled_lse = load_rows(scaled_lse_desc, bh, start_m, BLOCK_M)
        offset = load_rows(offset_desc, bh, start_m, BLOCK_M)
        scaled_d_entropy = 0.0
        if HAS_D_ENTROPY:
            scaled_d_entropy = load_rows(scaled_d_entropy_desc, bh, start_m, BLOCK_M)[None, :]
        p, t, slope = softmax_weights(
            qk,
            offs_m[None, :],
            offs_n[:, None],
            scaled_lse[None, :],
            num_queries,
            num_keys,
            scale,
            softcap,
            window,
            bounds_ptr,
            mask_ptr,
            stride_mask_m,
            stride_mask_n,
            CAUSAL,
            WINDOWED,
            PACKED,
            SOFTCAP,
            MASK,
            NATURAL,
            MASKED,
        )
        # Issued before ds is computed, so that the product and the arithmetic overlap.
        if HAS_D_OUT:
            dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
        ds, _ = softmax_gradient(
            p, t, slope, dp, offset[None, :], scaled_d_entropy, SOFTCAP, HAS_D_ENTROPY, MASKED
        )
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    return dk, dv


@triton.jit(do_not_specialize=["window"])
def dkv_kernel(
    q_desc,
    k_desc,
    v_desc,
    do_desc,
    dk_ptr,
    dv_ptr,
    scaled_lse_desc,
    offset_desc,
    scaled_d_entropy_desc,
    bounds_ptr,
    mask_ptr,
    stride_mask_b,
    stride_mask_h,
    stride_mask_m,
    stride_mask_n,
    num_bh,
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
    HEAD_GROUP: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
    PACKED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    MASK: tl.constexpr,
    NATURAL: tl.constexpr,
    HAS_D_OUT: tl.constexpr,
    HAS_D_ENTROPY: tl.constexpr,
):
    """dk and dv of one block of keys; `num_bh` and `kv_heads` count key heads."""
    start_n, bh = scheduled_block(num_keys, BLOCK_N, HEAD_GROUP, False)
    if bh >= num_bh:
        return
    batch, kv_head = bh // kv_heads, bh % kv_heads
    offs_n = start_n + tl.arange(0, BLOCK_N)
    k = load_tile(k_desc, batch, kv_head, start_n, BLOCK_N, BLOCK_D)
    v = k
    if HAS_D_OUT:
        v = load_tile(v_desc, batch, kv_head, start_n, BLOCK_N, BLOCK_DV)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    tiles = query_range(
        start_n, num_queries, window, bounds_ptr, BLOCK_M, BLOCK_N, CAUSAL, WINDOWED, PACKED, MASK
    )
    for member in tl.range(0, GROUP):
        head = kv_head * GROUP + member
        head_mask_ptr = mask_ptr
        if MASK != NO_MASK:
            head_mask_ptr += batch.to(tl.int64) * stride_mask_b + head.to(tl.int64) * stride_mask_h
        for masked in tl.static_range(2):
            # A user mask leaves no tile that needs no masking.
            if masked or MASK == NO_MASK:
                dk, dv = _walk_queries(
                    dk,
                    dv,
                    k,
                    v,
                    q_desc,
                    do_desc,
                    tiles,
                    batch,
                    head,
                    batch * (kv_heads * GROUP) + head,
                    offs_n,
                    scaled_lse_desc,
                    offset_desc,
                    scaled_d_entropy_desc,
                    num_queries,
                    num_keys,
                    scale,
                    softcap,
                    window,
                    bounds_ptr,
                    head_mask_ptr,
                    stride_mask_m,
                    stride_mask_n,
                    BLOCK_M,
                    BLOCK_D,
                    BLOCK_DV,
                    CAUSAL,
                    WINDOWED,
                    PACKED,
                    SOFTCAP,
                    MASK,
                    NATURAL,
                    HAS_D_OUT,
                    HAS_D_ENTROPY,
                    masked == 1,
                )
    inside_keys = (offs_n < num_keys)[:, None]
    row = (bh.to(tl.int64) * num_keys + offs_n)[:, None]
    offs_d = tl.arange(0, BLOCK_D)[None, :]
    dk = (dk * scale).to(dk_ptr.dtype.element_ty)
    tl.store(dk_ptr + row * HEAD_DIM + offs_d, dk, mask=inside_keys & (offs_d < HEAD_DIM))
    if HAS_D_OUT:
        offs_dv = tl.arange(0, BLOCK_DV)[None, :]
        dv = dv.to(dv_ptr.dtype.element_ty)
        tl.store(dv_ptr + row * VALUE_DIM + offs_dv, dv, mask=inside_keys & (offs_dv < VALUE_DIM))
