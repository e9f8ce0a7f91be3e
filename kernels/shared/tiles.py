"""Tile shapes by head dimension, dtype and causality (pinned, nothing is tuned at run time), and tiles in kernels."""

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .plan import Options


class Tiles(NamedTuple):
    """Queries and keys per tile, warps per program, pipelining depth, registers per thread at most."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None  # what lets one more program share the SM


class BackwardTiles(NamedTuple):
    """Tiles of the kernel that walks keys, for dq, and of the one that walks queries, for dk and dv."""

    dq: Tiles
    dkv: Tiles


# Half precision, by (tile width, causal). The winners of bench/tune_forward.py on the H200: under a
# causal mask small query blocks waste less of the diagonal; without one, more keys (D = 64) or more
# queries (D = 128) per step hide the latency of the exponentials better.
_FORWARD_HALF = {
    (64, True): Tiles(64, 64, 4, 2),
    (64, False): Tiles(64, 128, 4, 2),
    (128, True): Tiles(64, 64, 4, 3),
    (128, False): Tiles(128, 64, 4, 2),
    (256, True): Tiles(128, 64, 8, 2),
    (256, False): Tiles(128, 64, 8, 2),
}
# Under a user mask, by (tile width, whether it is additive): the winners of bench/user_masks.py. At 128 they spill
# 2 KB where the mask's rows do not start at 16 bytes, and 64 x 32 next to nothing.
_MASKED_HALF = {
    (64, False): Tiles(64, 64, 4, 2),
    (64, True): Tiles(64, 32, 4, 3),
    (128, False): Tiles(64, 64, 4, 2),
    (128, True): Tiles(64, 32, 4, 3),
    (256, False): Tiles(64, 32, 8, 2),
    (256, True): Tiles(64, 32, 8, 2),
}
_MASKED_UNALIGNED_HALF = Tiles(64, 32, 4, 2)  # at 128
# The extended state spills beside anything but small tiles (read offline; not timed yet).
_EXTENDED_HALF = {64: Tiles(64, 64, 4, 2), 128: Tiles(64, 64, 4, 3), 256: Tiles(64, 32, 8, 2)}
# With packed sequences those tiles spill 0.5 to 1.5 KB, these next to nothing, with or without an output
# (bench/offline.py; not timed yet).
_EXTENDED_PACKED_HALF = {64: Tiles(64, 32, 4, 2), 128: Tiles(64, 32, 4, 2), 256: Tiles(64, 32, 8, 2)}
# A probe has no output to hold, so small tiles leave room for many programs (read offline; not timed yet).
# A sample's blocks have 64 rows.
_PROBE_HALF = {64: Tiles(64, 64, 4, 3), 128: Tiles(64, 64, 4, 3), 256: Tiles(64, 64, 4, 2)}
# fp32 products run on the plain units; small tiles keep the accumulators in registers.
_FORWARD_FLOAT = {64: Tiles(64, 32, 4, 2), 128: Tiles(64, 32, 8, 2), 256: Tiles(32, 32, 8, 1)}
# The backward, half precision, by (tile width, causal), from bench/tune_backward.py. No unmasked
# loop here spills. Two (D = 128) to four (dq at D = 64) programs of four warps share an SM.
_BACKWARD_HALF = {
    (64, True): BackwardTiles(dq=Tiles(64, 64, 4, 2), dkv=Tiles(64, 64, 4, 2)),
    (64, False): BackwardTiles(dq=Tiles(64, 64, 4, 2), dkv=Tiles(64, 64, 4, 2)),
    (128, True): BackwardTiles(dq=Tiles(64, 64, 4, 2), dkv=Tiles(64, 64, 4, 2)),
    (128, False): BackwardTiles(dq=Tiles(64, 64, 4, 2), dkv=Tiles(64, 64, 4, 2)),
    (256, True): BackwardTiles(dq=Tiles(128, 32, 8, 2), dkv=Tiles(32, 64, 8, 2)),
    (256, False): BackwardTiles(dq=Tiles(128, 32, 8, 2), dkv=Tiles(32, 64, 8, 2)),
}
# dq's where it writes every score's gradient out: it spills at 64 x 64 beside a mask whose rows do not
# start at 16 bytes (read offline; not timed yet).
_MASK_GRADIENT_HALF = {64: Tiles(64, 32, 4, 2), 128: Tiles(64, 32, 4, 2), 256: Tiles(64, 32, 8, 2)}
_BACKWARD_FLOAT = {64: Tiles(32, 32, 4, 1), 128: Tiles(32, 32, 8, 1), 256: Tiles(16, 32, 8, 1)}

# Where tiles are loaded by pointers (half precision; read offline for sm_80 and sm_120, not timed on any card): tiles
# that spill little and fit 64 KiB of shared memory. Operands pass through registers there.
_POINTER_FORWARD_HALF = {64: Tiles(64, 64, 4, 2), 128: Tiles(64, 64, 4, 2), 256: Tiles(64, 32, 8, 2)}
# Under a user mask and with extended statistics.
_POINTER_SMALL_HALF = {64: Tiles(64, 32, 4, 2), 128: Tiles(64, 32, 4, 2), 256: Tiles(64, 32, 8, 2)}
_POINTER_BACKWARD_HALF = {
    64: BackwardTiles(dq=Tiles(64, 32, 4, 2), dkv=Tiles(64, 32, 4, 2)),
    128: BackwardTiles(dq=Tiles(64, 32, 4, 2), dkv=Tiles(32, 64, 8, 2)),
    256: BackwardTiles(dq=Tiles(64, 32, 8, 2), dkv=Tiles(32, 32, 8, 1)),
}
# AMD's compiler spills 800 bytes in dk and dv at the tiles above (read for gfx942).
_AMD_DKV_HALF = {64: Tiles(32, 64, 8, 1), 128: Tiles(32, 32, 8, 1), 256: Tiles(32, 32, 8, 1)}

# Query blocks of this many heads run side by side: their keys and values stay in the L2 cache.
HEAD_GROUP = 8
_HEAD_GROUP = tl.constexpr(HEAD_GROUP)
_LARGEST_STRIDE = 1 << 23  # of rows of a tile, whose offsets are 32-bit numbers; a tile has up to 256 rows


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)  # triton.cdiv is for kernels: it costs the host several times as much


def block_dim(head_dim: int) -> int:
    """The tile width of a head dimension: a power of two, at least 16 (the smallest matrix product)."""
    return max(16, 1 << (head_dim - 1).bit_length())  # Triton's own helper costs the host 4 microseconds


def has_edges(options: Options) -> bool:
    """What the tables call causal. Borders of packed sequences are like the diagonal: small blocks waste less."""
    return options.is_causal or options.seqlens is not None


def _width(head_dim: int, value_dim: int) -> int:
    return max(block_dim(head_dim), block_dim(value_dim), 64)


def _masked_tiles(width: int, mask: torch.Tensor) -> Tiles:
    if width == 128 and any(mask.element_size() * stride % 16 for stride in mask.stride()[:-1]):
        return _MASKED_UNALIGNED_HALF
    return _MASKED_HALF[width, mask.dtype != torch.bool]


def forward_tiles(
    head_dim: int,
    value_dim: int,
    dtype: torch.dtype,
    options: Options,
    extended: bool = False,
    by_pointers: bool = False,
) -> Tiles:
    width = _width(head_dim, value_dim)
    if dtype == torch.float32:
        return _FORWARD_FLOAT[width]
    if by_pointers:
        small = extended or options.attn_mask is not None
        return (_POINTER_SMALL_HALF if small else _POINTER_FORWARD_HALF)[width]
    if extended:
        return (_EXTENDED_HALF if options.seqlens is None else _EXTENDED_PACKED_HALF)[width]
    if options.attn_mask is not None:
        return _masked_tiles(width, options.attn_mask)
    return _FORWARD_HALF[width, has_edges(options)]


def probe_tiles(
    head_dim: int, dtype: torch.dtype, options: Options, extended: bool = False, by_pointers: bool = False
) -> Tiles:
    """Tiles of the probe; its query blocks divide a sample's."""
    width = _width(head_dim, 16)
    if dtype == torch.float32:
        return _FORWARD_FLOAT[width]
    if by_pointers:
        return forward_tiles(head_dim, 16, dtype, options, extended, by_pointers)
    return (_EXTENDED_PACKED_HALF if extended and options.seqlens is not None else _PROBE_HALF)[width]


def backward_tiles(
    head_dim: int,
    value_dim: int,
    dtype: torch.dtype,
    options: Options,
    mask_gradient: bool = False,
    by_pointers: bool = False,
    is_amd: bool = False,
) -> BackwardTiles:
    width = _width(head_dim, value_dim)
    if dtype == torch.float32:
        return BackwardTiles(dq=_BACKWARD_FLOAT[width], dkv=_BACKWARD_FLOAT[width])
    tiles = _POINTER_BACKWARD_HALF[width] if by_pointers else _BACKWARD_HALF[width, has_edges(options)]
    if is_amd:
        tiles = tiles._replace(dkv=_AMD_DKV_HALF[width])
    return tiles._replace(dq=_MASK_GRADIENT_HALF[width]) if mask_gradient else tiles


def grid_1d(num_blocks: int, num_heads: int) -> int:
    """Programs of a launch over (block, batch * head); the kernels order them by `HEAD_GROUP`."""
    return num_blocks * ceil_div(num_heads, HEAD_GROUP) * HEAD_GROUP


@triton.jit
def scheduled_block(length, BLOCK: tl.constexpr, LAST_FIRST: tl.constexpr):
    """(first position, batch * head) of this program: HEAD_GROUP heads side by side, the long blocks first.

    Under a causal mask the long ones are the last query blocks and the first key blocks. If the last group is not
    full, some programs get a batch * head that does not exist.
    """
    num_blocks = tl.cdiv(length, BLOCK)
    group = tl.program_id(0) // (_HEAD_GROUP * num_blocks)
    inside = tl.program_id(0) % (_HEAD_GROUP * num_blocks)
    block = inside // _HEAD_GROUP
    if LAST_FIRST:
        block = num_blocks - 1 - block
    return block * BLOCK, group * _HEAD_GROUP + inside % _HEAD_GROUP


class Kind(NamedTuple):
    """A kind of card, as far as tiles depend on it."""

    is_amd: bool
    capability: tuple[int, int]  # compute capability; of an AMD card what PyTorch calls so


@functools.cache
def kind_of(device: torch.device) -> Kind:
    """The kind of a CUDA or ROCm device; Triton's interpreter counts as a card with a bulk-copy engine."""
    if device.type != "cuda":
        return Kind(False, (9, 0))
    return Kind(torch.version.hip is not None, torch.cuda.get_device_capability(device))


def loads_by_pointers(device: torch.device) -> bool:
    """Whether kernels load tiles by pointers: everywhere but on compute capability 9.x and 10.x.

    Cards before 9.0 and AMD's have no bulk-copy engine, and Triton compiles a descriptor's load to loads of single
    elements. 12.x has one, but its products take operands from registers, as those of 8.x do.
    """
    kind = kind_of(device)
    return kind.is_amd or kind.capability[0] not in (9, 10)


class Pointers(NamedTuple):
    """A tensor (B, H, L, D) of inner stride 1, for loads by pointers."""

    ptr: Any
    stride_b: int
    stride_h: int
    stride_m: int
    length: int
    width: int


def pointable(x: torch.Tensor) -> torch.Tensor:
    """x (B, H, L, D), or a copy if its strides are none that `Pointers` has."""
    return x if x.stride(3) == 1 and x.stride(2) < _LARGEST_STRIDE else x.contiguous()


def pointers(x: torch.Tensor) -> Pointers:
    """x (B, H, L, D), copied if need be."""
    x = pointable(x)
    return Pointers(x, *x.stride()[:3], *x.shape[2:])


@triton.jit
def load_tile(source, batch, head, row, ROWS: tl.constexpr, COLS: tl.constexpr, POINTERS: tl.constexpr):
    """(ROWS, COLS) of one (batch, head) from `row` on, zeros beyond its end. source: `Pointers`, or a descriptor."""
    if POINTERS:
        rows, columns = tl.arange(0, ROWS)[:, None], tl.arange(0, COLS)[None, :]
        start = source.ptr + tl.cast(batch, tl.int64) * source.stride_b
        start += tl.cast(head, tl.int64) * source.stride_h + tl.cast(row, tl.int64) * source.stride_m
        inside = (row + rows < source.length) & (columns < source.width)
        return tl.load(start + (rows * source.stride_m + columns), mask=inside, other=0.0)
    else:  # without it, Triton would compile the next line in both cases
        return source.load([batch, head, row, 0]).reshape(ROWS, COLS)


@triton.jit
def load_rows(desc, batch_head, row, ROWS: tl.constexpr):
    return desc.load([batch_head, row]).reshape(ROWS)
