"""dq, dk, dv from the cotangents of out, lse and entropy: no atomics, so every run gives the same bits.

With log p = s - lse and delta'' of `reference.softmax_offset`:
    ds = p * (dp - dentropy * log p - delta''),   dp = do v^T.
One kernel prepares what belongs to a row; one walks the keys of a query block for dq; one walks the
queries (of every head that shares the key head) of a key block for dk and dv.
"""

from functools import partial

import torch
import triton
import triton.language as tl

from ...reference import attention as reference
from ..shared.descriptors import aligned, describe, describe_rows
from ..shared.launch import FUSED
from ..shared.packing import sequence_bounds
from ..shared.softmax import ADDITIVE_MASK, LN_2, LOG2_E, block_dim, mask_arguments
from ..shared.tiles import HEAD_GROUP, backward_tiles, grid_1d, has_edges
from .dkv import dkv_kernel
from .dq import dq_kernel


@triton.jit
def _prepare_rows_kernel(
    d_out_ptr,
    out_ptr,
    lse_ptr,
    entropy_ptr,
    d_lse_ptr,
    d_entropy_ptr,
    scaled_lse_ptr,
    offset_ptr,
    scaled_d_entropy_ptr,
    stride_b,
    stride_h,
    stride_m,
    stride_d,
    stride_out_b,
    stride_out_h,
    stride_out_m,
    stride_out_d,
    heads,
    num_queries,
    stride_rows,
    VALUE_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    HAS_D_OUT: tl.constexpr,
    HAS_D_LSE: tl.constexpr,
    HAS_D_ENTROPY: tl.constexpr,
):
    num_blocks = tl.cdiv(num_queries, ROWS)
    bh = tl.program_id(0) // num_blocks
    offs_m = tl.program_id(0) % num_blocks * ROWS + tl.arange(0, ROWS)
    inside = offs_m < num_queries
    row = bh.to(tl.int64) * num_queries + offs_m
    result = bh.to(tl.int64) * stride_rows + offs_m
    lse = tl.load(lse_ptr + row, mask=inside, other=0.0)
    # Infinite the other way in an empty row: see softmax_weights.
    scaled_lse = tl.where(lse == -float("inf"), float("inf"), lse * LOG2_E)
    tl.store(scaled_lse_ptr + result, scaled_lse, mask=inside)
    offset = tl.zeros([ROWS], tl.float32)
    if HAS_D_OUT:
        offs_d = tl.arange(0, COLS)[None, :]
        inside_out = inside[:, None] & (offs_d < VALUE_DIM)
        batch, head = (bh // heads).to(tl.int64), (bh % heads).to(tl.int64)
        d_out_ptr += batch * stride_b + head * stride_h
        d_out_offsets = offs_m[:, None].to(tl.int64) * stride_m + offs_d * stride_d
        d_out = tl.load(d_out_ptr + d_out_offsets, mask=inside_out, other=0.0)
        out_ptr += batch * stride_out_b + head * stride_out_h
        out_offsets = offs_m[:, None].to(tl.int64) * stride_out_m + offs_d * stride_out_d
        out = tl.load(out_ptr + out_offsets, mask=inside_out, other=0.0)
        offset += tl.sum(d_out.to(tl.float32) * out.to(tl.float32), 1)
    if HAS_D_LSE:
        offset -= tl.load(d_lse_ptr + row, mask=inside, other=0.0)
    if HAS_D_ENTROPY:
        d_entropy = tl.load(d_entropy_ptr + row, mask=inside, other=0.0)
        offset += d_entropy * tl.load(entropy_ptr + row, mask=inside, other=0.0)
        tl.store(scaled_d_entropy_ptr + result, d_entropy * LN_2, mask=inside)
    tl.store(offset_ptr + result, offset, mask=inside)


def _prepare_rows(out, lse, entropy, d_out, d_lse, d_entropy):
    """[scaled_lse of `softmax_weights`, delta'', d_entropy * ln 2 or None], fp32 (B, H, M), in one launch."""
    batch, heads, num_queries = lse.shape
    # The bulk-copy engine wants heads that start at multiples of 16 bytes.
    stride = triton.cdiv(num_queries, 4) * 4
    count = 2 if d_entropy is None else 3
    rows = list(lse.new_empty(count, batch, heads, stride)[..., :num_queries].unbind())
    if d_entropy is None:
        rows.append(None)
    value_dim = 16 if d_out is None else d_out.shape[3]
    block = 32
    _prepare_rows_kernel[(triton.cdiv(num_queries, block) * batch * heads,)](
        d_out,
        out,
        lse,
        entropy,
        None if d_lse is None else d_lse.contiguous(),
        None if d_entropy is None else d_entropy.contiguous(),
        *rows,
        *((0, 0, 0, 0) if d_out is None else d_out.stride()),
        *((0, 0, 0, 0) if d_out is None else out.stride()),
        heads,
        num_queries,
        stride,
        VALUE_DIM=value_dim,
        ROWS=block,
        COLS=block_dim(value_dim),
        HAS_D_OUT=d_out is not None,
        HAS_D_LSE=d_lse is not None,
        HAS_D_ENTROPY=d_entropy is not None,
        **FUSED,
    )
    return rows


def _score_gradient(options, shape):
    """Where dq's launch puts the gradient of every score (B, H, M, N), for a mask that needs its own."""
    mask = options.attn_mask
    dtype = mask.dtype if mask.shape == shape else torch.float32  # a sum is to follow
    # Under a causal mask or a window, or in a pack, what no query of a block sees is not walked.
    walks_all = not has_edges(options) and options.window_size is None
    return (torch.empty if walks_all else torch.zeros)(shape, dtype=dtype, device=mask.device)


def plan(
    query, key, value, options, out, lse, entropy, d_out, d_lse, d_entropy, tiles=None, mask_gradient=False
):
    """The gradients of `backward`, still to be filled, and the two launches (dq's, dkv's) that fill them.

    The mask's is that of every score, still to be summed where the mask broadcasts.
    """
    batch, heads, num_queries, head_dim = query.shape
    kv_heads, num_keys = key.shape[1:3]
    has_d_out = value is not None and d_out is not None
    rows = _prepare_rows(out, lse, entropy, d_out if has_d_out else None, d_lse, d_entropy)
    d_sinks = None
    if options.sinks is not None:
        d_sinks = reference.sink_gradient(options.sinks, lse, rows[1], d_entropy)
    d_query, d_key = query.new_empty(query.shape), key.new_empty(key.shape)
    d_value = None
    if value is not None:
        d_value = value.new_empty(value.shape) if has_d_out else value.new_zeros(value.shape)
    value_dim = value.shape[3] if has_d_out else 16
    shape = (batch, heads, num_queries, num_keys)
    dims = (head_dim, value_dim)
    dq_tiles, dkv_tiles = tiles or backward_tiles(*dims, query.dtype, options, mask_gradient)
    bounds = sequence_bounds(options.seqlens, num_keys)
    mask, mask_strides, mask_kind = mask_arguments(options.attn_mask, shape)
    d_scores = _score_gradient(options, shape) if mask_gradient else None
    natural = options.scale <= 0 or options.softcap is not None or mask_kind == ADDITIVE_MASK.value
    tensors = [aligned(query), aligned(key)]
    tensors += [aligned(value), aligned(d_out)] if has_d_out else [tensors[1], tensors[0]]

    def launch(kernel, gradients, length, block, num_heads, tiles, **constants):
        sizes = (tiles.block_m, tiles.block_n, tiles.block_n, tiles.block_m)
        return partial(
            kernel[(grid_1d(triton.cdiv(length, block), batch * num_heads),)],
            *(describe(x, size) for x, size in zip(tensors, sizes, strict=True)),
            *gradients,
            *(None if x is None else describe_rows(x, tiles.block_m) for x in rows),
            bounds,
            mask,
            *mask_strides,
            batch * num_heads,
            num_heads,
            num_queries,
            num_keys,
            options.scale,
            options.softcap or 0.0,
            options.window_size or 0,
            HEAD_DIM=head_dim,
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
            MASK=mask_kind,
            NATURAL=natural,
            HAS_D_OUT=has_d_out,
            HAS_D_ENTROPY=d_entropy is not None,
            num_warps=tiles.num_warps,
            num_stages=tiles.num_stages,
            maxnreg=tiles.max_registers,
            **constants,
            **FUSED,
        )

    launches = (
        launch(
            dq_kernel,
            [d_query, d_scores],
            num_queries,
            dq_tiles.block_m,
            heads,
            dq_tiles,
            HAS_D_SCORES=mask_gradient,
        ),
        launch(
            dkv_kernel,
            [d_key, d_value],
            num_keys,
            dkv_tiles.block_n,
            kv_heads,
            dkv_tiles,
            VALUE_DIM=value_dim,
        ),
    )
    return reference.Gradients(d_query, d_key, d_value, d_sinks, d_scores), launches


def backward(
    query, key, value, options, out, lse, entropy, d_out, d_lse, d_entropy, tiles=None, mask_gradient=False
):
    """`reference.backward` on the device: same arguments and result, D and D_v up to 256, not fp64.

    `tiles`: (dq's, dkv's) `Tiles`. The mask's gradient takes memory for one number per score, of the mask's
    dtype where it has that shape, else fp32.
    """
    mask = options.attn_mask if mask_gradient else None
    if lse.numel() == 0 or key.shape[2] == 0:
        inputs = (query, key, value, options.sinks, mask)
        return reference.Gradients(*(None if x is None else torch.zeros_like(x) for x in inputs))
    gradients, launches = plan(
        query, key, value, options, out, lse, entropy, d_out, d_lse, d_entropy, tiles, mask_gradient
    )
    for launch in launches:
        launch()
    if mask is not None:
        gradients = gradients._replace(mask=gradients.mask.sum_to_size(mask.shape).to(mask.dtype))
    return gradients
