"""How the output of the 64 rows of a consumer of the sm_90 forward leaves for global memory."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, tma

from . import steps
from .names import copy_out
from .plan import HALF_ROWS


@gluon.jit
def again(number):
    """The number, of which the compiler does not know that it is the same: what is made of it is computed anew."""
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [number], gl.int32, False, 1)


@gluon.jit
def _store_rows(tile, head, row, rows, first_column, out):
    """Store the first `rows` rows of a tile in shared memory."""
    pointer, head_8, row_8, width_8 = out
    # Without `again` the compiler computes each row's offset once for all blocks, and keeps it in registers.
    stride_h, stride_m, width = head_8 * 8, again(row_8) * 8, width_8 * 8
    COLUMNS: gl.constexpr = tile.shape[1]
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // COLUMNS, COLUMNS // 8], [4, 1], [1, 0])
    inner = gl.arange(0, HALF_ROWS, gl.SliceLayout(1, LAYOUT))
    columns = first_column + gl.arange(0, COLUMNS, gl.SliceLayout(0, LAYOUT))
    first = pointer + head.to(gl.int64) * stride_h + row.to(gl.int64) * stride_m
    offsets = gl.expand_dims(inner * stride_m, 1) + gl.expand_dims(columns, 0)
    inside = (gl.expand_dims(inner, 1) < rows) & (gl.expand_dims(columns, 0) < width)
    gl.store(first + offsets, tile.load(LAYOUT), mask=inside)


@gluon.jit
def store_output(x, staged, out_desc, batch, head, row, rows, out, PLAN: gl.constexpr):
    """Store x (64, D_v) from `row` on, by the bulk-copy engine, which leaves out rows that the tensor does not have.

    Of a pack only the first `rows` rows are stored: behind them are those of another sequence. out: (pointer, stride of
    a head, stride of a row, D_v), the numbers in eights: all are multiples, which makes the stores wide.
    """
    parts = (x,)
    if PLAN.is_wide:
        parts = steps.columns_of_64(x)
    for part in gl.static_range(PLAN.block_dv // PLAN.block_out):
        tma.store_wait(pendings=0)
        tile = staged.reshape([HALF_ROWS, PLAN.block_out])
        tile.store(parts[part])
        fence_async_shared()
        if PLAN.is_pack:
            if rows >= HALF_ROWS:
                copy_out(out_desc, [batch, head, row, part * PLAN.block_out], staged)
            else:
                _store_rows(tile, head, row, rows, part * PLAN.block_out, out)
        else:
            copy_out(out_desc, [batch, head, row, part * PLAN.block_out], staged)
