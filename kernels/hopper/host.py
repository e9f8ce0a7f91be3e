"""The sm_90 forward on the host: its plan and its launch."""

import functools
from dataclasses import replace

import torch
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ..portable import huge_rows
from ..shared import descriptors
from ..shared.launch import launch
from ..shared.plan import Options, score_plan
from ..shared.results import empty_output, new_rows
from ..shared.softmax import LOG2_E
from ..shared.tiles import block_dim, ceil_div
from .kernel import hopper_kernel
from .places import CHUNK, places_of
from .plan import BLOCK_M, BLOCK_N, HALF_M, MASK_TABLE, NO_TABLE, PACK_TABLE, Plan
from .records import records_of
from .schedule import order_of

_LOG2_E = LOG2_E.value
_DTYPES = {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16}
FLOOR = -(2.0**40)  # log2 units; scores below it are huge, and computed again by `huge_rows`
_CACHED_BYTES = 32 << 20  # of the 50 MiB of L2 of an H100 or H200
# Fields of a `Plan` where others than the defaults were faster, by width and whether there is a window (see
# bench/tune_hopper.py). A change of the kernel can change this: the assembler orders the same instructions otherwise.
_TUNED = {
    (64, False): {"early": True, "by_threes": True},
    (64, True): {"early": True, "by_threes": True, "stages": 4, "shared_unit": True},
    (128, True): {"early": True},
}


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _width(head_dim: int) -> int:
    return max(64, block_dim(head_dim))


@functools.cache
def plan(
    head_dim: int,
    value_dim: int,
    is_causal: bool,
    ragged: bool,
    stats: bool,
    has_sinks: bool = False,
    is_windowed: bool = False,
    table: int = NO_TABLE,
    halves: tuple[bool, bool] = (False, False),
) -> Plan:
    """What the kernel is compiled for."""
    widths = _width(head_dim), _width(value_dim)
    stages = 2 if max(widths) == 128 or widths[1] == 256 else 3
    found = Plan(is_causal, ragged, stats, *widths, stages, has_sinks, is_windowed, table, *halves)
    if found.is_wide:
        found = replace(found, half_last=False, half_first=False)
    if found.bounded or is_causal:  # their first tile is masked, however many keys there are
        found = replace(found, ragged=False)
    return replace(found, **_TUNED.get((max(widths), is_windowed), {}))


@functools.cache
def _layout(rows: int, width: int, dtype: torch.dtype) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout.get_default_for([1, 1, rows, width], _DTYPES[dtype])


def _describe(x: torch.Tensor, rows: int, width: int) -> TensorDescriptor:
    described = descriptors.describe(x, rows, width, TensorDescriptor)
    described.layout = _layout(rows, width, x.dtype)
    return described


def _cached_heads(key: torch.Tensor, value: torch.Tensor, heads: int, options: Options) -> tuple[int, ...]:
    """How many query heads' keys and values fit the L2 cache, of one chunk of a pack; () of other calls.

    Programs walk sequences of a chunk side by side. Neighbours of other calls walk the same keys.
    """
    if options.seqlens is None:
        return ()
    keys = min(key.shape[2], CHUNK * BLOCK_M)
    used = keys * (key.shape[3] + value.shape[3]) * key.element_size() * key.shape[1]
    return (max(1, _CACHED_BYTES * heads // used),)


def _table_of(options: Options) -> int:
    if options.attn_mask is not None:
        return MASK_TABLE
    return NO_TABLE if options.seqlens is None else PACK_TABLE


def _rows_of(out: torch.Tensor, table: int) -> tuple[torch.Tensor, int, int, int] | None:
    """`out` of `output.store_output`, for a pack."""
    if table != PACK_TABLE:
        return None
    return out, out.stride(1) // 8, out.stride(2) // 8, out.shape[3] // 8


def _halves(options: Options, num_queries: int, num_keys: int) -> tuple[bool, bool]:
    """`Plan.half_last` and `Plan.half_first`: where blocks of queries and tiles of keys begin at the same places."""
    window = options.window_size
    last = options.is_causal and options.attn_mask is None and num_queries <= num_keys
    return last, last and window is not None and window % BLOCK_N == 0


def plan_of(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, options: Options) -> Plan:
    """The tuned plan of a call, with statistics."""
    num_queries, num_keys = query.shape[2], key.shape[2]
    return plan(
        query.shape[3],
        value.shape[3],
        options.is_causal,
        num_keys % BLOCK_N > 0,
        True,
        options.sinks is not None,
        options.window_size is not None,
        _table_of(options),
        _halves(options, num_queries, num_keys),
    )


def forward(query, key, value, options, chosen=None):
    """`forward.forward` for the calls that the Hopper engine supports; `chosen` takes the place of the tuned plan."""
    batch, heads, num_queries = query.shape[:3]
    kv_heads, num_keys, value_dim = *key.shape[1:3], value.shape[3]
    rows = new_rows((batch, heads, num_queries), query.device, extended=False, blank=False)
    out = empty_output(query, value_dim)
    num_heads, num_blocks = batch * heads, ceil_div(num_queries, BLOCK_M)
    programs = min(_multiprocessors(query.device), num_heads * num_blocks)
    window, table = options.window_size, _table_of(options)
    chosen = chosen or plan_of(query, key, value, options)
    uneven = options.is_causal or table != NO_TABLE
    order = order_of(num_heads, num_blocks, programs, uneven, *_cached_heads(key, value, heads, options))
    records, bounds = None, None
    if table == PACK_TABLE:
        records, bounds = places_of(options.seqlens, num_keys, score_plan(options), window, chosen.block_n)
    elif table == MASK_TABLE:
        records, bounds = records_of((batch, heads, num_queries, num_keys), options, chosen.block_n)
    unit = options.scale * _LOG2_E
    launch(
        hopper_kernel,
        (programs, 1, 1),
        chosen,
        query.device,
        {
            "q_desc": _describe(query, HALF_M, chosen.block_d),
            "k_desc": _describe(key, chosen.block_n, chosen.block_d),
            "v_desc": _describe(value, chosen.block_n, chosen.block_dv),
            "out_desc": _describe(out, HALF_M, chosen.block_out),
            "pointers": (*rows[:4], options.sinks, records, bounds, _rows_of(out, table)),
            "units": (unit, options.scale, FLOOR / unit),
        },
        {
            "heads": heads,
            "group": heads // kv_heads,
            "num_queries": num_queries,
            "num_keys": num_keys,
            "num_heads": num_heads,
            "together": order.together,
            "stretches": order.stretches,
            "turns": order.turns,
            "window": window or 0,
        },
        num_warps=4,
    )
    if chosen.stats:
        of_rows = bounds if table == PACK_TABLE else None
        huge_rows.compute_again(query, key, value, options, out, rows, of_rows)
    return out, *rows[:5]
