"""dk and dv: every key block walks the queries that see it, of all the heads that share its key head.

Tiles are transposed (keys x queries): the products then leave P^T and dS^T in the registers from which the next
products read them.
"""

import triton
import triton.language as tl

from ..shared.masks import mask_of_head
from ..shared.tiles import load_rows, load_tile, scheduled_block
from .gradient import query_range, softmax_gradient, softmax_weights, walk_bounds, walk_position


@triton.jit
def _walk_queries(
    dk,
    dv,
    k,
    v,
    query_descs,
    row_descs,
    tiles,
    batch,
    head,
    bh,
    offs_n,
    call,
    window,
    mask_ptr,
    PLAN: tl.constexpr,
    MASKED: tl.constexpr,
):
    """dk and dv with the queries of one range and head; bh: batch * query heads + query head."""
    q_desc, do_desc = query_descs
    scaled_lse_desc, offset_desc, scaled_d_entropy_desc = row_descs
    BOTH_ENDS: tl.constexpr = PLAN.is_causal or PLAN.hides_both_ends
    begin, end = walk_bounds(tiles, BOTH_ENDS, MASKED)
    for start in tl.range(begin, end, PLAN.block_m):
        start_m = walk_position(start, tiles, BOTH_ENDS, MASKED)
        offs_m = start_m + tl.arange(0, PLAN.block_m)
        # Loads that follow each other share one barrier.
        q = load_tile(q_desc, batch, head, start_m, PLAN.block_m, PLAN.block_d, PLAN.pointers)
        do = q
        if PLAN.has_d_out:
            do = load_tile(do_desc, batch, head, start_m, PLAN.block_m, PLAN.block_dv, PLAN.pointers)
        qk = tl.dot(k, q.T, input_precision="ieee")
        dp = 0.0
        if PLAN.has_d_out:
            dp = tl.dot(v, do.T, input_precision="ieee")
        scaled_lse = load_rows(scaled_lse_desc, bh, start_m, PLAN.block_m)
        offset = load_rows(offset_desc, bh, start_m, PLAN.block_m)
        scaled_d_entropy = 0.0
        if PLAN.has_d_entropy:
            scaled_d_entropy = load_rows(scaled_d_entropy_desc, bh, start_m, PLAN.block_m)[None, :]
        p, t, slope = softmax_weights(
            qk, offs_m[None, :], offs_n[:, None], scaled_lse[None, :], call, window, mask_ptr, PLAN, MASKED
        )
        # Issued before ds is computed, so that the product and the arithmetic overlap.
        if PLAN.has_d_out:
            dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
        ds, _ = softmax_gradient(p, t, slope, dp, offset[None, :], scaled_d_entropy, PLAN, MASKED)
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
    call,
    window,
    PLAN: tl.constexpr,
):
    """dk and dv of one block of keys; `call` counts key heads."""
    start_n, bh = scheduled_block(call.num_keys, PLAN.block_n, False)
    if bh >= call.num_bh:
        return
    batch, kv_head = bh // call.heads, bh % call.heads
    offs_n = start_n + tl.arange(0, PLAN.block_n)
    k = load_tile(k_desc, batch, kv_head, start_n, PLAN.block_n, PLAN.block_d, PLAN.pointers)
    v = k
    if PLAN.has_d_out:
        v = load_tile(v_desc, batch, kv_head, start_n, PLAN.block_n, PLAN.block_dv, PLAN.pointers)
    dk = tl.full([PLAN.block_n, PLAN.block_d], 0.0, tl.float32)
    dv = tl.full([PLAN.block_n, PLAN.block_dv], 0.0, tl.float32)
    tiles = query_range(start_n, call, window, PLAN)
    for member in tl.range(0, PLAN.group):
        head = kv_head * PLAN.group + member
        mask_ptr = mask_of_head(call, batch, head, PLAN)
        for masked in tl.static_range(2):
            # A user mask leaves no unmasked tile.
            if masked or not PLAN.has_mask:
                dk, dv = _walk_queries(
                    dk,
                    dv,
                    k,
                    v,
                    (q_desc, do_desc),
                    (scaled_lse_desc, offset_desc, scaled_d_entropy_desc),
                    tiles,
                    batch,
                    head,
                    batch * (call.heads * PLAN.group) + head,
                    offs_n,
                    call,
                    window,
                    mask_ptr,
                    PLAN,
                    masked == 1,
                )
    inside_keys = (offs_n < call.num_keys)[:, None]
    row = (bh.to(tl.int64) * call.num_keys + offs_n)[:, None]
    offs_d = tl.arange(0, PLAN.block_d)[None, :]
    dk = (dk * call.scale).to(dk_ptr.dtype.element_ty)
    tl.store(dk_ptr + row * PLAN.head_dim + offs_d, dk, mask=inside_keys & (offs_d < PLAN.head_dim))
    if PLAN.has_d_out:
        offs_dv = tl.arange(0, PLAN.block_dv)[None, :]
        dv = dv.to(dv_ptr.dtype.element_ty)
        tl.store(dv_ptr + row * PLAN.value_dim + offs_dv, dv, mask=inside_keys & (offs_dv < PLAN.value_dim))
