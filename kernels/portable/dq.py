"""dq, and the additive mask's gradient: every query block walks the keys it sees once more."""

import triton
import triton.language as tl

from ..shared.softmax import NO_MASK, key_range, load_rows, load_tile, scheduled_block
from .gradient import softmax_gradient, softmax_weights, walk_bounds, walk_position


@triton.jit
def _walk_keys(
    dq,
    q,
    do,
    k_desc,
    v_desc,
    tiles,
    batch,
    kv_head,
    offs_m,
    scaled_lse,
    offset,
    scaled_d_entropy,
    num_queries,
    num_keys,
    scale,
    softcap,
    window,
    bounds_ptr,
    mask_ptr,
    stride_mask_m,
    stride_mask_n,
    d_scores_ptr,
    BLOCK_N: tl.constexpr,
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
    HAS_D_SCORES: tl.constexpr,
    MASKED: tl.constexpr,
):
    BOTH_ENDS: tl.constexpr = WINDOWED or PACKED
    begin, end = walk_bounds(tiles, BOTH_ENDS, MASKED)
    for start in tl.range(begin, end, BLOCK_N):
        start_n = walk_position(start, tiles, BOTH_ENDS, MASKED)
        # Loads that follow each other share one barrier.
        k = load_tile(k_desc, batch, kv_head, start_n, BLOCK_N, BLOCK_D)
        v = k
        if HAS_D_OUT:
            v = load_tile(v_desc, batch, kv_head, start_n, BLOCK_N, BLOCK_DV)
        qk = tl.dot(q, k.T, input_precision="ieee")
        dp = 0.0
        if HAS_D_OUT:
            dp = tl.dot(do, v.T, input_precision="ieee")
        offs_n = start_n + tl.arange(0, BLOCK_N)
        p, t, slope = softmax_weights(
            qk,
            offs_m[:, None],
            offs_n[None, :],
            scaled_lse,
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
        ds, d_score = softmax_gradient(
            p, t, slope, dp, offset, scaled_d_entropy, SOFTCAP, HAS_D_ENTROPY, MASKED
        )
        if HAS_D_SCORES:
            inside = (offs_m[:, None] < num_queries) & (offs_n[None, :] < num_keys)
            pointers = d_scores_ptr + offs_m[:, None].to(tl.int64) * num_keys + offs_n[None, :]
            tl.store(pointers, d_score.to(d_scores_ptr.dtype.element_ty), mask=inside)
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
    return dq


@triton.jit(do_not_specialize=["window"])
def dq_kernel(
    q_desc,
    k_desc,
    v_desc,
    do_desc,
    dq_ptr,
    d_scores_ptr,
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
    HEAD_GROUP: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
    PACKED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    MASK: tl.constexpr,
    NATURAL: tl.constexpr,
    HAS_D_OUT: tl.constexpr,
    HAS_D_ENTROPY: tl.constexpr,
    HAS_D_SCORES: tl.constexpr,
):
    """dq of one block of queries, and d_scores (B, H, M, N) if wanted; `num_bh`, `heads` count query heads."""
    start_m, bh = scheduled_block(num_queries, BLOCK_M, HEAD_GROUP, True)
    if bh >= num_bh:
        return
    batch, head = bh // heads, bh % heads
    kv_head = head // GROUP
    offs_m = start_m + tl.arange(0, BLOCK_M)
    inside = offs_m < num_queries
    row = bh.to(tl.int64) * num_queries + offs_m
    if MASK != NO_MASK:
        mask_ptr += batch.to(tl.int64) * stride_mask_b + head.to(tl.int64) * stride_mask_h
    if HAS_D_SCORES:
        d_scores_ptr += bh.to(tl.int64) * num_queries * num_keys
    q = load_tile(q_desc, batch, head, start_m, BLOCK_M, BLOCK_D)
    do = q
    if HAS_D_OUT:
        do = load_tile(do_desc, batch, head, start_m, BLOCK_M, BLOCK_DV)
    scaled_lse = load_rows(scaled_lse_desc, bh, start_m, BLOCK_M)[:, None]
    offset = load_rows(offset_desc, bh, start_m, BLOCK_M)[:, None]
    scaled_d_entropy = 0.0
    if HAS_D_ENTROPY:
        scaled_d_entropy = load_rows(scaled_d_entropy_desc, bh, start_m, BLOCK_M)[:, None]
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    tiles = key_range(
        start_m,
        num_queries,
        num_keys,
        window,
        bounds_ptr,
        BLOCK_M,
        BLOCK_N,
        CAUSAL,
        WINDOWED,
        PACKED,
        MASK,
    )
    for masked in tl.static_range(2):
        # A user mask leaves no tile that needs no masking.
        if masked or MASK == NO_MASK:
            dq = _walk_keys(
                dq,
                q,
                do,
                k_desc,
                v_desc,
                tiles,
                batch,
                kv_head,
                offs_m,
                scaled_lse,
                offset,
                scaled_d_entropy,
                num_queries,
                num_keys,
                scale,
                softcap,
                window,
                bounds_ptr,
                mask_ptr,
                stride_mask_m,
                stride_mask_n,
                d_scores_ptr,
                BLOCK_N,
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
                HAS_D_SCORES,
                masked == 1,
            )
    offs_d = tl.arange(0, BLOCK_D)
    pointers = dq_ptr + row[:, None] * HEAD_DIM + offs_d[None, :]
    dq = (dq * scale).to(dq_ptr.dtype.element_ty)
    tl.store(pointers, dq, mask=inside[:, None] & (offs_d[None, :] < HEAD_DIM))
