"""One block of query rows against its keys: what the forward and the probe share, on the device and the host."""

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ..shared.masks import cap_and_mask, key_range, mask_of_head
from ..shared.plan import Options, ScorePlan, is_natural, score_plan, unit_exponent
from ..shared.softmax import (
    LOG2_E,
    State,
    first_weight,
    softmax_finish,
    softmax_update,
    start_state,
    units_of,
)
from ..shared.tiles import Tiles, block_dim, load_tile, loads_by_pointers


@dataclass(frozen=True, repr=False)
class AttendPlan(ScorePlan):
    """What the forward and the probe are compiled for."""

    natural: bool  # see `is_natural`
    exponent: int  # see `unit_exponent`
    exact: bool  # see `softmax_update`
    has_sinks: bool
    extended: bool
    group: int  # query heads of a key head
    block_m: int
    block_n: int
    block_d: int
    value_dim: int  # 0 without a value
    block_dv: int
    pointers: bool  # see `load_tile`

    @property
    def scattered(self) -> bool:
        """Whether rows of one masked tile can meet their first visible key at different places."""
        return self.hides_both_ends or self.has_mask


@functools.cache
def _attend_plan(
    scores: ScorePlan,
    natural: bool,
    exponent: int,
    exact: bool,
    has_sinks: bool,
    extended: bool,
    group: int,
    tiles: Tiles,
    head_dim: int,
    value_dim: int,
    by_pointers: bool,
) -> AttendPlan:
    return AttendPlan(
        **vars(scores),
        natural=natural,
        exponent=exponent,
        exact=exact,
        has_sinks=has_sinks,
        extended=extended,
        group=group,
        block_m=tiles.block_m,
        block_n=tiles.block_n,
        block_d=block_dim(head_dim),
        value_dim=value_dim,
        block_dv=block_dim(value_dim or 1),
        pointers=by_pointers,
    )


def attend_plan(
    query: torch.Tensor, key: torch.Tensor, value_dim: int, options: Options, extended: bool, tiles: Tiles
) -> AttendPlan:
    """The plan of one call; value_dim: 0 without a value."""
    scores = score_plan(options)
    exact = query.dtype == torch.float32
    natural = exact or is_natural(scores, options.scale)
    group = query.shape[1] // key.shape[1]
    has_sinks = options.sinks is not None
    exponent = unit_exponent(1.0 if natural else options.scale)
    dims = query.shape[3], value_dim
    by_pointers = loads_by_pointers(query.device)
    return _attend_plan(
        scores, natural, exponent, exact, has_sinks, extended, group, tiles, *dims, by_pointers
    )


@triton.jit
def _walk_keys(
    state,
    acc,
    q,
    k_desc,
    v_desc,
    tiles,
    batch,
    kv_head,
    offs_m,
    call,
    window,
    mask_ptr,
    PLAN: tl.constexpr,
    MASKED: tl.constexpr,
):
    """The state and the output with the keys of one range, tiles = (first, end)."""
    to_natural = 1.0 if PLAN.natural else call.scale
    units = units_of(to_natural * LOG2_E, PLAN.exponent)
    lo, hi = tiles
    # If False, a row's first visible key is the first key of a range.
    SCATTERED: tl.constexpr = MASKED and PLAN.scattered
    for start_n in tl.range(lo, hi, PLAN.block_n):
        k = load_tile(k_desc, batch, kv_head, start_n, PLAN.block_n, PLAN.block_d, PLAN.pointers)
        s = tl.dot(q, k.T, input_precision="ieee")
        if PLAN.exact:
            # A plain product would be fused with the subtraction of the row's maximum. The maximum's own exponent must
            # be exactly 0 (see `log_denominator`), and not what its product was rounded by: 2 nats at 4e7.
            s = tl.fma(s, call.scale, 0.0)
        elif PLAN.natural:
            s = s * call.scale
        offs_n = start_n + tl.arange(0, PLAN.block_n)
        raw = s
        s, seen, _ = cap_and_mask(raw, offs_m[:, None], offs_n[None, :], call, window, mask_ptr, PLAN, MASKED)
        if PLAN.extended:
            unseen = state.more.number == 0.0
        state, p, alpha = softmax_update(state, s, seen, units, MASKED, PLAN.exact, PLAN.extended)
        m, l, w, low, more = state  # noqa: E741
        if PLAN.extended and (SCATTERED or start_n == lo):
            more = first_weight(more, unseen, p, seen, offs_n[None, :], start_n, SCATTERED)
        if PLAN.has_softcap:
            # tanh(inf) is 1, so an infinite score reaches neither l nor w, and the output is finite, as in
            # eager attention. inf * 0 makes w NaN, which only the statistics are made of. raw - raw would not do:
            # fused with the product that raw is, it is that product's rounding error.
            w += tl.sum(tl.where(seen, raw * 0.0, 0.0) if MASKED else raw * 0.0, 1)
        state = State(m, l, w, low, more)
        if PLAN.value_dim:
            v = load_tile(v_desc, batch, kv_head, start_n, PLAN.block_n, PLAN.block_dv, PLAN.pointers)
            acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision="ieee")
    return state, acc


@triton.jit
def attend(
    q_desc,
    k_desc,
    v_desc,
    call,
    window,
    batch,
    head,
    start_m,
    num_keys,
    PLAN: tl.constexpr,
    part=0,
    PARTS: tl.constexpr = 1,
):
    """One block of query rows against part `part` of PARTS of its first `num_keys` keys: the state and the output."""
    kv_head = head // PLAN.group
    offs_m = start_m + tl.arange(0, PLAN.block_m)
    mask_ptr = mask_of_head(call, batch, head, PLAN)
    q = load_tile(q_desc, batch, head, start_m, PLAN.block_m, PLAN.block_d, PLAN.pointers)
    state = start_state(PLAN.block_m, PLAN.extended)
    acc = tl.full([PLAN.block_m, PLAN.block_dv], 0.0, tl.float32)
    lo, full_lo, full_hi, hi = key_range(
        start_m,
        call.num_queries,
        num_keys,
        window,
        call.bounds_ptr,
        PLAN.block_m,
        PLAN.block_n,
        PLAN.is_causal,
        PLAN,
    )
    if PARTS > 1:
        size = tl.cdiv(tl.cdiv(tl.maximum(hi - lo, 0), PLAN.block_n), PARTS) * PLAN.block_n
        first = lo + part * size
        last = tl.maximum(tl.minimum(first + size, hi), first)
        lo, hi = first, last
        full_lo = tl.minimum(tl.maximum(full_lo, first), last)
        full_hi = tl.minimum(tl.maximum(full_hi, first), last)
    for side in tl.static_range(3):
        if side == 0:
            tiles = lo, full_lo
        elif side == 1:
            tiles = full_lo, full_hi
        else:
            tiles = full_hi, hi
        # Tiles on the left are partly visible only under a window or in a pack. A user mask leaves no unmasked tile.
        if (side == 2) or (side == 1 and not PLAN.has_mask) or (side == 0 and PLAN.hides_both_ends):
            state, acc = _walk_keys(
                state,
                acc,
                q,
                k_desc,
                v_desc,
                tiles,
                batch,
                kv_head,
                offs_m,
                call,
                window,
                mask_ptr,
                PLAN,
                side != 1,
            )
    return state, acc


@triton.jit
def finish(
    state,
    sink_ptr,
    head,
    scale,
    SINKS: tl.constexpr,
    NATURAL: tl.constexpr,
    EXTENDED: tl.constexpr,
    EXACT: tl.constexpr,
    EXPONENT: tl.constexpr,
):
    """What `softmax_finish` makes of the state of rows that have seen all their keys."""
    to_natural = 1.0 if NATURAL else scale
    sink = 0.0
    if SINKS:
        sink = tl.load(sink_ptr + head).to(tl.float32) / to_natural
    units = units_of(to_natural * LOG2_E, EXPONENT)
    return softmax_finish(state, units, to_natural, sink, SINKS, EXTENDED, EXACT)


@triton.jit
def store_rows(core, more, rows, row, inside, EXTENDED: tl.constexpr):
    """Store the statistics `core` and `more` of some rows at the places `row` of `rows`."""
    tl.store(rows.lse + row, core.lse, mask=inside)
    tl.store(rows.entropy + row, core.entropy, mask=inside)
    tl.store(rows.max_logit + row, core.max_logit, mask=inside)
    tl.store(rows.min_logit + row, core.min_logit, mask=inside)
    if EXTENDED:
        more_ptr = rows.more
        for field in tl.static_range(len(more)):
            tl.store(more_ptr + row, more[field], mask=inside)
            more_ptr += rows.stride_more
