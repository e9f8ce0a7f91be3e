"""Attention rows to test the error bounds on: families of inputs, and rounded attention simulated on a CPU.

A case is q (M, D), k (N, D), v (N, D_v) in fp64, with numbers that the storage format holds exactly, and scale D^-1/2.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
BLOCK = 64  # keys per step of the simulated online softmax
LARGEST_PRODUCT = 6e4  # q.k that eager fp16 attention can still store


@dataclass
class Case:
    q: Tensor
    k: Tensor
    v: Tensor

    @property
    def scale(self) -> float:
        return self.q.shape[-1] ** -0.5

    def rounded(self, dtype: torch.dtype) -> "Case":
        return Case(*(x.to(dtype).double() for x in (self.q, self.k, self.v)))

    def scores(self) -> tuple[Tensor, Tensor]:
        """Scores and their magnitudes, (..., M, N), exact (fp64)."""
        k = self.k.transpose(-1, -2)
        return self.scale * (self.q @ k), self.scale * (self.q.abs() @ k.abs())


def simulate(case: Case, dtype: torch.dtype, kind: str) -> tuple[Tensor, Tensor]:
    """The output of a kernel with fp32 sums, (..., M, D_v) fp64, and the same before its last rounding."""
    q, k, v = (x.float() for x in (case.q, case.k, case.v))
    raw = q @ k.transpose(-1, -2)
    if kind == "eager":
        scores = (raw.to(dtype) * torch.tensor(case.scale, dtype=torch.float32)).to(dtype).float()
        p = scores.softmax(-1).to(dtype).float()
        out = p @ v
        return out.to(dtype).double(), out.double()
    # Flash: as in fused kernels, the exponential has base 2, and its constant is folded into the scale.
    factor = torch.tensor(case.scale * 1.4426950408889634, dtype=torch.float32)
    top = torch.full_like(raw[..., :1], -torch.inf)
    total, out = torch.zeros_like(top), torch.zeros(*raw.shape[:-1], v.shape[-1])
    for start in range(0, raw.shape[-1], BLOCK):
        block = raw[..., start : start + BLOCK]
        new = torch.maximum(top, block.amax(-1, keepdim=True))
        decay = torch.exp2((top - new) * factor)
        weight = torch.exp2(block * factor - new * factor)
        total = total * decay + weight.sum(-1, keepdim=True)
        out = out * decay + weight.to(dtype).float() @ v[..., start : start + BLOCK, :]
        top = new
    out = out / total
    return out.to(dtype).double(), out.double()


def to_bits(x: Tensor, bits: int) -> Tensor:
    """x rounded to this many significand bits."""
    mantissa, exponent = torch.frexp(x)
    return torch.ldexp((mantissa * 2.0**bits).round() / 2.0**bits, exponent)


def exact(case: Case) -> Tensor:
    scores, _ = case.scores()
    return scores.softmax(-1) @ case.v


def _plain(draw, m, n, d, d_v, std):
    return Case(draw(m, d) * std**0.5, draw(n, d) * std**0.5, draw(n, d_v))


def _sink(draw, m, n, d, d_v, std):
    case = _plain(draw, m, n, d, d_v, std)
    direction = torch.sign(draw(1, d))
    case.k[:1] = 2.0 * direction * std**0.5
    case.q += 0.5 * direction * std**0.5
    case.v[:1] *= 0.01
    return case


def _ties(draw, m, n, d, d_v, std):
    case = _plain(draw, m, n, d, d_v, std)
    copies = torch.randint(0, 4, (n,))
    case.k = case.k[copies.clamp(max=n - 1)] + 1e-3 * draw(n, d)
    return case


def _common(draw, m, n, d, d_v, std):
    case = _plain(draw, m, n, d, d_v, std)
    case.k = 8.0 * std**0.5 * draw(1, d) + case.k
    return case


def _aligned(draw, m, n, d, d_v, std):
    """Every product of one row positive: no cancellation, scores as large as their magnitude."""
    case = _plain(draw, m, n, d, d_v, std)
    return Case(case.q.abs(), case.k.abs(), case.v)


def _one_signed(draw, m, n, d, d_v, std):
    case = _plain(draw, m, n, d, d_v, std)
    return Case(case.q, case.k, case.v.abs() + 1.0)


def _heavy(draw, m, n, d, d_v, std):
    def tail(*shape):
        return draw(*shape) / (draw(*shape).abs() + 0.05)

    return Case(tail(m, d) * std**0.5 / 3.0, tail(n, d) * std**0.5 / 3.0, tail(n, d_v))


def _offset_value(draw, m, n, d, d_v, std):
    case = _plain(draw, m, n, d, d_v, std)
    return Case(case.q, case.k, 30.0 + case.v)


def _low_rank(draw, m, n, d, d_v, std):
    basis = draw(2, d)
    return Case(draw(m, 2) @ basis * std**0.5, draw(n, 2) @ basis * std**0.5 / 2.0, draw(n, 2) @ draw(2, d_v))


def _cancelling(draw, m, n, d, d_v, std):
    """Products that are far larger than their sum."""
    case = _plain(draw, m, n, d, d_v, std)
    big = 6.0 * std**0.5 * draw(1, d // 2)
    case.q[:, : d // 2] += big
    case.q[:, d // 2 : 2 * (d // 2)] -= big
    case.k[:, d // 2 : 2 * (d // 2)] = case.k[:, : d // 2]
    return case


def _tiny_values(draw, m, n, d, d_v, std):
    """Values near the bottom of fp16."""
    case = _plain(draw, m, n, d, d_v, std)
    return Case(case.q, case.k, 1e-6 * case.v)


FAMILIES = {
    "plain": _plain,
    "sink": _sink,
    "ties": _ties,
    "common mode": _common,
    "aligned signs": _aligned,
    "one-signed V": _one_signed,
    "heavy tails": _heavy,
    "offset V": _offset_value,
    "low rank": _low_rank,
    "cancelling": _cancelling,
    "tiny V": _tiny_values,
}
STDS = (0.03, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)


def make(family: str, seed: int, rows: int) -> Case:
    """A seeded case of that family: length 8 to 1024, dimension 16 to 128, score std 0.03 to 300."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def choose(options, weights):
        return options[int(torch.multinomial(torch.tensor(weights), 1, generator=generator))]

    n = choose((8, 16, 32, 64, 128, 256, 512, 1024), (4.0, 4.0, 4.0, 4.0, 4.0, 2.0, 1.0, 0.5))
    d = choose((16, 32, 64, 128), (1.0, 1.0, 1.0, 1.0))
    std = choose(STDS, (1.0,) * len(STDS))
    torch.manual_seed(seed)
    case = FAMILIES[family](draw, rows, n, d, d, std)
    # Stored products must not overflow fp16: `overflow_paths` covers that, not the bound.
    product = (case.q @ case.k.T).abs().max()
    if product > LARGEST_PRODUCT:
        case.q *= LARGEST_PRODUCT / product
    return case
