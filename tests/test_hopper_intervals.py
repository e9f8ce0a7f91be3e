"""The Hopper forward under windows, packs, boolean masks and with sinks, on a card: against fp64."""

from dataclasses import replace

import pytest
import torch
from cases import Case, close, oracle

from hnf_attention import attention
from hnf_attention.engine import engines
from hnf_attention.engine.call import Call
from hnf_attention.reference import attention as reference

pytest.importorskip("triton", reason="Triton kernels need Linux")

pytestmark = pytest.mark.gpu
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2}  # as in test_kernels.py
FIELDS = {"lse": 1e-5, "entropy": 2e-5, "max_logit": 1e-5, "min_logit": 1e-5}

CALLS = {
    "full": Case(1, 2, 2, 333, 457),
    "causal": Case(1, 2, 2, 700, 700, is_causal=True, transposed=True),
    # With more blocks of queries than the card has multiprocessors, a program computes several in turn.
    "many blocks": Case(2, 8, 2, 1500, 1500),
    "many blocks, causal": Case(2, 8, 2, 1500, 1500, is_causal=True),
    "many blocks, causal window": Case(2, 8, 2, 1500, 1500, window_size=200, is_causal=True),
    "many blocks, window": Case(2, 8, 2, 1500, 1500, window_size=200),
    "many blocks, few keys": Case(2, 8, 2, 2000, 40),
    "many blocks, window, rows without a key": Case(2, 8, 2, 2000, 300, window_size=100),
    "many blocks, causal pack": Case(1, 16, 2, 2000, 2000, seqlens=(0, 3, 700, 1650, 1900), is_causal=True),
    "many blocks, pack": Case(1, 16, 2, 2000, 2000, seqlens=(0, 3, 700, 1650, 1900)),
    "many blocks, short sequences": Case(
        1, 16, 2, 2000, 2000, seqlens=tuple(range(0, 2001, 50)), is_causal=True
    ),
    "many blocks, mask with holes": Case(2, 8, 2, 1500, 400, mask="bool"),
    "causal window": Case(1, 2, 2, 700, 700, window_size=200, is_causal=True),
    "causal window of whole tiles": Case(2, 1, 2, 768, 768, window_size=256, is_causal=True),
    "causal window of one key": Case(1, 1, 1, 300, 300, window_size=1, is_causal=True),
    "causal window, ragged": Case(1, 3, 1, 333, 457, window_size=129, is_causal=True, transposed=True),
    "window": Case(1, 2, 1, 600, 600, window_size=150),
    "window of whole tiles": Case(1, 2, 1, 640, 640, window_size=128),
    "window, rows without a key": Case(1, 1, 2, 900, 300, window_size=250),
    "causal window, rows without a key": Case(1, 1, 2, 900, 300, window_size=90, is_causal=True),
    "window, more keys": Case(1, 2, 1, 190, 700, window_size=90),
    "pack": Case(1, 2, 1, 700, 700, seqlens=(0, 130, 130, 500, 650)),
    "causal pack": Case(1, 2, 2, 700, 700, seqlens=(0, 130, 130, 500, 650), is_causal=True),
    "causal pack that ends early": Case(1, 1, 2, 700, 700, seqlens=(0, 200, 300), is_causal=True),
    "pack of one sequence": Case(1, 1, 2, 512, 512, seqlens=(0, 512), is_causal=True),
    "pack of short sequences": Case(1, 2, 1, 400, 400, seqlens=tuple(range(0, 401, 8)), is_causal=True),
    "causal pack with a window": Case(
        1, 2, 1, 900, 900, seqlens=(0, 100, 800, 900), is_causal=True, window_size=150, transposed=True
    ),
    "pack with a window": Case(1, 1, 1, 900, 900, seqlens=(0, 450, 900), window_size=70),
    "sinks": Case(2, 2, 2, 333, 457, sinks=True),
    "causal sinks": Case(1, 2, 2, 640, 640, sinks=True, is_causal=True),
    "sinks and rows without a key": Case(1, 2, 1, 700, 200, sinks=True, window_size=99),
    "sinks, window and pack": Case(
        1, 1, 2, 700, 700, sinks=True, window_size=99, seqlens=(0, 300, 650), is_causal=True
    ),
    "mask with holes": Case(2, 1, 2, 300, 300, mask="bool"),
    "mask with rows without a key": Case(1, 2, 1, 300, 300, mask="rows", sinks=True),
    "mask of heads with holes": Case(1, 2, 1, 300, 300, mask="heads", is_causal=True),
    "large scores": Case(1, 2, 1, 500, 500, window_size=100, spread=200.0),
    "explicit scale": Case(1, 2, 1, 500, 500, window_size=100, is_causal=True, scale=1.7),
}
WIDTHS = {
    "narrow": (16, 24),
    "padded": (80, 96),
    "value wider": (64, 128),
    "latent attention": (192, 128),
    "padded, wide": (144, 200),
    "value of 256": (64, 256),
}
HALVES = [
    (64, torch.float16),
    (64, torch.bfloat16),
    (128, torch.float16),
    (128, torch.bfloat16),
    (256, torch.bfloat16),
]
DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])


def agree(host, case, tensors):
    options = case.options(*tensors)
    assert engines.choose(engines.FORWARD, Call(*tensors[:3], options)).name == engines.HOPPER
    out, *rows, more = host.forward(*tensors[:3], options)
    assert more is None
    wanted = oracle(case, *tensors)
    half_a_unit = 2.0**-24 * float(wanted[3].nan_to_num(0, 0, 0).abs().max())  # of the largest score, in fp32
    for (name, tolerance), got, true in zip(FIELDS.items(), rows, wanted[1:], strict=True):
        close(got, true, max(tolerance, half_a_unit) if name == "entropy" else tolerance, name)
    close(out, wanted[0], TOLERANCE[out.dtype], "out")


@pytest.mark.parametrize(("head_dim", "dtype"), HALVES)
@pytest.mark.parametrize("case", CALLS.values(), ids=CALLS.keys())
def test_calls_match_the_oracle(host, case, head_dim, dtype):
    case = replace(case, head_dim=head_dim, value_dim=head_dim)
    agree(host, case, case.tensors(dtype, "cuda"))


@pytest.mark.parametrize("kind", ["many blocks, causal", "causal window"])
@pytest.mark.parametrize("widths", WIDTHS.values(), ids=WIDTHS.keys())
def test_widths(host, widths, kind):
    case = replace(CALLS[kind], head_dim=widths[0], value_dim=widths[1])
    agree(host, case, case.tensors(torch.bfloat16, "cuda"))


def padding_masks(batch, length):
    """Boolean masks by name: of keys (B, 1, 1, N), and of rows and keys (B, 1, N, N)."""
    keys, rows = torch.arange(length), torch.arange(length)[:, None]
    lengths = torch.tensor([length, length - 1, length // 3, 1, 0])[:batch, None]
    right, left = keys < lengths, keys >= length - lengths
    causal = keys <= rows
    masks = {
        "right": right[:, None, None],
        "left": left[:, None, None],
        "right, causal rows": right[:, None, None] & causal,
        "left, causal rows": left[:, None, None] & causal,
        "window rows": (right[:, None, None] & causal & (rows - keys < 100)),
    }
    return {name: mask.cuda() for name, mask in masks.items()}


@DTYPES
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("name", padding_masks(1, 8) if torch.cuda.is_available() else ["right"])
@pytest.mark.parametrize(("head_dim", "length"), [(64, 512), (128, 1391)])
def test_padding_matches_the_oracle(host, head_dim, length, name, is_causal, dtype):
    case = Case(5, 2, 2, length, length, head_dim, head_dim, is_causal=is_causal, sinks=head_dim == 64)
    q, k, v, _, sinks = case.tensors(dtype, "cuda")
    agree(host, case, (q, k, v, padding_masks(5, length)[name], sinks))


@pytest.mark.parametrize("seqlens", [None, (0, 300, 500)])
def test_the_smallest_of_equal_scores_is_not_above_the_largest(host, seqlens):
    """A score times the unit, less the same number rounded, may be more than 0."""
    case = Case(1, 4, 2, 500, 500, 64, 64, seqlens=seqlens, is_causal=True)
    q, k, v, *_ = tensors = case.tensors(torch.bfloat16, "cuda")
    k[:] = k[:, :, :1]
    _, _, _, largest, smallest, _ = host.forward(q, k, v, case.options(*tensors))
    assert (smallest <= largest).all() and (largest - smallest <= 2e-6 * largest.abs()).all()


def test_a_pack_of_several_chunks(host):
    """Blocks are sorted in chunks of 128."""
    edges = (0, 900, 5000, 5001, 12000, 16300, 17000, 19000)
    case = Case(1, 1, 1, 19001, 19001, 64, 64, seqlens=edges, is_causal=True)
    agree(host, case, case.tensors(torch.bfloat16, "cuda"))


@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("kind", [{"window_size": 100}, {"seqlens": (0, 250, 600)}])
@pytest.mark.parametrize("is_causal", [False, True])
def test_rows_that_see_a_non_finite_key_are_nan_and_no_others(host, is_causal, kind, number):
    case = Case(1, 2, 2, 600, 600, 64, 64, is_causal=is_causal, **kind)
    q, k, v, *rest = case.tensors(torch.bfloat16, "cuda")
    k[0, 0, 260, 3] = number
    seen = torch.zeros(q.shape[:3], dtype=torch.bool, device="cuda")
    first, end = (161, 360) if "window_size" in kind else (250, 600)
    seen[:, :2, max(first, 260 if is_causal else 0) : end] = True
    got = host.forward(q, k, v, case.options(q, k, v, *rest))[:5]
    for row_stat in got[1:]:
        assert torch.equal(row_stat.isnan(), seen)


@DTYPES
@pytest.mark.parametrize("kind", ["causal window", "causal pack", "mask with holes", "causal sinks"])
def test_huge_rows_are_right(host, kind, dtype):
    case = replace(CALLS[kind], head_dim=64, value_dim=64)
    q, k, v, *rest = case.tensors(dtype, "cuda")
    huge = 2.0**14 if dtype == torch.float16 else 2.0**20
    for row in (0, 130, 299):
        q[0, -1, row] = huge
    k[0, -1, 5], k[0, -1, 290] = huge / 4, -huge / 4
    options = case.options(q, k, v, *rest)
    got = host.forward(q, k, v, options)
    exact, rows = reference.attention(*(x.double() for x in (q, k, v)), options)
    size = torch.maximum(rows.max_logit.abs(), rows.min_logit.abs()).nan_to_num(0, 1, 1).clamp(min=1)
    for number, name in enumerate(FIELDS, 1):
        true = getattr(rows, name)
        assert torch.equal(got[number].isinf(), true.isinf()), name
        assert ((got[number].double() - true).nan_to_num(0, 0, 0).abs() / size).max() <= 2e-5, name
    assert (got[0].double() - exact).abs().max() <= 2e-2


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("kind", ["causal pack", "window", "mask with holes", "causal"])
def test_the_same_bits_in_every_run(host, kind, head_dim):
    case = replace(CALLS[kind], kv_heads=32, head_dim=head_dim, value_dim=head_dim)
    tensors = case.tensors(torch.bfloat16, "cuda")
    options = case.options(*tensors)
    first = host.forward(*tensors[:3], options)[:5]
    differences = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(300):
        for a, b in zip(first, host.forward(*tensors[:3], options)[:5]):
            differences += (a != b).sum()
    assert differences.item() == 0


@pytest.mark.parametrize("kind", ["causal window", "causal pack", "causal sinks", "mask with holes"])
def test_gradients_behind_the_hopper_forward(host, kind):
    case = replace(CALLS[kind], head_dim=64, value_dim=64)
    tensors = case.tensors(torch.bfloat16, "cuda")
    leaves = [x.requires_grad_() for x in tensors[:3]]
    given = case.keywords(*tensors[3:])
    exact = [x.detach().double().requires_grad_() for x in leaves]
    d_out = torch.randn_like(leaves[2].repeat_interleave(case.group, 1)[:, :, : case.num_queries])
    got = torch.autograd.grad(attention(*leaves, **given)[0], leaves, d_out)
    wanted = torch.autograd.grad(attention(*exact, **given)[0], exact, d_out.double())
    for name, actual, true in zip(("dq", "dk", "dv"), got, wanted):
        error = (actual.double() - true).norm() / true.norm()
        assert error < 8e-3, f"{name}: relative error {error:.1e}"
