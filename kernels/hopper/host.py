"""The sm_90 forward on the host: how it is scheduled, and its launch."""

import functools
import heapq

import torch
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ..shared import descriptors
from ..shared.launch import launch
from ..shared.plan import unit_exponent
from ..shared.results import empty_output, new_rows
from ..shared.softmax import LOG2_E
from ..shared.tiles import HEAD_GROUP, block_dim, ceil_div
from .kernel import BLOCK_M, BLOCK_N, HALF_M, Plan, hopper_kernel

_LOG2_E = LOG2_E.value
_DTYPES = {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16}
_EARLY = {(64, True)}  # widths and causalities at which Plan.early won in bench/tune_hopper.py


# Never dropped: a captured graph goes on reading its schedule, or copying it from the host's memory.
_schedules: dict[tuple, tuple[torch.Tensor, int]] = {}
_copied_by_graphs: list[torch.Tensor] = []


def _new_schedule(
    num_heads: int, num_queries: int, num_keys: int, is_causal: bool, device: torch.device
) -> tuple[torch.Tensor, int]:
    """Which query blocks each program takes: heavy ones first, each to the least loaded program.

    int32: the programs' offsets into this tensor (one more than programs), then `bh * num_blocks + block`.
    """
    programs = torch.cuda.get_device_properties(device).multi_processor_count
    num_blocks = ceil_div(num_queries, BLOCK_M)

    def cost(block: int) -> int:
        keys = min(num_keys, (block + 1) * BLOCK_M) if is_causal else num_keys
        return ceil_div(keys, BLOCK_N) + 1  # a block's beginning and end cost about one step

    loads = [(0, program) for program in range(programs)]
    tiles: list[list[int]] = [[] for _ in range(programs)]
    for group in range(0, num_heads, HEAD_GROUP):
        for block in reversed(range(num_blocks)):
            for head in range(group, min(group + HEAD_GROUP, num_heads)):
                load, program = loads[0]
                heapq.heapreplace(loads, (load + cost(block), program))
                tiles[program].append(head * num_blocks + block)
    tiles = [part for part in tiles if part]
    offsets = [len(tiles) + 1]
    for part in tiles:
        offsets.append(offsets[-1] + len(part))
    numbers = torch.tensor(offsets + [tile for part in tiles for tile in part], dtype=torch.int32)
    if torch.cuda.is_current_stream_capturing():  # the copy runs when the graph does: nobody else may use it
        pinned = numbers.pin_memory()
        _copied_by_graphs.append(pinned)
        return pinned.to(device, non_blocking=True), len(tiles)
    kind = (num_heads, num_queries, num_keys, is_causal, device)
    _schedules[kind] = numbers.to(device), len(tiles)  # waits, so that every stream may read it
    return _schedules[kind]


def _width(head_dim: int) -> int:
    return max(64, block_dim(head_dim))


@functools.cache
def plan(
    head_dim: int, value_dim: int, is_causal: bool, ragged: bool, stats: bool, scale: float | None = None
) -> Plan:
    """What the kernel is compiled for; scale: head_dim ** -0.5 when None."""
    widths = _width(head_dim), _width(value_dim)
    early = (max(widths), is_causal) in _EARLY
    exponent = unit_exponent(head_dim**-0.5 if scale is None else scale)
    return Plan(early, is_causal, ragged, stats, *widths, 2 if max(widths) == 128 else 3, exponent)


@functools.cache
def _layout(rows: int, width: int, dtype: torch.dtype) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout.get_default_for([1, 1, rows, width], _DTYPES[dtype])


def _describe(x: torch.Tensor, rows: int, width: int) -> TensorDescriptor:
    described = descriptors.describe(x, rows, width, TensorDescriptor)
    described.layout = _layout(rows, width, x.dtype)
    return described


def forward(query, key, value, options, chosen=None):
    """`forward.forward` for the calls that the Hopper engine supports; `chosen` takes the place of the tuned plan."""
    batch, heads, num_queries, head_dim = query.shape
    kv_heads, num_keys, value_dim = *key.shape[1:3], value.shape[3]
    rows = new_rows((batch, heads, num_queries), query.device, extended=False, blank=False)
    out = empty_output(query, value_dim)
    numbers = (batch * heads, num_queries, num_keys, options.is_causal, query.device)
    schedule, programs = _schedules.get(numbers) or _new_schedule(*numbers)
    chosen = chosen or plan(
        head_dim, value_dim, options.is_causal, num_keys % BLOCK_N > 0, True, options.scale
    )
    launch(
        hopper_kernel,
        (programs, 1, 1),
        chosen,
        query.device,
        {
            "q_desc": _describe(query, HALF_M, chosen.block_d),
            "k_desc": _describe(key, BLOCK_N, chosen.block_d),
            "v_desc": _describe(value, BLOCK_N, chosen.block_dv),
            "out_desc": _describe(out, HALF_M, chosen.block_dv),
            "schedule_ptr": schedule,
            "rows": rows[:4],
            "unit": options.scale * _LOG2_E,
            "to_natural": options.scale,
        },
        {
            "heads": heads,
            "group": heads // kv_heads,
            "num_queries": num_queries,
            "num_keys": num_keys,
            "num_blocks": ceil_div(num_queries, BLOCK_M),
        },
        num_warps=4,
    )
    return out, *rows[:5]
