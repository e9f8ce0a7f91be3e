"""A warp-specialised kernel whose parts share nothing: what racecheck says of it is said of Triton's own dispatch.

Each part passes a barrier of its own warps a hundred times, as the Hopper forward's do, and writes to its own place.
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def _part(out_ptr, NUMBER: gl.constexpr):
    for step in range(100):
        gl.thread_barrier()
        gl.store(out_ptr + NUMBER, step)


@gluon.jit
def _kernel(out_ptr):
    gl.warp_specialize(
        [
            (_part, (out_ptr, gl.constexpr(0))),
            (_part, (out_ptr, gl.constexpr(1))),
            (_part, (out_ptr, gl.constexpr(2))),
        ],
        [4, 1],
        [240, 24],
    )


def control() -> None:
    _kernel[(2,)](torch.zeros(3, dtype=torch.int32, device="cuda"), num_warps=4)
