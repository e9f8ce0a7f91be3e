"""Row statistics from q and k alone, of all rows or of a sample of them: the key loop without a value."""

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ..shared.descriptors import source
from ..shared.gate import STATISTICS, is_off
from ..shared.launch import launch
from ..shared.masks import call_of
from ..shared.plan import Options, Plan
from ..shared.results import Core, Extended, new_rows
from ..shared.sampling import BATCH_STEP, BLOCK_ROWS, HEAD_STEP, STRATUM_STEP, num_rows, row_index
from ..shared.softmax import LOG2_E, State, softmax_merge
from ..shared.tiles import Tiles, ceil_div, grid_1d, loads_by_pointers, probe_tiles, scheduled_block
from .attend import AttendPlan, attend, attend_plan, finish, store_rows

_BATCH_STEP = tl.constexpr(BATCH_STEP)
_HEAD_STEP = tl.constexpr(HEAD_STEP)
_STRATUM_STEP = tl.constexpr(STRATUM_STEP)
# Keys are split until the programs fill a large card several times, but not below the number of keys that is worth
# the start of a program.
_PROGRAMS, _LEAST_KEYS = 1024, 512
_JOIN = 256  # rows of a program that merges parts


@dataclass(frozen=True, repr=False)
class ProbePlan(AttendPlan):
    """What the probe is compiled for."""

    is_sampled: bool
    tiles: int  # of one block of sampled rows
    parts: int  # programs that share the keys of a block of rows


@dataclass(frozen=True, repr=False)
class JoinPlan(Plan):
    """What the merge of the probe's parts is compiled for."""

    natural: bool
    has_sinks: bool
    is_sampled: bool
    parts: int
    block: int


@functools.cache
def _plans(plan: AttendPlan, is_sampled: bool, parts: int) -> tuple[ProbePlan, JoinPlan]:
    tiles = BLOCK_ROWS // plan.block_m
    return (
        ProbePlan(**vars(plan), is_sampled=is_sampled, tiles=tiles, parts=parts),
        JoinPlan(plan.natural, plan.has_sinks, is_sampled, parts, _JOIN),
    )


@triton.jit
def sampled_block(batch, head, stratum, period, phase):
    """The block of rows that (batch, head) takes from a stratum: see `sampling.row_index`."""
    fraction = batch.to(tl.int64) * _BATCH_STEP
    fraction += head.to(tl.int64) * _HEAD_STEP + stratum.to(tl.int64) * _STRATUM_STEP
    fraction = (fraction & 0xFFFFFFFF) >> 16
    return stratum * period + ((phase + ((fraction * period) >> 16)) % period).to(tl.int32)


@triton.jit
def _blank_outside(core, more, inside, EXTENDED: tl.constexpr):
    """The statistics, with empty rows in the places of a sample that have no query."""
    infinity = float("inf")
    core = Core(
        tl.where(inside, core.lse, -infinity),
        tl.where(inside, core.entropy, 0.0),
        tl.where(inside, core.max_logit, -infinity),
        tl.where(inside, core.min_logit, infinity),
    )
    if EXTENDED:
        more = Extended(
            tl.where(inside, more.logit_var, 0.0),
            tl.where(inside, more.collision, 0.0),
            tl.where(inside, more.score_std, 0.0),
            tl.where(inside, more.sink_mass, 0.0),
            tl.where(inside, more.score_mean, 0.0),
            tl.where(inside, more.log_denominator, 0.0),
            tl.where(inside, more.visible_keys, 0.0),
        )
    return core, more


@triton.jit
def _store_state(state, parts_ptr, stride, inside):
    """Store a part's state, as four fields `stride` apart."""
    tl.store(parts_ptr, state.m, mask=inside)
    tl.store(parts_ptr + stride, state.l, mask=inside)
    tl.store(parts_ptr + 2 * stride, state.w, mask=inside)
    tl.store(parts_ptr + 3 * stride, state.low, mask=inside)


@triton.jit
def _load_state(parts_ptr, stride, inside):
    """What `_store_state` stored."""
    m = tl.load(parts_ptr, mask=inside, other=0.0)
    l = tl.load(parts_ptr + stride, mask=inside, other=1.0)  # noqa: E741
    w = tl.load(parts_ptr + 2 * stride, mask=inside, other=0.0)
    return State(m, l, w, tl.load(parts_ptr + 3 * stride, mask=inside, other=0.0), ())


@triton.jit(do_not_specialize=["window", "period", "phase"])
def _probe_kernel(
    q_desc,
    k_desc,
    rows,
    index_ptr,
    parts_ptr,
    sink_ptr,
    control_ptr,
    call,
    row_length,
    window,
    period,
    phase,
    PLAN: tl.constexpr,
):
    """The statistics of one block of rows, or the state of one part of its keys."""
    if control_ptr is not None:  # noqa: SIM102  # the compiler drops this branch, and not an `and`
        if is_off(control_ptr, STATISTICS):
            return
    start_m, bh = scheduled_block(row_length, PLAN.block_m, True)
    if bh >= call.num_bh:
        return
    batch, head = bh // call.heads, bh % call.heads
    tile = start_m // PLAN.block_m
    keys = call.num_keys
    if PLAN.is_sampled:
        block = sampled_block(batch, head, tile // PLAN.tiles, period, phase)
        start_m = (block * PLAN.tiles + tile % PLAN.tiles) * PLAN.block_m
        keys = tl.where(start_m < call.num_queries, keys, 0)
    part = tl.program_id(1)
    state, _ = attend(
        q_desc, k_desc, k_desc, call, window, batch, head, start_m, keys, PLAN, part, PLAN.parts
    )
    offs = tl.arange(0, PLAN.block_m)
    offs_m = start_m + offs
    place = tile * PLAN.block_m + offs
    row = bh.to(tl.int64) * row_length + place
    inside = place < row_length
    if PLAN.is_sampled:
        tl.store(index_ptr + row, tl.where(offs_m < call.num_queries, offs_m, -1).to(tl.int64))
    if PLAN.parts > 1:
        _store_state(state, parts_ptr + part * 4 * rows.stride_more + row, rows.stride_more, inside)
        return
    core, more, _ = finish(
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
    if PLAN.is_sampled:
        core, more = _blank_outside(core, more, offs_m < call.num_queries, PLAN.extended)
    store_rows(core, more, rows, row, inside, PLAN.extended)


@triton.jit(do_not_specialize=["num_rows", "row_length", "heads"])
def _join_kernel(
    parts_ptr, rows, index_ptr, sink_ptr, scale, num_rows, row_length, heads, PLAN: tl.constexpr
):
    """The statistics of rows whose keys were split over several programs."""
    # 32-bit places are enough: keys are split only if there are few rows.
    row = tl.program_id(0) * PLAN.block + tl.arange(0, PLAN.block)
    inside = row < num_rows
    unit = (1.0 if PLAN.natural else scale) * LOG2_E
    state = _load_state(parts_ptr + row, num_rows, inside)
    PARTS: tl.constexpr = PLAN.parts
    for part in tl.static_range(1, PARTS):
        other = _load_state(parts_ptr + part * 4 * num_rows + row, num_rows, inside)
        state = softmax_merge(state, other, unit)
    head = row // row_length % heads
    core, more, _ = finish(state, sink_ptr, head, scale, PLAN.has_sinks, PLAN.natural, False, False, 0)
    if PLAN.is_sampled:
        index = tl.load(index_ptr + row, mask=inside, other=-1)
        core, more = _blank_outside(core, more, index >= 0, False)
    store_rows(core, more, rows, row, inside, False)


def _parts(programs: int, num_keys: int) -> int:
    """Over how many programs the keys of a block are split, if the blocks alone leave a card idle."""
    parts = 1
    while parts < 8 and 2 * parts * programs <= _PROGRAMS and num_keys >= 2 * parts * _LEAST_KEYS:
        parts *= 2
    return parts


def probe(
    query: torch.Tensor,
    key: torch.Tensor,
    options: Options,
    tiles: Tiles | None = None,
    extended: bool = False,
    sample: tuple[int, int] | None = None,
    parts: int | None = None,
    control: torch.Tensor | None = None,
) -> tuple[torch.Tensor | None, ...]:
    """(lse, entropy, max_logit, min_logit, more, row_index); `more` as in `forward`.

    query (B, H, M, D), key (B, H_kv, N, D); D <= 256; fp16, bf16 or fp32; any strides. Statistics are fp32
    (B, H, M). sample: (period, phase) of `sampling.row_index`, with a period of at most the number of blocks; M_s
    rows then stand for M, and row_index is theirs. Without a sample it is None. parts: over how many programs keys
    are split. That takes a second launch; extended statistics are never split. control: see `shared.control`; what it
    does not ask for is left as it is in memory. None for a probe that always runs.
    """
    batch, heads, num_queries, head_dim = query.shape
    period, phase = sample or (1, 0)
    row_length = num_rows(num_queries, period) if sample else num_queries
    shape, device = (batch, heads, row_length), query.device
    idle = batch * heads * row_length * key.shape[2] == 0
    rows = new_rows(shape, device, extended, blank=idle)
    if idle:
        return *rows[:5], row_index(batch, heads, num_queries, period, phase, device) if sample else None
    index = torch.empty(shape, dtype=torch.int64, device=device) if sample else None
    if tiles is None:
        tiles = probe_tiles(head_dim, query.dtype, options, extended, loads_by_pointers(device))
    blocks = ceil_div(row_length, tiles.block_m)
    reach = key.shape[2] if options.window_size is None else min(key.shape[2], 2 * options.window_size)
    parts = 1 if extended else parts or _parts(blocks * batch * heads, reach)
    size = rows.stride_more
    partial = None if parts == 1 else torch.empty(parts * 4 * size, device=device)
    plan, join = _plans(attend_plan(query, key, 0, options, extended, tiles), sample is not None, parts)
    launch(
        _probe_kernel,
        (grid_1d(blocks, batch * heads), parts, 1),
        plan,
        device,
        {
            "q_desc": source(query, tiles.block_m, plan.pointers),
            "k_desc": source(key, tiles.block_n, plan.pointers),
            "rows": rows,
            "index_ptr": index,
            "parts_ptr": partial,
            "sink_ptr": options.sinks,
            "control_ptr": control,
            "call": call_of(query, key, options),
            "row_length": row_length,
        },
        {"window": options.window_size or 0, "period": period, "phase": phase},
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
    if parts > 1:
        launch(
            _join_kernel,
            (ceil_div(size, _JOIN), 1, 1),
            join,
            device,
            {
                "parts_ptr": partial,
                "rows": rows,
                "index_ptr": index,
                "sink_ptr": options.sinks,
                "scale": options.scale,
            },
            {"num_rows": size, "row_length": row_length, "heads": heads},
            num_warps=4,
        )
    return *rows[:5], index
