"""The PTX of the Hopper forward, run by a small interpreter: what the emulation of the kernel takes it to compute."""

import re

import pytest
import torch

pytest.importorskip("triton", reason="Triton kernels need Linux")
from hnf_attention.kernels.hopper import assembly

LANES = 32  # of a warp; a register holds their bits
NAN, INF = float("nan"), float("inf")


def unsigned(x):
    return x.long() & 0xFFFFFFFF


def floating(x):
    return x.view(torch.float32)


def bits(x):
    return x.contiguous().view(torch.int32)


VIEWS = {"s32": lambda x: x, "u32": unsigned, "f32": floating}


def computed(operation, kind, x):
    """A register, of the operands x as numbers of a kind."""
    if operation == "selp":
        return torch.where(x[2], x[0], x[1])
    function = {
        ("max", "s32"): torch.maximum,
        ("min", "s32"): torch.minimum,
        ("max", "f32"): lambda *two: bits(torch.fmax(*map(floating, two))),
        ("mul", "f32"): lambda *two: bits(torch.mul(*map(floating, two))),
        ("max", "u32"): lambda a, b: torch.where(unsigned(a) > unsigned(b), a, b),
    }[operation, kind]
    return function(x[0], x[1])


def run(text, operands):
    """The registers after the text, as floating numbers; `operands` are those from $0 on (None: written by it)."""
    registers = {f"${i}": bits(x) for i, x in enumerate(operands) if x is not None}
    lines = [x.strip() for x in re.sub(r"(\w+:)", r"\1;", text.strip("{} \n")).split(";")]
    lines = [x for x in lines if x and not x.startswith(".reg")]
    labels = {line[:-1]: i for i, line in enumerate(lines) if line.endswith(":")}

    def read(name):
        if name.startswith("0f"):
            number = int(name[2:], 16)
        elif name[0].isdigit():
            number = int(name, 0)
        else:
            return registers[name]
        return torch.full((LANES,), number - (1 << 32 if number >= 1 << 31 else 0), dtype=torch.int32)

    at = 0
    while at < len(lines):
        line, at = lines[at], at + 1
        if line.endswith(":"):
            continue
        guard = re.match(r"@(!?)(\w+) ", line)
        words = line[guard.end() :] if guard else line
        operation, rest = words.split(maxsplit=1)
        names = [x.strip() for x in rest.split(",")]
        if operation.startswith("bra"):
            taken = registers[guard[2]] if guard else torch.ones(LANES, dtype=torch.bool)
            assert taken.all() or not taken.any(), "the threads of a warp go different ways"
            if bool(taken[0]) != bool(guard and guard[1]):
                at = labels[names[0]]
            continue
        kind = operation.split(".")[-1]
        if operation.startswith("vote"):
            of_warp = {"any": torch.any, "all": torch.all}[operation.split(".")[2]]
            registers[names[0]] = of_warp(registers[names[1]]).expand(LANES)
        elif operation.startswith("setp"):
            a, b = (VIEWS[kind](read(x)) for x in names[1:])
            compared = {"lt": a < b, "eq": a == b, "neu": a != b}
            registers[names[0]] = compared[operation.split(".")[1]]
        elif operation == "or.pred":
            registers[names[0]] = registers[names[1]] | registers[names[2]]
        elif operation.startswith("mov"):
            registers[names[0]] = read(names[1])
        else:
            registers[names[0]] = computed(operation.split(".")[0], kind, [read(x) for x in names[1:]])
    return [floating(registers[f"${i}"]) for i, x in enumerate(operands) if x is None]


def rows_of(numbers):
    """The two rows of a thread: the row changes after every two numbers."""
    return [torch.stack([x for i, x in enumerate(numbers) if i // 2 % 2 == row]) for row in range(2)]


def drawn(count, seed=0):
    return list(torch.randn(count, LANES, generator=torch.Generator().manual_seed(seed)))


SIGNS = {
    "any": lambda x: x,
    "negative": lambda x: -x.abs(),
    "positive": lambda x: x.abs(),
    "hidden": lambda x: torch.full_like(x, assembly.HIDDEN.value),
    "negative zero": lambda x: torch.full_like(x, -0.0),
}


@pytest.mark.parametrize("text", [assembly.LARGEST_32, assembly.LARGEST_64], ids=["32", "64"])
@pytest.mark.parametrize(
    "more", [(3.0, 0.5), (0.0, 0.0), (-1.0, 2.0), (-9.0, -9.0), (-0.0, INF), (1.0, -INF)]
)
@pytest.mark.parametrize("sign", SIGNS)
def test_the_largest_of_each_row(text, more, sign):
    count = 32 if text is assembly.LARGEST_32 else 64
    numbers = [SIGNS[sign](x) for x in drawn(count)]
    more = [torch.full((LANES,), x) for x in more]
    more[0][7] = 0.25  # rows of one warp differ
    found = run(text.value, [None] * count + numbers + [more[i // 2 % 2] for i in range(count)])
    for row, held in enumerate(rows_of(numbers)):
        wanted = torch.maximum(held.amax(0), more[row])
        assert all(torch.equal(x, wanted) for x in rows_of(found)[row])


@pytest.mark.parametrize("text", [assembly.LARGEST_32, assembly.LARGEST_64], ids=["32", "64"])
@pytest.mark.parametrize("sign", [1, -1])
def test_nan_is_no_largest_number(text, sign):
    """Among floating numbers it is passed over, among integers it is infinity: its row is NaN by its weight."""
    count = 32 if text is assembly.LARGEST_32 else 64
    numbers = drawn(count)
    numbers[5] = torch.full((LANES,), NAN).copysign(torch.tensor(float(sign)))
    for more, wanted in ((1.0, INF if sign > 0 else None), (-1.0, None), (NAN, INF)):
        found = run(text.value, [None] * count + numbers + [torch.full((LANES,), more)] * count)
        held = rows_of(numbers)[0].nan_to_num(-INF).amax(0).clamp(min=more)
        assert torch.equal(found[0], held if wanted is None else torch.full((LANES,), wanted))


@pytest.mark.parametrize("text", [assembly.LEAST_32, assembly.LEAST_64], ids=["32", "64"])
def test_the_least_of_numbers_that_are_not_positive(text):
    count = 32 if text is assembly.LEAST_32 else 64
    numbers = [-x.abs() for x in drawn(count)]
    numbers[3][4], numbers[9][:] = -INF, 0.0
    found = run(text.value, [None] * count + numbers)
    for row, held in enumerate(rows_of(numbers)):
        assert all(torch.equal(x, held.amin(0)) for x in rows_of(found)[row])


@pytest.mark.parametrize("text", [assembly.RESCALE_32, assembly.RESCALE_64], ids=["32", "64"])
@pytest.mark.parametrize("alphas", [(1.0, 1.0), (0.5, 1.0), (1.0, 0.0)])
def test_rescaled_rows(text, alphas):
    count = 32 if text is assembly.RESCALE_32 else 64
    numbers = drawn(count)
    alphas = [torch.full((LANES,), x) for x in alphas]
    alphas[1][11] = 0.125
    found = run(text.value, [None] * count + numbers + [alphas[i // 2 % 2] for i in range(count)])
    for row in range(2):
        assert torch.equal(rows_of(found)[row], rows_of(numbers)[row] * alphas[row])


def test_masks_of_a_score():
    score, distance = torch.linspace(-3, 3, LANES), torch.arange(-16, 16).int()
    number = torch.full((LANES,), 5).int()
    (found,) = run(assembly.HIDE_UNLESS_LESS.value, [None, score, floating(distance), floating(number)])
    seen = (distance >= 0) & (distance < 5)
    assert torch.equal(found, torch.where(seen, score, assembly.HIDDEN.value))
    hidden = torch.full((LANES,), assembly.HIDDEN.value)
    (found,) = run(assembly.ZERO_WHERE_EQUAL.value, [None, found, hidden])
    assert torch.equal(found, torch.where(seen, score, 0.0))
