"""Steps of the sm_90 forward that Gluon has no words for: a branch of a warp around a product, and a comparison.

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
# In place of a hidden score: no sum of rounded products gives this number. Times the unit it is so large that it stays
# the same when any maximum is subtracted, so that what it gives can be told from what other scores give. If rounding
# made them differ, the row's smallest score would come out huge, and the row would be computed again.
HIDDEN = gl.constexpr(-1.1234568042301955e30)
_HIDDEN_BITS = "0fF162E15B"

# The two masks of a score: HIDDEN unless an unsigned number is less than another; 0 in place of a number that equals
# another. LLVM packs the results of a comparison in Gluon into words and unpacks them, at 150 instructions a tile.
HIDE_UNLESS_LESS = gl.constexpr(f"""{{
    .reg .pred p;
    setp.lt.u32 p, $2, $3;
    selp.f32 $0, $1, {_HIDDEN_BITS}, p;
    }}""")
ZERO_WHERE_EQUAL = gl.constexpr("""{
    .reg .pred p;
    setp.eq.f32 p, $1, $2;
    selp.f32 $0, 0f00000000, $1, p;
    }""")


def _named_barrier(action: str, number: int) -> gl.constexpr:
    """Triton takes the barriers from 0 on, one for each part of a kernel and a few more; there are 16."""
    return gl.constexpr(f"bar.{action} {number}, 256; mov.b32 $0, $1;")


# Half of the 256 threads wait at a barrier, the others announce themselves.
WAIT_FIRST, WAIT_SECOND = _named_barrier("sync", 14), _named_barrier("sync", 15)
GIVE_FIRST, GIVE_SECOND = _named_barrier("arrive", 14), _named_barrier("arrive", 15)
