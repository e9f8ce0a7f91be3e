"""Row statistics from q and k alone, of all rows or of a sample of them: the key loop without a value."""

import torch
import triton
import triton.language as tl

from ...reference.sampling import BATCH_STEP, BLOCK_ROWS, HEAD_STEP, STRATUM_STEP, num_rows, row_index
from ..shared.descriptors import describe
from ..shared.launch import launch
from ..shared.softmax import LOG2_E, ceil_div, new_rows, scheduled_block, softmax_merge
from ..shared.tiles import grid_1d, probe_tiles
from .attend import attend, call_arguments, finish, store_rows

_BATCH_STEP = tl.constexpr(BATCH_STEP)
_HEAD_STEP = tl.constexpr(HEAD_STEP)
_STRATUM_STEP = tl.constexpr(STRATUM_STEP)
# Keys are split until there are as many programs as fill a large card several times, but not into less than
# what is worth a program's start.
_PROGRAMS, _LEAST_KEYS = 1024, 512
_JOIN = 256  # rows of a program that puts parts together


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
    lse, entropy, max_logit, min_logit = core
    infinity = float("inf")
    core = (
        tl.where(inside, lse, -infinity),
        tl.where(inside, entropy, 0.0),
        tl.where(inside, max_logit, -infinity),
        tl.where(inside, min_logit, infinity),
    )
    if EXTENDED:
        logit_var, collision, score_std, sink_mass, score_mean, visible_keys = more
        more = (
            tl.where(inside, logit_var, 0.0),
            tl.where(inside, collision, 0.0),
            tl.where(inside, score_std, 0.0),
            tl.where(inside, sink_mass, 0.0),
            tl.where(inside, score_mean, 0.0),
            tl.where(inside, visible_keys, 0.0),
        )
    return core, more


@triton.jit(do_not_specialize=["window", "period", "phase"])
def _probe_kernel(
    q_desc,
    k_desc,
    lse_ptr,
    entropy_ptr,
    max_ptr,
    min_ptr,
    more_ptr,
    stride_more,
    index_ptr,
    parts_ptr,
    row_length,
    period,
    phase,
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
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HEAD_GROUP: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
    PACKED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SINKS: tl.constexpr,
    MASK: tl.constexpr,
    NATURAL: tl.constexpr,
    EXACT: tl.constexpr,
    EXTENDED: tl.constexpr,
    SAMPLED: tl.constexpr,
    TILES: tl.constexpr,  # of one block of sampled rows
    PARTS: tl.constexpr,  # programs that share the keys of a block of rows
):
    start_m, bh = scheduled_block(row_length, BLOCK_M, HEAD_GROUP, True)
    if bh >= num_bh:
        return
    batch, head = bh // heads, bh % heads
    tile = start_m // BLOCK_M
    keys = num_keys
    if SAMPLED:
        start_m = (sampled_block(batch, head, tile // TILES, period, phase) * TILES + tile % TILES) * BLOCK_M
        keys = tl.where(start_m < num_queries, num_keys, 0)
    m_i, l_i, w_i, low, more, _ = attend(
        q_desc,
        k_desc,
        k_desc,
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
        keys,
        scale,
        softcap,
        window,
        GROUP,
        BLOCK_M,
        BLOCK_N,
        BLOCK_D,
        16,
        CAUSAL,
        WINDOWED,
        PACKED,
        SOFTCAP,
        MASK,
        NATURAL,
        EXACT,
        EXTENDED,
        False,
        tl.program_id(1),
        PARTS,
    )
    offs = tl.arange(0, BLOCK_M)
    offs_m = start_m + offs
    place = tile * BLOCK_M + offs
    row = bh.to(tl.int64) * row_length + place
    inside = place < row_length
    if SAMPLED:
        tl.store(index_ptr + row, tl.where(offs_m < num_queries, offs_m, -1).to(tl.int64))
    if PARTS > 1:
        parts_ptr += tl.program_id(1) * 4 * stride_more + row
        tl.store(parts_ptr, m_i, mask=inside)
        tl.store(parts_ptr + stride_more, l_i, mask=inside)
        tl.store(parts_ptr + 2 * stride_more, w_i, mask=inside)
        tl.store(parts_ptr + 3 * stride_more, low, mask=inside)
        return
    core, more, _ = finish(m_i, l_i, w_i, low, more, sink_ptr, head, scale, SINKS, NATURAL, EXTENDED)
    if SAMPLED:
        core, more = _blank_outside(core, more, offs_m < num_queries, EXTENDED)
    store_rows(
        core, more, lse_ptr, entropy_ptr, max_ptr, min_ptr, more_ptr, stride_more, row, inside, EXTENDED
    )


@triton.jit(do_not_specialize=["row_length", "heads", "rows"])
def _join_kernel(
    parts_ptr,
    lse_ptr,
    entropy_ptr,
    max_ptr,
    min_ptr,
    index_ptr,
    sink_ptr,
    rows,
    row_length,
    heads,
    scale,
    SINKS: tl.constexpr,
    NATURAL: tl.constexpr,
    SAMPLED: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Statistics of rows whose keys were split over PARTS programs."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # there are few, or their keys were not split
    inside = row < rows
    m_i = tl.load(parts_ptr + row, mask=inside, other=0.0)
    l_i = tl.load(parts_ptr + rows + row, mask=inside, other=1.0)
    w_i = tl.load(parts_ptr + 2 * rows + row, mask=inside, other=0.0)
    low = tl.load(parts_ptr + 3 * rows + row, mask=inside, other=0.0)
    for part in tl.static_range(1, PARTS):
        of_part = parts_ptr + part * 4 * rows + row
        m_b = tl.load(of_part, mask=inside, other=0.0)
        l_b = tl.load(of_part + rows, mask=inside, other=1.0)
        w_b = tl.load(of_part + 2 * rows, mask=inside, other=0.0)
        low_b = tl.load(of_part + 3 * rows, mask=inside, other=0.0)
        unit = (1.0 if NATURAL else scale) * LOG2_E
        m_i, l_i, w_i, low = softmax_merge(m_i, l_i, w_i, low, m_b, l_b, w_b, low_b, unit)
    head = row // row_length % heads
    core, more, _ = finish(m_i, l_i, w_i, low, (), sink_ptr, head, scale, SINKS, NATURAL, False)
    if SAMPLED:
        index = tl.load(index_ptr + row, mask=inside, other=-1)
        core, more = _blank_outside(core, more, index >= 0, False)
    store_rows(core, more, lse_ptr, entropy_ptr, max_ptr, min_ptr, lse_ptr, 0, row, inside, False)


def _parts(programs: int, num_keys: int) -> int:
    """Over how many programs the keys of a block are split, where its rows alone leave a card idle."""
    parts = 1
    while parts < 8 and 2 * parts * programs <= _PROGRAMS and num_keys >= 2 * parts * _LEAST_KEYS:
        parts *= 2
    return parts


def probe(query, key, options, tiles=None, extended=False, sample=None, parts=None):
    """(lse, entropy, max_logit, min_logit, more, row_index); `more` as `primitives.new_rows` says.

    query (B, H, M, D), key (B, H_kv, N, D); D <= 256; fp16, bf16 or fp32; any strides. Statistics are fp32
    (B, H, M). sample: (effective period, phase) of `sampling.py`, whose M_s then stands for M, and whose
    `row_index` is the last result; that is None without a sample. One launch, over sampled rows only; two where
    few rows see many keys, which are then split over several programs (`parts`; not of extended statistics).
    """
    batch, heads, num_queries, head_dim = query.shape
    period, phase = sample or (1, 0)
    row_length = num_rows(num_queries, period) if sample else num_queries
    shape, device = (batch, heads, row_length), query.device
    idle = batch * heads * row_length * key.shape[2] == 0
    rows = new_rows(shape, device, extended, blank=idle)
    if idle:
        return *rows, row_index(batch, heads, num_queries, period, phase, device) if sample else None
    index = torch.empty(shape, dtype=torch.int64, device=device) if sample else None
    tiles = tiles or probe_tiles(head_dim, query.dtype, options, extended)
    shared, constants, kind, launched = call_arguments(query, key, options, extended, tiles)
    blocks = ceil_div(row_length, tiles.block_m)
    reach = key.shape[2] if options.window_size is None else min(key.shape[2], 2 * options.window_size)
    parts = 1 if extended else parts or _parts(blocks * batch * heads, reach)
    size = rows[0].numel()
    partial = None if parts == 1 else torch.empty(parts * 4 * size, device=device)
    arguments = (
        describe(query, tiles.block_m),
        describe(key, tiles.block_n),
        *rows,
        size,
        index,
        partial,
        row_length,
        period,
        phase,
        *shared,
    )
    sampled = {"SAMPLED": sample is not None}
    constants |= {**sampled, "TILES": BLOCK_ROWS // tiles.block_m, "PARTS": parts}
    # The period and the phase are no part of the key: nothing is compiled for them.
    kind = (*kind, size, row_length)
    launch(_probe_kernel, (grid_1d(blocks, batch * heads), parts, 1), kind, arguments, constants, **launched)
    if parts > 1:
        arguments = (partial, *rows[:4], index, options.sinks, size, row_length, heads, options.scale)
        constants = {"SINKS": options.sinks is not None, "NATURAL": constants["NATURAL"], **sampled}
        constants |= {"PARTS": parts, "BLOCK": _JOIN}
        launch(_join_kernel, (ceil_div(size, _JOIN), 1, 1), kind, arguments, constants, num_warps=4)
    return *rows, index
