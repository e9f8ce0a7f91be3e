"""dq, dk, dv from the cotangents of out, lse and entropy: no atomics, so every run gives the same bits.

With log p = s - lse and delta'' = rowsum(do * o) - dlse + dentropy * entropy:
    ds = p * (dp - dentropy * log p - delta''),   dp = do v^T.
One kernel prepares the numbers of each row. One walks the keys of a query block for dq. One walks the queries of a
key block (of every head that shares the key head) for dk and dv.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..shared.descriptors import aligned, describe_rows, source, strided
from ..shared.launch import launch
from ..shared.masks import call_of
from ..shared.plan import Options, Plan, ScorePlan, is_natural, score_plan
from ..shared.results import Gradients, sink_gradient
from ..shared.softmax import LN_2, LOG2_E
from ..shared.tiles import (
    BackwardTiles,
    Tiles,
    backward_tiles,
    block_dim,
    ceil_div,
    grid_1d,
    has_edges,
    kind_of,
    loads_by_pointers,
    pointable,
)
from .dkv import dkv_kernel
from .dq import dq_kernel
from .gradient import GradientPlan

_ROWS = 32  # of one program that prepares rows
# From a larger |lse| no weight can be recomputed: its own rounding would change it by a factor of 2^6 and more, and
# soon beyond any number. The gradient of such a row is 0, like that of an empty one.
_LARGEST_LSE = tl.constexpr(134217728.0)  # 2^27


@dataclass(frozen=True, repr=False)
class PreparePlan(Plan):
    """What the kernel that prepares rows is compiled for."""

    value_dim: int
    rows: int
    columns: int
    has_d_out: bool
    has_d_lse: bool
    has_d_entropy: bool


class PreparedRows(NamedTuple):
    """What the gradient needs of each row, fp32 (B, H, M); a head starts at a multiple of 16 bytes."""

    scaled_lse: Any  # lse * log2 e; +inf in a row without weights, see `softmax_weights`
    offset: Any  # delta''
    scaled_d_entropy: Any  # d_entropy * ln 2, or None


_prepare_plan = functools.cache(PreparePlan)


@triton.jit
def _prepare_rows_kernel(
    d_out,
    out,
    lse_ptr,
    entropy_ptr,
    d_lse_ptr,
    d_entropy_ptr,
    prepared,
    heads,
    num_queries,
    stride_rows,
    PLAN: tl.constexpr,
):
    num_blocks = tl.cdiv(num_queries, PLAN.rows)
    bh = tl.program_id(0) // num_blocks
    offs_m = tl.program_id(0) % num_blocks * PLAN.rows + tl.arange(0, PLAN.rows)
    inside = offs_m < num_queries
    row = bh.to(tl.int64) * num_queries + offs_m
    result = bh.to(tl.int64) * stride_rows + offs_m
    lse = tl.load(lse_ptr + row, mask=inside, other=0.0)
    scaled_lse = tl.where(tl.abs(lse) >= _LARGEST_LSE, float("inf"), lse * LOG2_E)
    tl.store(prepared.scaled_lse + result, scaled_lse, mask=inside)
    offset = tl.full([PLAN.rows], 0.0, tl.float32)
    if PLAN.has_d_out:
        offs_d = tl.arange(0, PLAN.columns)[None, :]
        inside_out = inside[:, None] & (offs_d < PLAN.value_dim)
        batch, head = (bh // heads).to(tl.int64), (bh % heads).to(tl.int64)
        d_out_ptr = d_out.ptr + batch * d_out.stride_b + head * d_out.stride_h
        d_out_offsets = offs_m[:, None].to(tl.int64) * d_out.stride_m + offs_d * d_out.stride_d
        d_out_tile = tl.load(d_out_ptr + d_out_offsets, mask=inside_out, other=0.0)
        out_ptr = out.ptr + batch * out.stride_b + head * out.stride_h
        out_offsets = offs_m[:, None].to(tl.int64) * out.stride_m + offs_d * out.stride_d
        out_tile = tl.load(out_ptr + out_offsets, mask=inside_out, other=0.0)
        offset += tl.sum(d_out_tile.to(tl.float32) * out_tile.to(tl.float32), 1)
    if PLAN.has_d_lse:
        offset -= tl.load(d_lse_ptr + row, mask=inside, other=0.0)
    if PLAN.has_d_entropy:
        d_entropy = tl.load(d_entropy_ptr + row, mask=inside, other=0.0)
        offset += d_entropy * tl.load(entropy_ptr + row, mask=inside, other=0.0)
        tl.store(prepared.scaled_d_entropy + result, d_entropy * LN_2, mask=inside)
    tl.store(prepared.offset + result, offset, mask=inside)


def _prepare_rows(
    out: Tensor,
    lse: Tensor,
    entropy: Tensor,
    d_out: Tensor | None,
    d_lse: Tensor | None,
    d_entropy: Tensor | None,
) -> PreparedRows:
    """The numbers of each row, in one launch."""
    batch, heads, num_queries = lse.shape
    # The bulk-copy engine wants heads that start at multiples of 16 bytes.
    stride = ceil_div(num_queries, 4) * 4
    count = 2 if d_entropy is None else 3
    rows = lse.new_empty(count, batch, heads, stride)[..., :num_queries].unbind()
    prepared = PreparedRows(*rows, *(None,) * (3 - count))
    value_dim = 16 if d_out is None else d_out.shape[3]
    launch(
        _prepare_rows_kernel,
        (ceil_div(num_queries, _ROWS) * batch * heads, 1, 1),
        _prepare_plan(
            value_dim,
            _ROWS,
            block_dim(value_dim),
            has_d_out=d_out is not None,
            has_d_lse=d_lse is not None,
            has_d_entropy=d_entropy is not None,
        ),
        lse.device,
        {
            "d_out": strided(d_out),
            "out": strided(None if d_out is None else out),
            "lse_ptr": lse,
            "entropy_ptr": entropy,
            "d_lse_ptr": None if d_lse is None else d_lse.contiguous(),
            "d_entropy_ptr": None if d_entropy is None else d_entropy.contiguous(),
            "prepared": prepared,
            "heads": heads,
            "num_queries": num_queries,
            "stride_rows": stride,
        },
        num_warps=4,
    )
    return prepared


def _score_gradient(options: Options, shape: tuple[int, int, int, int]) -> Tensor:
    """Memory for the gradient of every score (B, H, M, N), from which the mask's is summed."""
    mask = options.attn_mask
    dtype = mask.dtype if mask.shape == shape else torch.float32  # a sum is to follow
    # Under a causal mask or a window, or in a pack, what no query of a block sees is not walked.
    walks_all = not has_edges(options) and options.window_size is None
    return (torch.empty if walks_all else torch.zeros)(shape, dtype=dtype, device=mask.device)


@functools.cache
def _gradient_plans(
    scores: ScorePlan,
    natural: bool,
    has_d_out: bool,
    has_d_entropy: bool,
    has_d_scores: bool,
    group: int,
    head_dim: int,
    value_dim: int,
    tiles: BackwardTiles,
    by_pointers: bool,
) -> tuple[GradientPlan, GradientPlan]:
    """dq's and dkv's."""

    def plan(tiles: Tiles, has_d_scores: bool) -> GradientPlan:
        return GradientPlan(
            **vars(scores),
            natural=natural,
            has_d_out=has_d_out,
            has_d_entropy=has_d_entropy,
            has_d_scores=has_d_scores,
            group=group,
            head_dim=head_dim,
            value_dim=value_dim,
            block_m=tiles.block_m,
            block_n=tiles.block_n,
            block_d=block_dim(head_dim),
            block_dv=block_dim(value_dim),
            pointers=by_pointers,
        )

    return plan(tiles.dq, has_d_scores), plan(tiles.dkv, False)


def prepare(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    options: Options,
    out: Tensor,
    lse: Tensor,
    entropy: Tensor,
    d_out: Tensor | None,
    d_lse: Tensor | None,
    d_entropy: Tensor | None,
    tiles: tuple[Tiles, Tiles] | None = None,
    mask_gradient: bool = False,
) -> tuple[Gradients, tuple[Callable[[], Any], Callable[[], Any]]]:
    """The gradients of `backward`, still to be filled, and the two launches (dq's, dkv's) that fill them.

    The mask's is that of every score, still to be summed where the mask broadcasts.
    """
    batch, heads, num_queries, head_dim = query.shape
    kv_heads, num_keys = key.shape[1:3]
    has_d_out = value is not None and d_out is not None
    rows = _prepare_rows(out, lse, entropy, d_out if has_d_out else None, d_lse, d_entropy)
    d_value = None
    if value is not None:
        d_value = value.new_empty(value.shape) if has_d_out else value.new_zeros(value.shape)
    gradients = Gradients(
        query.new_empty(query.shape),
        key.new_empty(key.shape),
        d_value,
        None if options.sinks is None else sink_gradient(options.sinks, lse, rows.offset, d_entropy),
        _score_gradient(options, (batch, heads, num_queries, num_keys)) if mask_gradient else None,
    )
    value_dim = value.shape[3] if has_d_out else 16
    by_pointers = loads_by_pointers(query.device)
    card = by_pointers, kind_of(query.device).is_amd
    chosen = BackwardTiles(
        *(tiles or backward_tiles(head_dim, value_dim, query.dtype, options, mask_gradient, *card))
    )
    scores = score_plan(options)
    plans = _gradient_plans(
        scores,
        is_natural(scores, options.scale),
        has_d_out,
        d_entropy is not None,
        mask_gradient,
        heads // kv_heads,
        head_dim,
        value_dim,
        chosen,
        by_pointers,
    )
    call = call_of(query, key, options)
    fit = pointable if by_pointers else aligned  # once for both launches
    query, key = fit(query), fit(key)
    value, d_out = (fit(value), fit(d_out)) if has_d_out else (key, query)

    def launch_of(kernel, plan, tiles, blocks, call, filled) -> Callable[[], Any]:
        arguments = {
            "q_desc": source(query, tiles.block_m, plan.pointers),
            "k_desc": source(key, tiles.block_n, plan.pointers),
            "v_desc": source(value, tiles.block_n, plan.pointers),
            "do_desc": source(d_out, tiles.block_m, plan.pointers),
            **filled,
            "scaled_lse_desc": describe_rows(rows.scaled_lse, tiles.block_m),
            "offset_desc": describe_rows(rows.offset, tiles.block_m),
            "scaled_d_entropy_desc": None
            if d_entropy is None
            else describe_rows(rows.scaled_d_entropy, tiles.block_m),
            "call": call,
        }
        return partial(
            launch,
            kernel,
            (grid_1d(blocks, call.num_bh), 1, 1),
            plan,
            lse.device,
            arguments,
            {"window": options.window_size or 0},
            num_warps=tiles.num_warps,
            num_stages=tiles.num_stages,
            maxnreg=tiles.max_registers,
        )

    dq = launch_of(
        dq_kernel,
        plans[0],
        chosen.dq,
        ceil_div(num_queries, chosen.dq.block_m),
        call,
        {"dq_ptr": gradients.query, "d_scores_ptr": gradients.mask},
    )
    dkv = launch_of(
        dkv_kernel,
        plans[1],
        chosen.dkv,
        ceil_div(num_keys, chosen.dkv.block_n),
        call._replace(num_bh=batch * kv_heads, heads=kv_heads),
        {"dk_ptr": gradients.key, "dv_ptr": gradients.value},
    )
    return gradients, (dq, dkv)


def backward(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    options: Options,
    out: Tensor,
    lse: Tensor,
    entropy: Tensor,
    d_out: Tensor | None,
    d_lse: Tensor | None,
    d_entropy: Tensor | None,
    tiles: tuple[Tiles, Tiles] | None = None,
    mask_gradient: bool = False,
) -> Gradients:
    """Gradients from the cotangents of out, lse and entropy, of which any may be None.

    Shapes and dtypes are those of `forward`; value is None, and out not read, if there was no output. tiles: dq's
    and dkv's. mask_gradient: also that of the additive mask, summed to its shape. It takes memory for one number a
    score, of the mask's dtype if the mask has the scores' shape, otherwise fp32.
    """
    mask = options.attn_mask if mask_gradient else None
    if lse.numel() == 0 or key.shape[2] == 0:
        inputs = (query, key, value, options.sinks, mask)
        return Gradients(*(None if x is None else torch.zeros_like(x) for x in inputs))
    gradients, launches = prepare(
        query, key, value, options, out, lse, entropy, d_out, d_lse, d_entropy, tiles, mask_gradient
    )
    for run in launches:
        run()
    if mask is not None:
        gradients = gradients._replace(mask=gradients.mask.sum_to_size(mask.shape).to(mask.dtype))
    return gradients
