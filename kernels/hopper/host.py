"""The sm_90 forward on the host: its plan and its launch."""

import functools

import torch
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ..portable import huge_rows
from ..shared import descriptors
from ..shared.launch import launch
from ..shared.results import empty_output, new_rows
from ..shared.softmax import LOG2_E
from ..shared.tiles import block_dim, ceil_div
from .kernel import BLOCK_M, BLOCK_N, HALF_M, Plan, hopper_kernel
from .schedule import order_of

_LOG2_E = LOG2_E.value
_DTYPES = {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16}
_EARLY = {(64, True)}  # widths and causalities at which Plan.early won in bench/tune_hopper.py


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _width(head_dim: int) -> int:
    return max(64, block_dim(head_dim))


@functools.cache
def plan(head_dim: int, value_dim: int, is_causal: bool, ragged: bool, stats: bool) -> Plan:
    """What the kernel is compiled for."""
    widths = _width(head_dim), _width(value_dim)
    early = (max(widths), is_causal) in _EARLY
    return Plan(early, is_causal, ragged, stats, *widths, stages=2 if max(widths) == 128 else 3)


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
    num_heads, num_blocks = batch * heads, ceil_div(num_queries, BLOCK_M)
    programs = min(_multiprocessors(query.device), num_heads * num_blocks)
    order = order_of(num_heads, num_blocks, programs, options.is_causal)
    chosen = chosen or plan(head_dim, value_dim, options.is_causal, num_keys % BLOCK_N > 0, True)
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
            "rows": rows[:4],
            "unit": options.scale * _LOG2_E,
            "to_natural": options.scale,
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
        },
        num_warps=4,
    )
    if chosen.stats:
        huge_rows.compute_again(query, key, value, options, out, rows)
    return out, *rows[:5]
