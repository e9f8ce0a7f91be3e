"""Shapes and options that the reference, the kernels and the operators are all tested on."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial

import pytest
import torch
from hypothesis import strategies as st

from hnf_attention import attention
from hnf_attention.engine.call import check
from hnf_attention.reference.options import Options


@dataclass(frozen=True)
class Case:
    """One attention problem; tensors are drawn from `seed`, so that hypothesis can shrink the rest."""

    batch: int = 2
    kv_heads: int = 2
    group: int = 2
    num_queries: int = 19
    num_keys: int = 23
    head_dim: int = 16
    value_dim: int = 16
    is_causal: bool = False
    window_size: int | None = None
    softcap: float | None = None
    sinks: bool = False
    mask: str | None = None  # "bool", "additive", "rows" (some empty rows), "heads" (differs by head)
    scale: float | None = None
    transposed: bool = False  # (B, L, H, D) storage, as models make it
    seed: int = 0
    spread: float = field(default=1.0)  # standard deviation of q
    seqlens: tuple[int, ...] | None = None  # needs batch 1 and as many queries as keys

    def tensors(self, dtype=torch.float32, device="cpu"):
        generator = torch.Generator().manual_seed(self.seed)
        heads = self.kv_heads * self.group

        def draw(h, length, width):
            if self.transposed:
                x = torch.randn(self.batch, length, h, width, generator=generator).transpose(1, 2)
            else:
                x = torch.randn(self.batch, h, length, width, generator=generator)
            return x.to(device=device, dtype=dtype)

        q = draw(heads, self.num_queries, self.head_dim) * self.spread
        k = draw(self.kv_heads, self.num_keys, self.head_dim)
        v = draw(self.kv_heads, self.num_keys, self.value_dim)
        sinks = torch.randn(heads, generator=generator).to(device) if self.sinks else None
        mask = None
        full = (self.batch, heads, self.num_queries, self.num_keys)
        if self.mask in ("bool", "heads"):
            mask = (
                torch.rand(
                    *(full if self.mask == "heads" else (*full[:1], 1, *full[2:])), generator=generator
                )
                > 0.4
            )
        elif self.mask == "rows":
            mask = torch.rand(1, 1, self.num_queries, self.num_keys, generator=generator) > 0.4
            mask[..., ::3, :] = False
        elif self.mask == "additive":
            mask = torch.randn(1, heads, self.num_queries, self.num_keys, generator=generator)
            mask[torch.rand(mask.shape, generator=generator) < 0.2] = -torch.inf
        if mask is not None:
            mask = mask.to(device)
        return q, k, v, mask, sinks

    def keywords(self, mask, sinks) -> dict:
        return {
            "attn_mask": mask,
            "is_causal": self.is_causal,
            "scale": self.scale,
            "window_size": self.window_size,
            "softcap": self.softcap,
            "sinks": sinks,
            "seqlens": None if self.seqlens is None else torch.tensor(self.seqlens, dtype=torch.int32),
        }

    def options(self, q, k, v, mask, sinks) -> Options:
        return check(q, k, v, **self.keywords(mask, sinks))


# The interpreter takes as long as there are heads and tiles, so a case has no more of them than its option needs.
CASES = {
    "plain": Case(2, 2, 1),
    "causal": Case(2, 1, 2, is_causal=True, transposed=True),
    "more queries than keys": Case(1, 1, 2, 37, 11, is_causal=True),
    "window": Case(1, 2, 1, 33, 40, window_size=5),
    "causal window": Case(1, 1, 2, 35, 35, window_size=7, is_causal=True),
    "window past the keys": Case(1, 1, 1, 40, 8, window_size=3),
    "softcap": Case(1, 2, 1, softcap=1.5, spread=3.0),
    "sinks": Case(1, 1, 2, sinks=True, is_causal=True),
    "bool mask": Case(2, 1, 2, mask="bool", transposed=True),
    "bool mask by head": Case(1, 2, 1, mask="heads", sinks=True),
    "empty rows": Case(1, 1, 2, mask="rows", sinks=True),
    "additive mask": Case(1, 2, 1, mask="additive", softcap=2.0),
    "everything": Case(
        1, 1, 2, 40, 40, mask="additive", softcap=2.0, sinks=True, is_causal=True, window_size=9
    ),
    "packed causal": Case(1, 2, 1, 36, 36, seqlens=(0, 14, 27, 27, 31), is_causal=True, sinks=True),
    "packed window": Case(1, 1, 2, 36, 36, seqlens=(0, 0, 1, 18, 36), window_size=6, transposed=True),
    "packed everything": Case(
        1,
        1,
        2,
        40,
        40,
        seqlens=(0, 3, 25, 36),
        mask="additive",
        softcap=2.0,
        sinks=True,
        is_causal=True,
        window_size=9,
    ),
    "negative scale": Case(1, 1, 2, scale=-0.3),
    "odd head dims": Case(2, 1, 1, head_dim=20, value_dim=24),
    "one query": Case(1, 1, 2, num_queries=1),
    "one key": Case(1, 1, 2, num_keys=1),
}


def cases_with(dtypes: list[torch.dtype]) -> list:
    """Parameters (case, dtype): every pair on a card; a dtype a case, in turn, through the slow interpreter."""
    every = torch.cuda.is_available()
    return [
        pytest.param(case, dtype, id=f"{name}-{dtype}")
        for number, (name, case) in enumerate(CASES.items())
        for dtype in (dtypes if every else [dtypes[number % len(dtypes)]])
    ]


def random_cases():
    """Hypothesis strategy over the whole matrix, small enough for the interpreter."""
    return st.builds(
        Case,
        batch=st.integers(1, 2),
        kv_heads=st.integers(1, 2),
        group=st.integers(1, 3),
        num_queries=st.integers(1, 40),
        num_keys=st.integers(1, 40),
        head_dim=st.sampled_from([8, 16, 20, 24, 32]),
        value_dim=st.sampled_from([8, 16, 20, 32]),
        is_causal=st.booleans(),
        window_size=st.none() | st.integers(1, 45),
        softcap=st.none() | st.floats(0.5, 50.0),
        sinks=st.booleans(),
        mask=st.sampled_from([None, "bool", "additive", "rows", "heads"]),
        scale=st.none() | st.floats(-1.0, 1.0).filter(lambda s: abs(s) > 1e-3),
        transposed=st.booleans(),
        seed=st.integers(0, 2**20),
        spread=st.sampled_from([1.0, 4.0]),
    )


@st.composite
def packed_cases(draw):
    """`random_cases`, packed: any split of a few tokens, zero lengths and unused tokens included."""
    length = draw(st.integers(1, 60))
    cuts = draw(st.lists(st.integers(0, length), max_size=6))
    case = draw(random_cases())
    return replace(case, batch=1, num_queries=length, num_keys=length, seqlens=(0, *sorted(cuts)))


def oracle_scores(case: Case, q, k, mask):
    """Scores (B, H, M, N) in fp64, -inf where hidden, and where that is."""
    q, k = q.double(), k.double().repeat_interleave(case.group, 1)
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if case.scale is None else case.scale)
    if case.softcap is not None:
        scores = case.softcap * torch.tanh(scores / case.softcap)
    i = torch.arange(q.shape[2], device=q.device)[:, None]
    j = torch.arange(k.shape[2], device=q.device)
    hidden = torch.zeros(scores.shape, dtype=torch.bool, device=q.device)
    if case.is_causal:
        hidden |= j > i
    if case.window_size is not None:
        hidden |= (i - j).abs() >= case.window_size
    if case.seqlens is not None:
        outside = torch.ones_like(hidden)
        for start, end in zip(case.seqlens, case.seqlens[1:]):
            outside[..., start:end, start:end] = False
        hidden |= outside
    if mask is not None and mask.dtype == torch.bool:
        hidden |= ~mask
    elif mask is not None:
        scores = scores + mask.double()
        hidden |= mask == -torch.inf
    return scores.masked_fill(hidden, -torch.inf), hidden.expand(scores.shape)


def _with_sinks(scores, sinks):
    if sinks is None:
        return scores
    return torch.cat([scores, sinks.double()[None, :, None, None].expand(*scores.shape[:3], 1)], -1)


EXTENDED = (
    "logit_var",
    "collision",
    "score_std",
    "sink_mass",
    "score_mean",
    "log_denominator",
    "visible_keys",
)


def extended_oracle(case: Case, q, k, v, mask, sinks):
    """The statistics of EXTENDED, (B, H, M) in fp64, each from its definition."""
    scores, hidden = oracle_scores(case, q, k, mask)
    elements = _with_sinks(scores, sinks)
    p = elements.softmax(-1).nan_to_num()
    finite = elements.masked_fill(elements == -torch.inf, 0.0)
    mean = (p * finite).sum(-1, keepdim=True)
    count = (~hidden).sum(-1)
    plain = scores.masked_fill(hidden, 0.0)
    plain_mean = plain.sum(-1, keepdim=True) / count.clamp(min=1)[..., None]
    spread = (plain - plain_mean).square().masked_fill(hidden, 0.0).sum(-1) / count.clamp(min=1)
    first = (~hidden).int().argmax(-1, keepdim=True)
    weight_of_first = p.gather(-1, first).squeeze(-1) + p[..., k.shape[2] :].sum(-1)
    statistics = (
        (p * (finite - mean).square()).sum(-1),
        p.square().sum(-1),
        spread.sqrt(),
        weight_of_first,
        plain_mean.squeeze(-1),
        elements.logsumexp(-1) - scores.amax(-1),
        count.double(),
    )
    # A sink that is alone has all the weight.
    alone = (statistics[1], statistics[3]) if sinks is not None else ()
    return tuple(x if any(x is y for y in alone) else x.masked_fill(count == 0, 0.0) for x in statistics)


def oracle(case: Case, q, k, v, mask, sinks):
    """(out, lse, entropy, max_logit, min_logit) in fp64 from the full score matrix, written independently."""
    scores, hidden = oracle_scores(case, q, k, mask)
    v = v.double().repeat_interleave(case.group, 1)
    rows = _with_sinks(scores, sinks)
    empty = hidden.all(-1)
    log_p = rows.log_softmax(-1)
    p = log_p.exp()
    entropy = -torch.where(p > 0, p * log_p, 0.0).sum(-1)
    out = p[..., : k.shape[2]].nan_to_num() @ v
    return (
        out.masked_fill(empty[..., None], 0.0),
        rows.logsumexp(-1).masked_fill(empty & (sinks is None), -torch.inf),
        entropy.masked_fill(empty, 0.0),
        scores.amax(-1),
        torch.where(hidden, torch.inf, scores).amin(-1),
    )


def close(got, expected, tolerance, name):
    """Assert equal infinities and NaNs, and differences within `tolerance` of the largest number (or 1)."""
    got, expected = got.double(), expected.double()
    assert got.shape == expected.shape, f"{name}: {got.shape}, expected {expected.shape}"
    assert torch.equal(got.isinf(), expected.isinf()), f"{name}: other infinities"
    assert torch.equal(got.isnan(), expected.isnan()), f"{name}: other NaNs"
    difference = (got - expected).nan_to_num(0, 0, 0).abs()
    if not expected.numel():
        return
    allowed = tolerance * expected.nan_to_num(0, 0, 0).abs().amax().clamp(min=1.0)
    assert difference.max() <= allowed, f"{name}: off by {difference.max():.2e}, allowed {allowed:.2e}"


NON_FINITE = [torch.nan, torch.inf, -torch.inf]


def break_a_key(number, softcap):
    """(case, tensors, broken): a visible key of batch 0, key head 1 holds `number`; the rows that see it."""
    case = Case(is_causal=True, softcap=softcap)
    tensors = case.tensors()
    tensors[1][0, 1, 5, 2] = number
    broken = torch.zeros(tensors[0].shape[:3], dtype=torch.bool)
    broken[0, case.group :, 5:] = True
    return case, tensors, broken


HEAD_DIMS = [16, 32, 64, 80, 96, 112, 128, (192, 128), 256]  # (D, D_v) for MLA


def sdpa(q, k, v, is_causal):
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=is_causal, enable_gqa=True)


def errors_beside(library, case: Case, dtype) -> dict[str, tuple[float, float]]:
    """Relative L2 error against fp64 of out, dq, dk, dv: (ours, that of `library(q, k, v)` in the same dtype)."""
    leaves = [x.detach().requires_grad_() for x in case.tensors(dtype, "cuda")[:3]]
    exact = [x.detach().double().requires_grad_() for x in leaves]
    shape = (*leaves[0].shape[:3], case.value_dim)
    d_out = torch.randn(shape, device="cuda", generator=torch.Generator("cuda").manual_seed(1)).to(dtype)

    def ours(q, k, v):
        return attention(q, k, v, **case.keywords(None, None))[0]

    def results(fn, inputs):
        out = fn(*inputs)
        return [out.detach(), *torch.autograd.grad(out, inputs, d_out.to(out.dtype))]

    truth = results(library, exact)
    errors = [
        [float((got.double() - true).norm() / true.norm()) for got, true in zip(results(fn, leaves), truth)]
        for fn in (ours, library)
    ]
    return dict(zip(("out", "dq", "dk", "dv"), zip(*errors)))


def errors_beside_sdpa(head_dim, dtype, is_causal, length=333) -> dict[str, tuple[float, float]]:
    """`errors_beside` PyTorch's SDPA."""
    width, value_dim = head_dim if isinstance(head_dim, tuple) else (head_dim, head_dim)
    case = Case(2, 2, 2, length, length, width, value_dim, is_causal=is_causal, spread=2.0)
    return errors_beside(partial(sdpa, is_causal=is_causal), case, dtype)
