"""Attention output and row statistics in one pass."""

import torch
import triton
import triton.language as tl

from ..masks import sequence_bounds
from .configs import HEAD_GROUP, forward_tiles, grid_1d
from .primitives import (
    ADDITIVE_MASK,
    LOG2_E,
    NO_MASK,
    bend_and_mask,
    block_dim,
    describe,
    key_range,
    load_bounds,
    load_tile,
    mask_arguments,
    softmax_finish,
    softmax_update,
)


@triton.jit
def _attend(
    state,
    q,
    k_desc,
    v_desc,
    lo,
    hi,
    batch,
    kv_head,
    offs_m,
    first_key,
    end_key,
    num_queries,
    scale,
    unit,
    window,
    softcap,
    mask_ptr,
    stride_mask_m,
    stride_mask_n,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
    PACKED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    MASK: tl.constexpr,
    NATURAL: tl.constexpr,
    EXACT: tl.constexpr,
    HAS_VALUE: tl.constexpr,
    MASKED: tl.constexpr,
):
    m_i, l_i, w_i, low, acc = state
    for start_n in tl.range(lo, hi, BLOCK_N):
        k = load_tile(k_desc, batch, kv_head, start_n, BLOCK_N, BLOCK_D)
        s = tl.dot(q, k.T, input_precision="ieee")
        if NATURAL:
            s = s * scale
        offs_n = start_n + tl.arange(0, BLOCK_N)
        s, seen, _ = bend_and_mask(
            s,
            offs_m[:, None],
            offs_n[None, :],
            first_key[:, None] if PACKED else first_key,
            end_key[:, None] if PACKED else end_key,
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
            MASKED,
        )
        low = tl.minimum(low, tl.min(tl.where(seen, s, float("inf")) if MASKED else s, 1))
        m_i, l_i, w_i, p, alpha = softmax_update(m_i, l_i, w_i, s, seen, unit, MASKED, EXACT)
        if HAS_VALUE:
            v = load_tile(v_desc, batch, kv_head, start_n, BLOCK_N, BLOCK_DV)
            acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision="ieee")
    return m_i, l_i, w_i, low, acc


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
    SINKS: tl.constexpr,
    MASK: tl.constexpr,
    NATURAL: tl.constexpr,
    EXACT: tl.constexpr,
    HAS_VALUE: tl.constexpr,
):
    # Late query blocks first (under a causal mask they are the long ones), HEAD_GROUP heads abreast.
    num_blocks = tl.cdiv(num_queries, BLOCK_M)
    group, inside = (
        tl.program_id(0) // (HEAD_GROUP * num_blocks),
        tl.program_id(0) % (HEAD_GROUP * num_blocks),
    )
    bh = group * HEAD_GROUP + inside % HEAD_GROUP
    if bh >= num_bh:
        return
    start_m = (num_blocks - 1 - inside // HEAD_GROUP) * BLOCK_M
    batch, head = bh // heads, bh % heads
    kv_head = head // GROUP
    offs_m = start_m + tl.arange(0, BLOCK_M)
    if MASK != NO_MASK:
        mask_ptr += batch.to(tl.int64) * stride_mask_b + head.to(tl.int64) * stride_mask_h
    to_natural = 1.0 if NATURAL else scale
    unit = to_natural * LOG2_E

    q = load_tile(q_desc, batch, head, start_m, BLOCK_M, BLOCK_D)
    state = (
        tl.full([BLOCK_M], -float("inf"), tl.float32),
        tl.zeros([BLOCK_M], tl.float32),
        tl.zeros([BLOCK_M], tl.float32),
        tl.full([BLOCK_M], float("inf"), tl.float32),
        tl.zeros([BLOCK_M, BLOCK_DV], tl.float32),
    )
    first_key, end_key = 0, num_keys
    if PACKED:
        first_key, end_key = load_bounds(bounds_ptr, offs_m, num_queries)
    lo, full_lo, full_hi, hi = key_range(
        start_m, first_key, end_key, window, BLOCK_M, BLOCK_N, CAUSAL, WINDOWED, PACKED, MASK
    )
    for part in tl.static_range(3):
        if part == 0:
            begin, end = lo, full_lo
        elif part == 1:
            begin, end = full_lo, full_hi
        else:
            begin, end = full_hi, hi
        # Only a window or the start of a sequence leaves partly visible tiles on the left, and a user
        # mask leaves no others.
        if (part == 2) or (part == 1 and MASK == NO_MASK) or (part == 0 and (WINDOWED or PACKED)):
            state = _attend(
                state,
                q,
                k_desc,
                v_desc,
                begin,
                end,
                batch,
                kv_head,
                offs_m,
                first_key,
                end_key,
                num_queries,
                scale,
                unit,
                window,
                softcap,
                mask_ptr,
                stride_mask_m,
                stride_mask_n,
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
                HAS_VALUE,
                part != 1,
            )
    m_i, l_i, w_i, low, acc = state
    sink = 0.0
    if SINKS:
        sink = tl.load(sink_ptr + head).to(tl.float32) / to_natural
    lse, entropy, max_logit, min_logit, normalise = softmax_finish(
        m_i, l_i, w_i, low, unit, to_natural, sink, SINKS
    )
    first_row = bh.to(tl.int64) * num_queries
    inside_rows = offs_m < num_queries
    tl.store(lse_ptr + first_row + offs_m, lse, mask=inside_rows)
    tl.store(entropy_ptr + first_row + offs_m, entropy, mask=inside_rows)
    tl.store(max_ptr + first_row + offs_m, max_logit, mask=inside_rows)
    tl.store(min_ptr + first_row + offs_m, min_logit, mask=inside_rows)
    if HAS_VALUE:
        offs_d = tl.arange(0, BLOCK_DV)
        pointers = out_ptr + (first_row + offs_m)[:, None] * VALUE_DIM + offs_d[None, :]
        acc = acc * normalise[:, None]
        inside_out = inside_rows[:, None] & (offs_d[None, :] < VALUE_DIM)
        tl.store(pointers, acc.to(out_ptr.dtype.element_ty), mask=inside_out)


def forward(query, key, value, options, tiles=None):
    """(out, lse, entropy, max_logit, min_logit); `out` is an empty placeholder without a value.

    query (B, H, M, D), key (B, H_kv, N, D), value (B, H_kv, N, D_v) or None; D, D_v <= 256; fp16, bf16
    or fp32; any strides. Statistics are fp32 (B, H, M). `options` are validated `Options`.
    """
    batch, heads, num_queries, head_dim = query.shape
    kv_heads, num_keys = key.shape[1:3]
    value_dim = 16 if value is None else value.shape[3]
    rows = (batch, heads, num_queries)
    stats = [torch.empty(rows, dtype=torch.float32, device=query.device) for _ in range(4)]
    out = query.new_empty((0,) if value is None else (batch, heads, num_queries, value_dim))
    if stats[0].numel() == 0 or num_keys == 0:
        for row_stat, number in zip(stats, (-torch.inf, 0.0, -torch.inf, torch.inf), strict=True):
            row_stat.fill_(number)
        return out.zero_(), *stats
    # Edges of packed sequences are like the diagonal: small query blocks waste less of them.
    ragged = options.is_causal or options.seqlens is not None
    tiles = tiles or forward_tiles(head_dim, value_dim, query.dtype, ragged)
    mask, mask_strides, mask_kind = mask_arguments(options.attn_mask, (batch, heads, num_queries, num_keys))
    exact = query.dtype == torch.float32
    natural = exact or options.scale <= 0 or options.softcap is not None or mask_kind == ADDITIVE_MASK.value
    k_desc = describe(key, tiles.block_n)
    _forward_kernel[(grid_1d(triton.cdiv(num_queries, tiles.block_m), batch * heads),)](
        describe(query, tiles.block_m),
        k_desc,
        k_desc if value is None else describe(value, tiles.block_n),
        out,
        *stats,
        mask,
        options.sinks,
        None if options.seqlens is None else sequence_bounds(options.seqlens, slice(0, num_keys), num_keys),
        *mask_strides,
        batch * heads,
        heads,
        num_queries,
        num_keys,
        options.scale,
        options.softcap or 0.0,
        options.window_size or 0,
        VALUE_DIM=value_dim,
        GROUP=heads // kv_heads,
        BLOCK_M=tiles.block_m,
        BLOCK_N=tiles.block_n,
        BLOCK_D=block_dim(head_dim),
        BLOCK_DV=block_dim(value_dim),
        HEAD_GROUP=HEAD_GROUP,
        CAUSAL=options.is_causal,
        WINDOWED=options.window_size is not None,
        PACKED=options.seqlens is not None,
        SOFTCAP=options.softcap is not None,
        SINKS=options.sinks is not None,
        MASK=mask_kind,
        NATURAL=natural,
        EXACT=exact,
        HAS_VALUE=value is not None,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
    return out, *stats
