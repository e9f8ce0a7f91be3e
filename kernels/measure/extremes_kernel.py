"""The extremes of many attention calls in one launch: largest score, largest range, NaN and inf.

A program takes a block of query rows of one (batch, head) of one call against the keys that they see, or it checks a
chunk of the output for NaN and inf.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..shared.gate import EXTREMES, forward_number, is_off
from ..shared.masks import cap_and_mask, key_range, mask_of_head
from ..shared.plan import ScorePlan
from ..shared.sampling import BATCH_STEP, HEAD_STEP

_BATCH_STEP = tl.constexpr(BATCH_STEP)
_HEAD_STEP = tl.constexpr(HEAD_STEP)


# Two tables say where the tensors of each call lie, in int64: addresses, which change from forward to forward, and what
# stays: the address of the result, int32 (fields, H), and strides over batch, heads and rows, in elements.
_QUERY, _KEY, _VALUE, _OUT, _ADDRESSES = (tl.constexpr(place) for place in range(5))
_RESULT = tl.constexpr(0)
_QUERY_B, _KEY_B, _VALUE_B, _OUT_B, _FIXED = (tl.constexpr(place) for place in range(1, 14, 3))
# The fields of a result. Each is a maximum of int32: of scores as `ordered`, of negated numbers of forwards.
FIELDS = ("max_logit", "logit_range", "first_query", "first_key", "first_value", "first_out")
_MAX_LOGIT, _LOGIT_RANGE = tl.constexpr(0), tl.constexpr(1)
_FIRST_QUERY, _FIRST_KEY, _FIRST_VALUE, _FIRST_OUT = (tl.constexpr(place) for place in range(2, 6))


class Table(NamedTuple):
    """The rows of both tables that belong to a call."""

    addresses: Any
    fixed: Any


class OneCall(NamedTuple):
    """The tensors of a single call, as the kernel's own arguments: pointers, and strides as in the table.

    The fields stand here one by one, because Triton 3.6 loses an integer 1 in a tuple within a tuple.
    """

    query_ptr: Any
    key_ptr: Any
    value_ptr: Any
    out_ptr: Any
    query_b: int
    query_h: int
    query_m: int
    key_b: int
    key_h: int
    key_m: int
    value_b: int
    value_h: int
    value_m: int
    out_b: int
    out_h: int
    out_m: int


class LeftOut(NamedTuple):
    """Which queries do not count, uint8 (B, M): a pointer and strides, or None and zeros."""

    ptr: Any
    stride_b: int
    stride_m: int


@dataclass(frozen=True, repr=False)
class ExtremesPlan(ScorePlan):
    """What the kernel is compiled for."""

    has_left_out: bool
    has_out: bool  # the output is known; else q, k and v are checked themselves
    group: int  # query heads of a key head
    head_dim: int
    value_dim: int
    block_m: int
    block_n: int
    block_d: int
    block_dv: int
    chunk: int  # rows of the output that a program checks
    tile: int  # of which it holds so many at a time, here and in q, k and v
    divisor: int  # of all strides, in elements; every address is then a multiple of 16 bytes; 1 for unknown
    single: bool = False  # the kernel gets `OneCall` and no tables


@triton.jit
def ordered(x):
    """fp32 numbers as int32 in the same order."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def unordered(number):
    """The fp32 numbers that `ordered` made int32."""
    return (number ^ ((number >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _tensor(row, like, FIELD: tl.constexpr, STRIDES: tl.constexpr, batch, head, PLAN: tl.constexpr):
    """A pointer to one (batch, head) of a tensor of the table, or of `OneCall`, and the stride of its rows."""
    if PLAN.single:
        PLACE: tl.constexpr = _ADDRESSES - 1 + STRIDES
        pointer = row[FIELD]
        stride_b, stride_h, stride_m = row[PLACE], row[PLACE + 1], row[PLACE + 2]
    else:
        BYTES: tl.constexpr = 16 if PLAN.divisor > 1 else 1
        DIVISOR: tl.constexpr = PLAN.divisor
        pointer = tl.multiple_of(tl.load(row.addresses + FIELD), [BYTES]).to(like.dtype)
        stride_b = tl.multiple_of(tl.load(row.fixed + STRIDES), [DIVISOR])
        stride_h = tl.multiple_of(tl.load(row.fixed + STRIDES + 1), [DIVISOR])
        stride_m = tl.multiple_of(tl.load(row.fixed + STRIDES + 2), [DIVISOR])
    return pointer + batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h, stride_m


@triton.jit
def _load(pointer, stride, rows, length, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """A tile of rows, zeros beyond `length` rows and WIDTH columns."""
    columns = tl.arange(0, BLOCK)
    inside = (rows < length)[:, None]
    if WIDTH != BLOCK:
        inside = inside & (columns < WIDTH)[None, :]
    return tl.load(pointer + rows.to(tl.int64)[:, None] * stride + columns[None, :], mask=inside, other=0.0)


@triton.jit
def _walk_keys(
    high,
    low,
    q,
    k_ptr,
    k_stride,
    tiles,
    offs_m,
    call,
    window,
    mask_ptr,
    PLAN: tl.constexpr,
    MASKED: tl.constexpr,
    NAN_IS_INF: tl.constexpr,
):
    """The largest and the smallest score of rows with the keys of one range, tiles = (first, end)."""
    first, end = tiles
    for start_n in tl.range(first, end, PLAN.block_n):
        offs_n = start_n + tl.arange(0, PLAN.block_n)
        k = _load(k_ptr, k_stride, offs_n, call.num_keys, PLAN.head_dim, PLAN.block_d)
        s = tl.dot(q, k.T, input_precision="ieee") * call.scale
        s, seen, _ = cap_and_mask(s, offs_m[:, None], offs_n[None, :], call, window, mask_ptr, PLAN, MASKED)
        if NAN_IS_INF:
            s = tl.where(s == s, s, float("inf"))
        high = tl.maximum(high, tl.max(s, 1))
        low = tl.minimum(low, tl.min(tl.where(seen, s, float("inf")) if MASKED else s, 1))
    return high, low


@triton.jit
def block_extremes(
    row,
    like,
    left_out,
    call,
    window,
    batch,
    head,
    start_m,
    PLAN: tl.constexpr,
    NAN_IS_INF: tl.constexpr = False,
):
    """The largest score of a block of rows, and the largest range within one of them; -inf where no row counts.

    NAN_IS_INF: whether a score that is NaN counts as inf. A maximum drops it otherwise.
    """
    q_ptr, q_stride = _tensor(row, like, _QUERY, _QUERY_B, batch, head, PLAN)
    k_ptr, k_stride = _tensor(row, like, _KEY, _KEY_B, batch, head // PLAN.group, PLAN)
    offs_m = start_m + tl.arange(0, PLAN.block_m)
    q = _load(q_ptr, q_stride, offs_m, call.num_queries, PLAN.head_dim, PLAN.block_d)
    mask_ptr = mask_of_head(call, batch, head, PLAN)
    high = tl.full([PLAN.block_m], -float("inf"), tl.float32)
    low = tl.full([PLAN.block_m], float("inf"), tl.float32)
    lo, full_lo, full_hi, hi = key_range(
        start_m,
        call.num_queries,
        tl.where(start_m < call.num_queries, call.num_keys, 0),
        window,
        call.bounds_ptr,
        PLAN.block_m,
        PLAN.block_n,
        PLAN.is_causal,
        PLAN,
    )
    for side in tl.static_range(3):
        if side == 0:
            tiles = lo, full_lo
        elif side == 1:
            tiles = full_lo, full_hi
        else:
            tiles = full_hi, hi
        # As in `attend`: some plans leave no tile of a side.
        if (side == 2) or (side == 1 and not PLAN.has_mask) or (side == 0 and PLAN.hides_both_ends):
            high, low = _walk_keys(
                high,
                low,
                q,
                k_ptr,
                k_stride,
                tiles,
                offs_m,
                call,
                window,
                mask_ptr,
                PLAN,
                side != 1,
                NAN_IS_INF,
            )
    counts = (offs_m < call.num_queries) & (high > -float("inf"))
    if PLAN.has_left_out:
        left_ptr = left_out.ptr + batch.to(tl.int64) * left_out.stride_b
        left = tl.load(left_ptr + offs_m * left_out.stride_m, mask=offs_m < call.num_queries, other=1)
        counts = counts & (left == 0)
    wide = tl.where(counts, high - low, -float("inf"))
    wide = tl.where(wide == wide, wide, float("inf"))  # inf - inf
    return tl.max(tl.where(counts, high, -float("inf")), 0), tl.max(wide, 0)


@triton.jit
def _broken(
    row,
    like,
    batch,
    head,
    rows,
    length,
    FIELD: tl.constexpr,
    STRIDES: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    PLAN: tl.constexpr,
):
    """Whether some of a tensor's rows hold NaN or inf; rows = (first, end)."""
    pointer, stride = _tensor(row, like, FIELD, STRIDES, batch, head, PLAN)
    first, end = rows
    bad = 0
    for start in tl.range(first, tl.minimum(end, length), PLAN.tile):
        x = _load(pointer, stride, start + tl.arange(0, PLAN.tile), length, DIM, BLOCK).to(tl.float32)
        bad |= tl.max(tl.max((x - x != 0.0).to(tl.int32), 1), 0)
    return bad != 0


@triton.jit
def _check(row, result_ptr, like, call, batch, head, start, number, PLAN: tl.constexpr):
    """Note NaN and inf in a chunk of the output and, if there are some, in what it was computed from."""
    mine = start, start + PLAN.chunk
    all_keys = mine
    broken = True
    if PLAN.has_out:
        all_keys = 0, call.num_keys
        broken = _broken(
            row,
            like,
            batch,
            head,
            mine,
            call.num_queries,
            _OUT,
            _OUT_B,
            PLAN.value_dim,
            PLAN.block_dv,
            PLAN,
        )
    if broken:
        if PLAN.has_out:
            tl.atomic_max(result_ptr + _FIRST_OUT * call.heads + head, number, sem="relaxed")
        kv_head = head // PLAN.group
        if _broken(
            row,
            like,
            batch,
            head,
            mine,
            call.num_queries,
            _QUERY,
            _QUERY_B,
            PLAN.head_dim,
            PLAN.block_d,
            PLAN,
        ):
            tl.atomic_max(result_ptr + _FIRST_QUERY * call.heads + head, number, sem="relaxed")
        if _broken(
            row,
            like,
            batch,
            kv_head,
            all_keys,
            call.num_keys,
            _KEY,
            _KEY_B,
            PLAN.head_dim,
            PLAN.block_d,
            PLAN,
        ):
            tl.atomic_max(result_ptr + _FIRST_KEY * call.heads + head, number, sem="relaxed")
        if _broken(
            row,
            like,
            batch,
            kv_head,
            all_keys,
            call.num_keys,
            _VALUE,
            _VALUE_B,
            PLAN.value_dim,
            PLAN.block_dv,
            PLAN,
        ):
            tl.atomic_max(result_ptr + _FIRST_VALUE * call.heads + head, number, sem="relaxed")


@triton.jit
def _look(row, result_ptr, like, left_out, call, window, program, number, phase, probes, PLAN: tl.constexpr):
    """What one program does: it takes a block of rows if its number is below `probes`, else a chunk."""
    if program < probes:
        # The blocks of a head come in turn. Other heads, sequences and calls begin elsewhere: see `sampling`.
        batch, head = program // call.heads, program % call.heads
        blocks = tl.cdiv(call.num_queries, PLAN.block_m)
        shift = (batch.to(tl.int64) * _BATCH_STEP + head.to(tl.int64) * _HEAD_STEP) & 0xFFFFFFFF
        block = (phase + ((shift * blocks) >> 32)) % blocks
        start_m = block.to(tl.int32) * PLAN.block_m
        high, wide = block_extremes(row, like, left_out, call, window, batch, head, start_m, PLAN)
        if high > -float("inf"):
            tl.atomic_max(result_ptr + _MAX_LOGIT * call.heads + head, ordered(high), sem="relaxed")
            tl.atomic_max(result_ptr + _LOGIT_RANGE * call.heads + head, ordered(wide), sem="relaxed")
    else:
        chunk, bh = (program - probes) // call.num_bh, (program - probes) % call.num_bh
        batch, head = bh // call.heads, bh % call.heads
        _check(row, result_ptr, like, call, batch, head, chunk * PLAN.chunk, number, PLAN)


@triton.jit(do_not_specialize=["window", "number", "phase", "probes"])
def extremes_kernel(
    addresses_ptr, fixed_ptr, like, left_out, call, window, number, phase, probes, PLAN: tl.constexpr
):
    """The grid is (programs, calls): of a call, `probes` programs take blocks of rows, and the others chunks.

    like: a tensor of the calls' dtype, of which nothing is read. number: minus the number of this forward. phase: which
    block of rows comes next.
    """
    call_number = tl.program_id(1)
    row = Table(addresses_ptr + call_number * _ADDRESSES, fixed_ptr + call_number * _FIXED)
    result_ptr = tl.load(row.fixed + _RESULT).to(tl.pointer_type(tl.int32))
    _look(
        row,
        result_ptr,
        like,
        left_out,
        call,
        window,
        tl.program_id(0),
        number,
        phase + call_number,
        probes,
        PLAN,
    )


@triton.jit(do_not_specialize=["window", "phase", "probes"])
def single_extremes_kernel(
    result_ptr, control_ptr, tensors, left_out, call, window, phase, probes, PLAN: tl.constexpr
):
    """The extremes of a single call, if `control` asks for them: see `control`. The grid is (programs,).

    phase: added to the number of the forward, which says which block of rows comes next.
    """
    if is_off(control_ptr, EXTREMES):
        return
    number = forward_number(control_ptr)
    _look(
        tensors,
        result_ptr,
        tensors.query_ptr,
        left_out,
        call,
        window,
        tl.program_id(0),
        -number,
        number + phase,
        probes,
        PLAN,
    )
