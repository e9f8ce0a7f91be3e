"""Random problems of the fuzzer, each made from a number: `random_calls` with every option, harder numbers, gradients.

Tensors lie within storages of NaN, and so do the gaps between their elements: what reads beside them shows.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from poison import GUARD, poison_gaps
from random_calls import LAYOUTS, Kind, laid_out, mask_of, size_of
from torch import Tensor

ENTRIES = ("attention", "attention", "attention", "statistics", "sample")
SCORES = ("normal", "equal", "level", "level", "spread", "mixed", "tiny", "infinite", "nan", "value")
LEVELS = (1e4, -1e4, 1e6, -1e6, 4e7, -4e7, 90.0, -90.0, -1e3)  # of all scores of a call, nats
CUDNN_FORMATS = (torch.float16, torch.bfloat16)
RESULTS = ("out", "lse", "entropy")
INPUTS = ("query", "key", "value", "sinks", "mask")
WIDTHS = (1, 3, 8, 16, 16, 20, 24, 32, 64, 64, 80, 128)
SMALL_WIDTHS = (1, 3, 8, 16, 16, 20)


@dataclass(frozen=True)
class Problem:
    """What kernels are compiled for: `kind`, and what SDPA has not. sizes and masks are those of `random_calls`."""

    kind: Kind
    entry: str
    value_dim: int
    is_windowed: bool
    has_softcap: bool
    has_sinks: bool
    is_packed: bool
    extended: bool
    cotangents: tuple[str, ...]  # of RESULTS; none: no gradient
    learned: tuple[str, ...]  # of INPUTS

    @staticmethod
    def draw(rng: random.Random, dtypes: Sequence[torch.dtype], widths: Sequence[int]) -> Problem:
        def chance(share: float) -> bool:
            return rng.random() < share

        kind = replace(Kind.draw(rng, dtypes), width=rng.choice(widths))
        if chance(0.3):  # beside a mask, too, which SDPA does not take
            kind = replace(kind, is_causal=True)
        is_packed = chance(0.15)
        if is_packed:
            kind = replace(kind, sizes=(2, kind.sizes[1], kind.sizes[1]))
        entry = rng.choice(ENTRIES)
        results = RESULTS if entry == "attention" else RESULTS[1:]
        wanted = tuple(name for name in results if chance(0.6)) if entry != "sample" and chance(0.7) else ()
        learned = tuple(name for name in INPUTS if chance(0.7)) if wanted else ()
        return Problem(
            kind,
            entry,
            kind.width if chance(0.7) else rng.choice(widths),
            chance(0.25),
            chance(0.2),
            chance(0.25),
            is_packed,
            chance(0.4),
            wanted if learned else (),
            learned,
        )


@dataclass
class FuzzCase:
    """One problem with its numbers, all on the CPU. It has the attributes that `cases.oracle_scores` reads."""

    number: int
    problem: Problem
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    sinks: Tensor | None
    is_causal: bool
    scale: float | None
    window_size: int | None
    softcap: float | None
    seqlens: tuple[int, ...] | None
    sample: tuple[int, int] | None
    scores: str
    layouts: list[str]
    d_out: Tensor
    d_lse: Tensor
    d_entropy: Tensor

    @property
    def group(self) -> int:
        return self.query.shape[1] // max(1, self.key.shape[1])

    @property
    def used_scale(self) -> float:
        return (
            (self.query.shape[3] ** -0.5 if self.query.shape[3] else 1.0)
            if self.scale is None
            else self.scale
        )

    def __str__(self) -> str:
        shapes = [tuple(x.shape) for x in (self.query, self.key, self.value)]
        numbers = (
            f"scale {self.scale}, window {self.window_size}, soft-cap {self.softcap}, pack {self.seqlens}"
        )
        return (
            f"seed {self.number}: {self.problem.entry}, {self.query.dtype}, q, k, v {shapes}, layouts {self.layouts}, "
            f"mask {self.problem.kind.mask}, causal {self.is_causal}, {numbers}, sinks {self.sinks is not None}, "
            f"extended {self.problem.extended}, scores {self.scores}, sample {self.sample}, "
            f"gradients of {self.problem.cotangents} to {self.problem.learned}"
        )


def _numbers(scores: str, role: str, shape: tuple[int, ...], level: tuple[float, float], generator) -> Tensor:
    """fp64 numbers of q, k or v; level: (number in q, number in k) whose products are scores of one size."""
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    if role == "value":
        return x
    number = level[role == "key"]
    if scores == "equal":
        return torch.full(shape, number, dtype=torch.float64)
    if scores == "level":
        return torch.full_like(x, number) if role == "query" else number * (1 + x / max(10.0, abs(level[0])))
    if scores == "spread":
        return x * 30
    if scores == "tiny":
        return x * 1e-39
    if scores == "mixed":
        return x * 10 ** (6 * torch.rand(shape, generator=generator, dtype=torch.float64) - 4)
    return x


def _break(scores: str, tensors: dict[str, Tensor], rng: random.Random) -> None:
    """Put NaN or inf into a few places."""
    role = "value" if scores == "value" else rng.choice(("query", "key"))
    number = torch.nan if scores == "nan" else rng.choice((torch.inf, -torch.inf, torch.nan))
    x = tensors[role]
    for _ in range(rng.choice((1, 1, 3)) if x.numel() else 0):
        x[tuple(rng.randrange(size) for size in x.shape)] = number


def _seqlens(length: int, rng: random.Random) -> tuple[int, ...]:
    cuts = sorted(rng.randint(0, length) for _ in range(rng.randint(0, 5)))
    return (0, *cuts, length) if rng.random() < 0.6 else (0, *cuts)


def draw_case(
    number: int,
    kinds: int | None = None,
    largest: int = 65,
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.float16, torch.bfloat16, torch.float64),
    widths: Sequence[int] = WIDTHS,
) -> FuzzCase:
    """The case of a number.

    kinds: how many problems the cases of all numbers have; None for any. largest: size of M and N.
    """
    rng = random.Random(f"fuzz {number}")
    problem = Problem.draw(
        rng if kinds is None else random.Random(f"problem {number % kinds}"), dtypes, widths
    )
    kind, generator = problem.kind, torch.Generator().manual_seed(number)
    if kind.sizes[0] == 1:
        batch = kv_heads = group = 1
    else:
        batch, kv_heads, group = (
            rng.choice((1, 1, 2, 3)),
            rng.choice((1, 2, 3) if kinds is None else (2, 3)),
            kind.group,
        )
    queries, keys = (size_of(size, rng, largest) for size in kind.sizes[1:])
    if problem.is_packed:
        batch, keys = 1, queries
    width, value_dim = kind.width, problem.value_dim
    if rng.random() < 0.02:
        sizes = [batch, kv_heads, queries, keys, width, value_dim]
        sizes[rng.randrange(1 if problem.is_packed else 0, 6)] = 0
        if problem.is_packed:
            sizes[2] = sizes[3] = min(sizes[2:4])
        batch, kv_heads, queries, keys, width, value_dim = sizes
    heads, scores = kv_heads * group, rng.choice(SCORES)
    scale = -0.3 if kind.negative else rng.choice((None, None, 0.5, 1.0))
    used_scale = scale or max(1, width) ** -0.5
    wanted = rng.choice(LEVELS)
    number_of_q = (abs(wanted / used_scale) / max(1, width)) ** 0.5
    level = number_of_q, number_of_q if wanted * used_scale > 0 else -number_of_q
    layouts = rng.choices(LAYOUTS, k=3)
    tensors = {}
    for layout, role, shape in zip(
        layouts,
        ("query", "key", "value"),
        ((batch, heads, queries, width), (batch, kv_heads, keys, width), (batch, kv_heads, keys, value_dim)),
    ):

        def draw(size: tuple[int, ...], role: str = role) -> Tensor:
            return _guarded_copy(_numbers(scores, role, size, level, generator).to(kind.dtype))

        tensors[role] = laid_out(layout, shape, draw)
    if scores in ("infinite", "nan", "value"):
        _break(scores, tensors, rng)
    for x in tensors.values():
        poison_gaps(x)
    mask = None
    if kind.mask is not None:
        drawn = mask_of(kind.mask, (batch, heads, queries, keys), kind.dtype, generator)
        mask = drawn if kind.dtype != torch.float64 or drawn.dtype == torch.bool else drawn.double()
    sinks = None
    if problem.has_sinks:
        sinks = torch.randn(heads, generator=generator) * rng.choice((1.0, 1.0, 30.0, 1e4, 1e7))
        if heads and rng.random() < 0.2:
            sinks[rng.randrange(heads)] = -torch.inf
    rows = (batch, heads, queries)
    d_out = torch.randn(*rows, value_dim, generator=generator).to(kind.dtype)
    return FuzzCase(
        number,
        problem,
        **tensors,
        mask=mask,
        sinks=sinks,
        is_causal=kind.is_causal,
        scale=scale,
        window_size=rng.randint(1, largest) if problem.is_windowed else None,
        softcap=rng.choice((0.7, 5.0, 50.0)) if problem.has_softcap else None,
        seqlens=_seqlens(queries, rng) if problem.is_packed else None,
        sample=(rng.randint(1, 4), rng.randint(0, 5)) if problem.entry == "sample" else None,
        scores=scores,
        layouts=layouts,
        d_out=d_out[:1, :1, :1].expand(d_out.shape) if d_out.numel() and rng.random() < 0.2 else d_out,
        d_lse=torch.randn(rows, generator=generator),
        d_entropy=torch.randn(rows, generator=generator),
    )


def _guarded_copy(x: Tensor) -> Tensor:
    storage = torch.full((x.numel() + 2 * GUARD,), torch.nan, dtype=x.dtype)
    storage[GUARD : GUARD + x.numel()] = x.flatten()
    return storage[GUARD : GUARD + x.numel()].view(x.shape)


def on_device(x: Tensor | None, device: str) -> Tensor | None:
    """x with its storage, its strides and its offset on a device."""
    if x is None or device == "cpu":
        return x
    storage = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage()).to(device)
    return storage.as_strided(x.shape, x.stride(), x.storage_offset())
