"""Rows with huge scores, computed again after a forward that has one unit for all rows.

Such a forward is right while |score| < 2^26 (see `softmax.Units`). Two units cost the sm_90 forward 2% of its time at
D = 128 and 8% at D = 64. To read the statistics of all rows costs less. Scores become huge in a run that diverges.
"""

import functools

import torch
import triton
import triton.language as tl

from ..shared.launch import launch
from ..shared.plan import Options
from ..shared.results import Rows
from ..shared.tiles import ceil_div, forward_tiles, loads_by_pointers
from .attend import attend_plan
from .forward import block_arguments, forward_block

# Scores from 2^27 on need the coarse unit. Huge scores are stored with an error, so the limit is half of that.
_LIMIT = tl.constexpr(67108864.0)  # 2^26
_ROWS = tl.constexpr(4096)  # that are read at once


@functools.cache
def _programs(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


@triton.jit
def _any_huge(rows, row, inside):
    """1 if one of these rows has, or may have had, a huge score; NaN comes of a huge score, too.

    A row without a visible key has -inf as its largest and inf as its smallest score. Only such a row has both.
    """
    most = tl.load(rows.max_logit + row, mask=inside, other=0.0)
    least = tl.load(rows.min_logit + row, mask=inside, other=0.0)
    empty = (most == -float("inf")) & (least == float("inf"))
    fine = empty | ((tl.abs(most) < _LIMIT) & (tl.abs(least) < _LIMIT))
    return tl.max(tl.where(fine, 0, 1), 0)


@triton.jit(do_not_specialize=["blocks", "window"])
def _huge_rows_kernel(q_desc, k_desc, v_desc, out, rows, sink_ptr, call, blocks, window, PLAN: tl.constexpr):
    """Compute those of `blocks` blocks of queries again that have a huge row."""
    in_head = tl.cdiv(call.num_queries, PLAN.block_m)
    first = tl.program_id(0) * blocks
    last = tl.minimum(first + blocks, call.num_bh * in_head)
    # Rows of blocks that follow each other follow each other.
    begin = (first // in_head).to(tl.int64) * call.num_queries + first % in_head * PLAN.block_m
    end = (last // in_head).to(tl.int64) * call.num_queries + last % in_head * PLAN.block_m
    huge = 0
    for start in tl.range(begin, end, _ROWS):
        row = start + tl.arange(0, _ROWS)
        huge += _any_huge(rows, row, row < end)
    if huge > 0:
        for block in tl.range(first, last):
            bh, start_m = block // in_head, block % in_head * PLAN.block_m
            offs_m = start_m + tl.arange(0, PLAN.block_m)
            inside = offs_m < call.num_queries
            if _any_huge(rows, bh.to(tl.int64) * call.num_queries + offs_m, inside) > 0:
                forward_block(q_desc, k_desc, v_desc, out, rows, sink_ptr, call, window, bh, start_m, PLAN)


def compute_again(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    options: Options,
    out: torch.Tensor,
    rows: Rows,
    bounds: torch.Tensor | None = None,
) -> None:
    """Correct `out` and `rows` of a forward without extended statistics, in blocks that hold a huge row.

    The tensors are those of `forward.forward`. bounds: see `masks.call_of`.
    """
    tiles = forward_tiles(
        query.shape[3], value.shape[3], query.dtype, options, False, loads_by_pointers(query.device)
    )
    plan = attend_plan(query, key, value.shape[3], options, False, tiles)
    num_blocks = query.shape[0] * query.shape[1] * ceil_div(query.shape[2], tiles.block_m)
    # Of a mask with holes the Hopper forward leaves every block to this kernel.
    programs = num_blocks if options.attn_mask is not None else min(_programs(query.device), num_blocks)
    launch(
        _huge_rows_kernel,
        (programs, 1, 1),
        plan,
        query.device,
        block_arguments(query, key, value, options, out, rows, plan, bounds),
        {"blocks": ceil_div(num_blocks, programs), "window": options.window_size or 0},
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
