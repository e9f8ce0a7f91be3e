"""dq, and the additive mask's gradient: every query block walks the keys it sees once more."""

import triton
import triton.language as tl

from ..shared.masks import key_range, mask_of_head
from ..shared.tiles import load_rows, load_tile, scheduled_block
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
    row,
    call,
    window,
    mask_ptr,
    d_scores_ptr,
    PLAN: tl.constexpr,
    MASKED: tl.constexpr,
):
    """dq with the keys of one range; row: (scaled_lse, offset, scaled_d_entropy) of the queries."""
    scaled_lse, offset, scaled_d_entropy = row
    BOTH_ENDS: tl.constexpr = PLAN.hides_both_ends
    begin, end = walk_bounds(tiles, BOTH_ENDS, MASKED)
    for start in tl.range(begin, end, PLAN.block_n):
        start_n = walk_position(start, tiles, BOTH_ENDS, MASKED)
        # Loads that follow each other share one barrier.
        k = load_tile(k_desc, batch, kv_head, start_n, PLAN.block_n, PLAN.block_d, PLAN.pointers)
        v = k
        if PLAN.has_d_out:
            v = load_tile(v_desc, batch, kv_head, start_n, PLAN.block_n, PLAN.block_dv, PLAN.pointers)
        qk = tl.dot(q, k.T, input_precision="ieee")
        dp = 0.0
        if PLAN.has_d_out:
            dp = tl.dot(do, v.T, input_precision="ieee")
        offs_n = start_n + tl.arange(0, PLAN.block_n)
        p, t, slope = softmax_weights(
            qk, offs_m[:, None], offs_n[None, :], scaled_lse, call, window, mask_ptr, PLAN, MASKED
        )
        ds, d_score = softmax_gradient(p, t, slope, dp, offset, scaled_d_entropy, PLAN, MASKED)
        if PLAN.has_d_scores:
            inside = (offs_m[:, None] < call.num_queries) & (offs_n[None, :] < call.num_keys)
            pointers = d_scores_ptr + offs_m[:, None].to(tl.int64) * call.num_keys + offs_n[None, :]
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
    call,
    window,
    PLAN: tl.constexpr,
):
    """dq of one block of queries, and d_scores (B, H, M, N) if wanted; `call` counts query heads."""
    start_m, bh = scheduled_block(call.num_queries, PLAN.block_m, True)
    if bh >= call.num_bh:
        return
    batch, head = bh // call.heads, bh % call.heads
    kv_head = head // PLAN.group
    offs_m = start_m + tl.arange(0, PLAN.block_m)
    inside = offs_m < call.num_queries
    row = bh.to(tl.int64) * call.num_queries + offs_m
    mask_ptr = mask_of_head(call, batch, head, PLAN)
    if PLAN.has_d_scores:
        d_scores_ptr += bh.to(tl.int64) * call.num_queries * call.num_keys
    q = load_tile(q_desc, batch, head, start_m, PLAN.block_m, PLAN.block_d, PLAN.pointers)
    do = q
    if PLAN.has_d_out:
        do = load_tile(do_desc, batch, head, start_m, PLAN.block_m, PLAN.block_dv, PLAN.pointers)
    scaled_lse = load_rows(scaled_lse_desc, bh, start_m, PLAN.block_m)[:, None]
    offset = load_rows(offset_desc, bh, start_m, PLAN.block_m)[:, None]
    scaled_d_entropy = 0.0
    if PLAN.has_d_entropy:
        scaled_d_entropy = load_rows(scaled_d_entropy_desc, bh, start_m, PLAN.block_m)[:, None]
    dq = tl.full([PLAN.block_m, PLAN.block_d], 0.0, tl.float32)
    tiles = key_range(
        start_m,
        call.num_queries,
        call.num_keys,
        window,
        call.bounds_ptr,
        PLAN.block_m,
        PLAN.block_n,
        PLAN.is_causal,
        PLAN,
    )
    for masked in tl.static_range(2):
        # A user mask leaves no unmasked tile.
        if masked or not PLAN.has_mask:
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
                (scaled_lse, offset, scaled_d_entropy),
                call,
                window,
                mask_ptr,
                d_scores_ptr,
                PLAN,
                masked == 1,
            )
    offs_d = tl.arange(0, PLAN.block_d)
    pointers = dq_ptr + row[:, None] * PLAN.head_dim + offs_d[None, :]
    dq = (dq * call.scale).to(dq_ptr.dtype.element_ty)
    tl.store(pointers, dq, mask=inside[:, None] & (offs_d[None, :] < PLAN.head_dim))
