"""A step of the sm_90 forward that Gluon has no words for: a branch of a warp around a product.

A thread holds two rows, r and r + 8, of the 16 of its warp; every thread of a warp takes the same branch.
"""

from triton.experimental.gluon import language as gl


def _rescaling(count: int) -> tuple[gl.constexpr, gl.constexpr]:
    """A thread's `count` numbers times their rows' alpha; the row changes after every two numbers.

    Where alpha is 1 in all rows of the warp, a branch leads past the products.
    """
    numbers = range(count)
    moves = " ".join(f"mov.f32 ${i}, ${count + i};" for i in numbers)
    products = " ".join(f"mul.f32 ${i}, ${i}, ${2 * count + i};" for i in numbers)
    text = f"""{{
    .reg .pred p, q;
    setp.neu.f32 p, ${2 * count}, 0f3F800000;
    setp.neu.f32 q, ${2 * count + 2}, 0f3F800000;
    or.pred p, p, q;
    vote.sync.any.pred p, p, 0xffffffff;
    {moves}
    @!p bra DONE;
    {products}
    DONE:
    }}"""
    return gl.constexpr(text), gl.constexpr(",".join(["=&f"] * count + ["f"] * (2 * count)))


RESCALE_32, RESCALE_32_OPERANDS = _rescaling(32)
RESCALE_64, RESCALE_64_OPERANDS = _rescaling(64)
