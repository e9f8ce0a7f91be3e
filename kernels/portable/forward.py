"""Attention output and row statistics in one pass."""

from typing import Any

import torch
import triton
import triton.language as tl

from ..shared.descriptors import source, strided
from ..shared.launch import launch
from ..shared.masks import call_of
from ..shared.plan import Options
from ..shared.results import Rows, empty_output, new_rows
from ..shared.tiles import Tiles, ceil_div, forward_tiles, grid_1d, loads_by_pointers, scheduled_block
from .attend import AttendPlan, attend, attend_plan, finish, store_rows


@triton.jit
def forward_block(q_desc, k_desc, v_desc, out, rows, sink_ptr, call, window, bh, start_m, PLAN: tl.constexpr):
    """The output and the statistics of one block of queries."""
    batch, head = bh // call.heads, bh % call.heads
    state, acc = attend(q_desc, k_desc, v_desc, call, window, batch, head, start_m, call.num_keys, PLAN)
    core, more, normalise = finish(
        state,
        sink_ptr,
        head,
        call.scale,
        PLAN.has_sinks,
        PLAN.natural,
        PLAN.extended,
        PLAN.exact,
        PLAN.exponent,
    )
    result = acc * normalise[:, None]
    offs_m = start_m + tl.arange(0, PLAN.block_m)
    row = bh.to(tl.int64) * call.num_queries + offs_m
    inside = offs_m < call.num_queries
    store_rows(core, more, rows, row, inside, PLAN.extended)
    offs_d = tl.arange(0, PLAN.block_dv)
    out_ptr = out.ptr + batch.to(tl.int64) * out.stride_b + head.to(tl.int64) * out.stride_h
    pointers = out_ptr + offs_m[:, None].to(tl.int64) * out.stride_m + offs_d[None, :]
    inside_out = inside[:, None] & (offs_d[None, :] < PLAN.value_dim)
    tl.store(pointers, result.to(out_ptr.dtype.element_ty), mask=inside_out)


@triton.jit(do_not_specialize=["window"])
def _forward_kernel(q_desc, k_desc, v_desc, out, rows, sink_ptr, call, window, PLAN: tl.constexpr):
    start_m, bh = scheduled_block(call.num_queries, PLAN.block_m, True)
    if bh >= call.num_bh:
        return
    forward_block(q_desc, k_desc, v_desc, out, rows, sink_ptr, call, window, bh, start_m, PLAN)


def block_arguments(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    options: Options,
    out: torch.Tensor,
    rows: Rows,
    plan: AttendPlan,
    bounds: torch.Tensor | None = None,
) -> dict[str, Any]:
    """What `forward_block` takes from the host, by name; bounds: see `call_of`."""
    return {
        "q_desc": source(query, plan.block_m, plan.pointers),
        "k_desc": source(key, plan.block_n, plan.pointers),
        "v_desc": source(value, plan.block_n, plan.pointers),
        "out": strided(out),
        "rows": rows,
        "sink_ptr": options.sinks,
        "call": call_of(query, key, options, bounds),
    }


def forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    options: Options,
    tiles: Tiles | None = None,
    extended: bool = False,
) -> tuple[torch.Tensor | None, ...]:
    """(out, lse, entropy, max_logit, min_logit, more).

    query (B, H, M, D), key (B, H_kv, N, D), value (B, H_kv, N, D_v); D, D_v <= 256; fp16, bf16 or
    fp32; any strides. out: (B, H, M, D_v), see `empty_output`. Statistics are fp32 (B, H, M). more: the fields of
    `Extended`, fp32 (7, B, H, M), or None. `tiles` take the place of the tuned ones.
    """
    batch, heads, num_queries, head_dim = query.shape
    num_keys, value_dim = value.shape[2:]
    out = empty_output(query, value_dim)
    idle = batch * heads * num_queries * num_keys == 0
    rows = new_rows((batch, heads, num_queries), query.device, extended, blank=idle)
    if idle:
        return out.zero_(), *rows[:5]
    if tiles is None:
        by_pointers = loads_by_pointers(query.device)
        tiles = forward_tiles(head_dim, value_dim, query.dtype, options, extended, by_pointers)
    plan = attend_plan(query, key, value_dim, options, extended, tiles)
    launch(
        _forward_kernel,
        (grid_1d(ceil_div(num_queries, tiles.block_m), batch * heads), 1, 1),
        plan,
        query.device,
        block_arguments(query, key, value, options, out, rows, plan),
        {"window": options.window_size or 0},
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
    return out, *rows[:5]
