"""Steps of the sm_90 forward that Gluon has no words for: branches of a warp, maxima of three, and masks.

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


def _chained(operation: str, result: str, numbers: list[str]) -> list[str]:
    """PTX that folds numbers into `result`, in two chains: the second one ends in `{result}_2`."""
    second = f"{result}_2"
    chains = result, second
    steps = [f"{operation} {chains[i % 2]}, {chains[i % 2]}, {x};" for i, x in enumerate(numbers[1:])]
    return [f"mov.b32 {second}, {numbers[0]};", *steps, f"{operation} {result}, {result}, {second};"]


def _largest(count: int) -> tuple[gl.constexpr, gl.constexpr]:
    """In place of a thread's `count` numbers the largest of those of their row, and of m, the row's maximum so far.

    Where m >= +0 in all rows of a warp, bits compare as integers: an instruction takes three of those. Otherwise
    floating numbers are compared, two at once. NaN comes out as infinity, or is passed over among floating numbers.
    """
    as_integers, as_numbers = [], []
    for row in range(2):
        places = [i for i in range(count) if i // 2 % 2 == row]
        as_integers += _chained("max.s32", f"i{row}", [f"x{i}" for i in places])
        as_integers += [f"min.s32 i{row}, i{row}, 0x7F800000;", f"mov.b32 f{row}, i{row};"]
        as_numbers += _chained("max.f32", f"f{row}", [f"${count + i}" for i in places])
    text = f"""{{
    .reg .s32 x<{count}>, i0, i1, i0_2, i1_2;
    .reg .f32 f0, f1, f0_2, f1_2;
    .reg .pred p;
    {" ".join(f"mov.b32 x{i}, ${count + i};" for i in range(count))}
    mov.b32 f0, ${2 * count};
    mov.b32 f1, ${2 * count + 2};
    mov.b32 i0, f0;
    mov.b32 i1, f1;
    min.s32 i0_2, i0, i1;
    setp.lt.s32 p, i0_2, 0;
    vote.sync.any.pred p, p, 0xffffffff;
    @p bra NUMBERS;
    {" ".join(as_integers)}
    bra.uni DONE;
    NUMBERS:
    {" ".join(as_numbers)}
    DONE:
    {" ".join(f"mov.b32 ${i}, f{i // 2 % 2};" for i in range(count))}
    }}"""
    return gl.constexpr(text), gl.constexpr(",".join(["=f"] * count + ["f"] * (2 * count)))


def _least(count: int) -> tuple[gl.constexpr, gl.constexpr]:
    """In place of a thread's `count` numbers, all <= 0, the smallest of those of their row (see `steps.count`)."""
    steps = []
    for row in range(2):
        places = [f"x{i}" for i in range(count) if i // 2 % 2 == row]
        steps += [f"mov.b32 i{row}, 0;", *_chained("max.u32", f"i{row}", places)]
    text = f"""{{
    .reg .u32 x<{count}>, i0, i1, i0_2, i1_2;
    {" ".join(f"mov.b32 x{i}, ${count + i};" for i in range(count))}
    {" ".join(steps)}
    {" ".join(f"mov.b32 ${i}, i{i // 2 % 2};" for i in range(count))}
    }}"""
    return gl.constexpr(text), gl.constexpr(",".join(["=f"] * count + ["f"] * count))


LARGEST_32, LARGEST_32_OPERANDS = _largest(32)
LARGEST_64, LARGEST_64_OPERANDS = _largest(64)
LEAST_32, LEAST_32_OPERANDS = _least(32)
LEAST_64, LEAST_64_OPERANDS = _least(64)
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
