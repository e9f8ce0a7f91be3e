"""One block of query rows against its keys: what the forward and the probe share, on the device and the host."""

import torch
import triton
import triton.language as tl

from ..shared.packing import sequence_bounds
from ..shared.softmax import (
    ADDITIVE_MASK,
    LOG2_E,
    NO_MASK,
    bend_and_mask,
    block_dim,
    first_weight,
    key_range,
    load_tile,
    mask_arguments,
    softmax_finish,
    softmax_update,
    start_more,
)
from ..shared.tiles import HEAD_GROUP


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
    num_queries,
    num_keys,
    scale,
    unit,
    window,
    softcap,
    bounds_ptr,
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
    EXTENDED: tl.constexpr,
    HAS_VALUE: tl.constexpr,
    MASKED: tl.constexpr,
):
    m_i, l_i, w_i, low, more, acc = state
    # Elsewhere a row that has seen no key yet meets one at the first place of a part.
    SCATTERED: tl.constexpr = MASKED and (WINDOWED or PACKED or MASK != NO_MASK)
    for start_n in tl.range(lo, hi, BLOCK_N):
        k = load_tile(k_desc, batch, kv_head, start_n, BLOCK_N, BLOCK_D)
        s = tl.dot(q, k.T, input_precision="ieee")
        if NATURAL:
            s = s * scale
        offs_n = start_n + tl.arange(0, BLOCK_N)
        raw = s
        s, seen, _ = bend_and_mask(
            raw,
            offs_m[:, None],
            offs_n[None, :],
            num_queries,
            num_keys,
            window,
            softcap,
            bounds_ptr,
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
        if EXTENDED:
            unseen = more[4] == 0.0
        m_i, l_i, w_i, more, p, alpha = softmax_update(
            m_i, l_i, w_i, more, s, seen, unit, MASKED, EXACT, EXTENDED
        )
        if EXTENDED and (SCATTERED or start_n == lo):
            more = first_weight(more, unseen, p, seen, offs_n[None, :], start_n, SCATTERED)
        if SOFTCAP:
            # tanh(inf) is 1, so an infinite score reaches neither l nor w, and the output is finite, as in
            # eager attention. inf - inf makes w NaN, which only the statistics are made of.
            w_i += tl.sum(tl.where(seen, raw - raw, 0.0) if MASKED else raw - raw, 1)
        if HAS_VALUE:
            v = load_tile(v_desc, batch, kv_head, start_n, BLOCK_N, BLOCK_DV)
            acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision="ieee")
    return m_i, l_i, w_i, low, more, acc


@triton.jit
def attend(
    q_desc,
    k_desc,
    v_desc,
    mask_ptr,
    bounds_ptr,
    stride_mask_b,
    stride_mask_h,
    stride_mask_m,
    stride_mask_n,
    batch,
    head,
    start_m,
    num_queries,
    num_keys,
    scale,
    softcap,
    window,
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
    NATURAL: tl.constexpr,
    EXACT: tl.constexpr,
    EXTENDED: tl.constexpr,
    HAS_VALUE: tl.constexpr,
    part=0,
    PARTS: tl.constexpr = 1,
):
    """One block of query rows against part `part` of PARTS of its keys: the state (m, l, w, low, more, acc)."""
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
        start_more(BLOCK_M, EXTENDED),
        tl.zeros([BLOCK_M, BLOCK_DV], tl.float32),
    )
    lo, full_lo, full_hi, hi = key_range(
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
    if PARTS > 1:
        size = tl.cdiv(tl.cdiv(tl.maximum(hi - lo, 0), BLOCK_N), PARTS) * BLOCK_N
        first = lo + part * size
        last = tl.maximum(tl.minimum(first + size, hi), first)
        lo, hi = first, last
        full_lo = tl.minimum(tl.maximum(full_lo, first), last)
        full_hi = tl.minimum(tl.maximum(full_hi, first), last)
    for side in tl.static_range(3):
        if side == 0:
            begin, end = lo, full_lo
        elif side == 1:
            begin, end = full_lo, full_hi
        else:
            begin, end = full_hi, hi
        # Only windows and packed sequences leave partly visible tiles on the left, and a user mask no others.
        if (side == 2) or (side == 1 and MASK == NO_MASK) or (side == 0 and (WINDOWED or PACKED)):
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
                num_queries,
                num_keys,
                scale,
                unit,
                window,
                softcap,
                bounds_ptr,
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
                EXTENDED,
                HAS_VALUE,
                side != 1,
            )
    return state


@triton.jit
def finish(
    m_i,
    l_i,
    w_i,
    low,
    more,
    sink_ptr,
    head,
    scale,
    SINKS: tl.constexpr,
    NATURAL: tl.constexpr,
    EXTENDED: tl.constexpr,
):
    """What `softmax_finish` makes of the state of rows that have seen all their keys."""
    to_natural = 1.0 if NATURAL else scale
    sink = 0.0
    if SINKS:
        sink = tl.load(sink_ptr + head).to(tl.float32) / to_natural
    return softmax_finish(m_i, l_i, w_i, low, more, to_natural * LOG2_E, to_natural, sink, SINKS, EXTENDED)


@triton.jit
def store_rows(
    core,
    more,
    lse_ptr,
    entropy_ptr,
    max_ptr,
    min_ptr,
    more_ptr,
    stride_more,
    row,
    inside,
    EXTENDED: tl.constexpr,
):
    """Statistics of some rows to their places `row`; those of `more` lie `stride_more` apart."""
    lse, entropy, max_logit, min_logit = core
    tl.store(lse_ptr + row, lse, mask=inside)
    tl.store(entropy_ptr + row, entropy, mask=inside)
    tl.store(max_ptr + row, max_logit, mask=inside)
    tl.store(min_ptr + row, min_logit, mask=inside)
    if EXTENDED:
        for field in tl.static_range(len(more)):
            tl.store(more_ptr + row, more[field], mask=inside)
            more_ptr += stride_more


def call_arguments(query, key, options, extended, tiles):
    """What a kernel around `attend` takes after its outputs: (arguments, constants, key of `launch`, options)."""
    batch, heads, num_queries, head_dim = query.shape
    kv_heads, num_keys = key.shape[1:3]
    mask, mask_strides, mask_kind = mask_arguments(options.attn_mask, (batch, heads, num_queries, num_keys))
    exact = query.dtype == torch.float32
    natural = exact or options.scale <= 0 or options.softcap is not None or mask_kind == ADDITIVE_MASK.value
    integers = (*mask_strides, batch * heads, heads, num_queries, num_keys)
    arguments = (
        mask,
        options.sinks,
        sequence_bounds(options.seqlens, num_keys),
        *integers,
        options.scale,
        options.softcap or 0.0,
        options.window_size or 0,
    )
    constants = {
        "GROUP": heads // kv_heads,
        "BLOCK_M": tiles.block_m,
        "BLOCK_N": tiles.block_n,
        "BLOCK_D": block_dim(head_dim),
        "HEAD_GROUP": HEAD_GROUP,
        "CAUSAL": options.is_causal,
        "WINDOWED": options.window_size is not None,
        "PACKED": options.seqlens is not None,
        "SOFTCAP": options.softcap is not None,
        "SINKS": options.sinks is not None,
        "MASK": mask_kind,
        "NATURAL": natural,
        "EXACT": exact,
        "EXTENDED": extended,
    }
    dtypes = (x if x is None else x.dtype for x in (query, mask, options.sinks))
    launched = {"num_warps": tiles.num_warps, "num_stages": tiles.num_stages}
    return arguments, constants, (query.device, *dtypes, *integers, tiles), launched
