"""How kernels read `control`."""

import triton
import triton.language as tl

from . import control

EXTREMES, STATISTICS, EVALUATION = map(
    tl.constexpr, (control.EXTREMES, control.STATISTICS, control.EVALUATION)
)
_NUMBER = tl.constexpr(control.NUMBER)


@triton.jit
def is_off(control_ptr, WANTED: tl.constexpr):
    """Whether none of these bits is set."""
    return (tl.load(control_ptr) & WANTED) == 0


@triton.jit
def forward_number(control_ptr):
    """The number of the forward, int32."""
    return (tl.load(control_ptr) & _NUMBER).to(tl.int32)
