"""Packed sequences: every call beside one call a sequence, and what the device works out of their lengths."""

from dataclasses import replace

import pytest
import torch
from cases import EXTENDED, Case, close, errors_beside, extended_oracle, oracle, packed_cases, sdpa
from hypothesis import given, settings
from hypothesis import strategies as st

from hnf_attention import attention, attention_stats
from hnf_attention.engine import engines, fold, library
from hnf_attention.engine.call import Call, check
from hnf_attention.reference import attention as reference
from hnf_attention.reference import masks, sampling
from hnf_attention.reference.context import UNKNOWN
from hnf_attention.reference.fold import new_accumulator
from hnf_attention.statistics import fields
from hnf_attention.statistics.rows import RowStats

pytest.importorskip("triton", reason="Triton kernels need Linux")
from hnf_attention.kernels.measure import fold as kernel
from hnf_attention.kernels.portable import backward, forward, probe
from hnf_attention.kernels.shared import packing
from hnf_attention.kernels.shared.tiles import Tiles

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
TILES = None if ON_GPU else Tiles(16, 16, 4, 1)
# Not square, so that bounds of the two walks are told apart.
BACKWARD_TILES = None if ON_GPU else (Tiles(16, 32, 4, 1), Tiles(32, 16, 4, 1))
CORE = ("lse", "entropy", "max_logit", "min_logit")
PACK = Case(1, 2, 2, 60, 60, seqlens=(0, 7, 7, 40, 41, 55))


def parts(case):
    """Each sequence of a pack that holds a token, and its place."""
    return [slice(a, b) for a, b in zip(case.seqlens, case.seqlens[1:]) if a < b]


def lengths(numbers, device=DEVICE):
    return torch.tensor(numbers, dtype=torch.int32, device=device)


@pytest.mark.slow
@settings(max_examples=5, deadline=None, derandomize=True)
@given(case=packed_cases())
def test_kernels_match_the_oracle_anywhere(case):
    tensors = case.tensors(device=DEVICE)
    q, k, v = tensors[:3]
    options = case.options(*tensors)
    *got, more = forward.forward(q, k, v, options, TILES, extended=True)
    expected = oracle(case, *tensors)
    close(got[0], expected[0], 1e-5, "out")  # under a soft-cap scores round in proportion to it
    for name, actual, wanted in zip(
        (*CORE, *EXTENDED),
        (*got[1:], *more),
        (*expected[1:], *extended_oracle(case, *tensors)),
        strict=True,
    ):
        close(actual, wanted, 2e-5, name)
    for name, actual, wanted in zip(CORE, probe.probe(q, k, options, TILES), expected[1:]):
        close(actual, wanted, 1e-5, name)
    out, lse, entropy = got[:3]
    learns = case.mask == "additive"
    arguments = (q, k, v, options, out, lse, entropy)
    cotangents = (torch.randn_like(out), torch.randn_like(lse), torch.randn_like(lse))
    gradients = backward.backward(*arguments, *cotangents, BACKWARD_TILES, mask_gradient=learns)
    wanted = reference.backward(*arguments, *cotangents, mask_gradient=learns)
    for name, actual, expected in zip(gradients._fields, gradients, wanted):
        if expected is not None:
            # The reference is fp32 here too, and a score of 100 rounds to 4e-6 of its weight.
            close(actual, expected, 2e-5, name)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_a_pack_equals_one_call_a_sequence(dtype, is_causal, device):
    q, k, v, *_ = PACK.tensors(device=device)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    options = {"is_causal": is_causal, "window_size": 12, "extended": True}
    out, rows = attention(*leaves, seqlens=lengths(PACK.seqlens, device).to(dtype), **options)
    gradients = torch.autograd.grad(out.square().sum() + rows.entropy.sum(), leaves)
    for part in parts(PACK):
        alone = [x.detach()[:, :, part].requires_grad_() for x in leaves]
        alone_out, alone_rows = attention(*alone, **options)
        torch.testing.assert_close(out[:, :, part], alone_out)
        for name in (*CORE, *EXTENDED):
            torch.testing.assert_close(getattr(rows, name)[..., part], getattr(alone_rows, name))
        expected = torch.autograd.grad(alone_out.square().sum() + alone_rows.entropy.sum(), alone)
        for actual, wanted in zip(gradients, expected):
            torch.testing.assert_close(actual[:, :, part], wanted)
    unused = slice(PACK.seqlens[-1], None)
    assert not out[:, :, unused].any() and (rows.lse[..., unused] == -torch.inf).all()
    assert not any(gradient[:, :, unused].any() for gradient in gradients)


@pytest.mark.parametrize("is_causal", [pytest.param(False, marks=pytest.mark.slow), True])
def test_tiles_of_other_sequences_are_never_loaded(is_causal, device):
    """What is not finite there would reach the products of any tile that is loaded, hidden or not."""
    length = 128 if ON_GPU else 32  # whole tiles
    pack = tuple(range(0, 4 * length, length))
    case = Case(1, 1, 1, 3 * length, 3 * length, is_causal=is_causal, seqlens=pack)
    q, k, v, *_ = case.tensors(device=device)
    options = case.options(q, k, v, None, None)
    d_out = torch.randn_like(q)
    results = []
    for other in (1.0, torch.nan):
        for x in (q, k, v, d_out):
            x[:, :, length : 2 * length] = other
        out, lse, entropy, *_ = forward.forward(q, k, v, options, TILES)
        arguments = (q, k, v, options, out, lse, entropy, d_out, None, lse, BACKWARD_TILES)
        results.append((out, lse, *probe.probe(q, k, options, TILES)[:2], *backward.backward(*arguments)[:3]))
    for clean, beside_nan in zip(*results):
        for part in (slice(0, length), slice(2 * length, None)):
            assert clean[:, :, part].isfinite().all()
            assert torch.equal(clean[:, :, part], beside_nan[:, :, part])


@pytest.mark.parametrize(("phase", "is_causal"), [(0, False), (1, True)])
def test_a_sample_of_a_pack(phase, is_causal, device):
    """Its blocks are cut from the pack as a whole, borders of sequences or not."""
    case = Case(1, 1, 2, 150, 150, is_causal=is_causal, seqlens=(0, 30, 90, 90, 140))
    q, k, *_ = case.tensors(device=device)
    options = case.options(q, k, None, None, None)
    *core, more, index = probe.probe(q, k, options, TILES, extended=True, sample=(2, phase))
    assert torch.equal(index, sampling.row_index(1, 2, 150, 2, phase, q.device))
    sampled = reference.attention(q, k, None, options, extended=True, index=index)[1]
    full = reference.attention(q, k, None, options, extended=True)[1]
    taken = index >= 0
    for name, actual in zip((*CORE, *EXTENDED), (*core, *more), strict=True):
        close(actual, getattr(sampled, name), 2e-5, name)
        wanted = masks.take_rows(getattr(full, name), index)
        close(actual[taken], wanted[taken], 2e-5, name)


SUMS = ("rows", "judged_rows", "entropy", "logit_range", "normalized_entropy", "max_weight", "sink_mass")
SUMS += ("jacobian_trace_bound", "saturated_rows", "sequences", "query_square", "key_square")


@pytest.mark.parametrize("mask", [None, "additive"])
def test_the_fold_of_a_pack_adds_up_its_sequences(mask, device):
    """But for the spread between blocks of rows, which do not begin anew with a sequence."""
    case = replace(PACK, is_causal=True, mask=mask, sinks=True)
    q, k, _, mask, sinks = case.tensors(device=device)
    q[:, :, 55:], k[:, :, 55:] = 1e3, torch.nan  # of no sequence
    pack, alone = (fold.new_accumulator(q.shape[1], q.device) for _ in range(2))

    def add(accumulator, part, seqlens=None):
        own = None if mask is None else mask[..., part, part]
        settings = {"attn_mask": own, "is_causal": True, "sinks": sinks, "seqlens": seqlens}
        tensors = q[:, :, part], k[:, :, part]
        options = check(*tensors, None, scale=None, window_size=None, softcap=None, **settings)
        fold.fold(accumulator, *tensors, attention_stats(*tensors, **settings), options)

    add(pack, slice(None), lengths(case.seqlens, device))
    for part in parts(case):
        add(alone, part)
    got, expected = fold.collect([pack]), fold.collect([alone])
    for name in SUMS:
        index = fields.SUM_FIELDS.index(name)
        torch.testing.assert_close(got[index], expected[index], msg=name, rtol=1e-5, atol=1e-6)
    assert (got[fields.SUM_FIELDS.index("sequences")] == 4).all()
    keys = fields.NUM_SUMS + fields.MAX_FIELDS.index("num_keys")
    assert (got[keys] == q.shape[2]).all(), "a pack is one call"
    got[keys] = expected[keys]
    rest = slice(len(fields.SUM_FIELDS), None)
    torch.testing.assert_close(got[rest], expected[rest], rtol=1e-5, atol=1e-6)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    length=st.integers(1, 700),
    cuts=st.lists(st.integers(0, 700), max_size=20),
    repeat=st.sampled_from([1, 1, 40]),
    dtype=st.sampled_from([torch.int32, torch.int64]),
)
def test_bounds_from_the_device_are_those_of_the_specification(length, cuts, repeat, dtype):
    numbers = [0, *sorted(min(cut, length) for cut in cuts * repeat)]
    seqlens = torch.tensor(numbers, dtype=dtype, device=DEVICE)
    *bounds, sequences = packing.sequence_bounds(seqlens, length).split([length, length, 1])
    expected = masks.sequence_bounds(seqlens, torch.arange(length, device=DEVICE), length)
    for got, wanted in zip(bounds, expected):
        assert torch.equal(got.long(), wanted)
    assert sequences.item() == masks.num_sequences(seqlens, length) == len(set(numbers)) - 1


SLOW = pytest.mark.slow
WRONG = [
    [5, 3, 90],
    pytest.param([0, 2**31 - 1], marks=SLOW),
    [-7, 20, 10, -3],
    pytest.param([30], marks=SLOW),
]


@pytest.mark.parametrize("numbers", WRONG, ids=str)
def test_wrong_lengths_that_nobody_checked_stay_inside_the_tensors(numbers, device):
    case = Case(1, 1, 1, 40, 40, mask="additive", window_size=20)
    tensors = case.tensors(device=device)
    q, k, v = tensors[:3]
    seqlens = lengths(numbers, device)
    options = case.options(*tensors)._replace(seqlens=seqlens)
    first, end, _ = packing.sequence_bounds(seqlens, 40).split([40, 40, 1])
    assert ((first >= 0) & (first <= 40) & (end >= 0) & (end <= 40)).all()
    out, lse, entropy, *_ = forward.forward(q, k, v, options, TILES)
    assert out.isfinite().all() and entropy.isfinite().all()
    arguments = (q, k, v, options, out, lse, entropy, out, None, entropy, BACKWARD_TILES)
    assert all(x is None or x.isfinite().all() for x in backward.backward(*arguments, mask_gradient=True))
    accumulator = new_accumulator(q.shape[1], device).repeat(3, 1, 1)
    kernel.fold(accumulator, q, k, RowStats(lse, entropy, lse, lse), options, UNKNOWN, fold.kernel_layout())
    assert accumulator[:, : fields.NUM_SUMS].isfinite().all()
    assert reference.attention(q, k, None, options)[1].entropy.isfinite().all()


def test_lengths_that_changed_since_the_forward_are_refused():
    q, k, v, *_ = PACK.tensors()
    seqlens = lengths(PACK.seqlens, "cpu")
    out, _ = attention(q.requires_grad_(), k, v, seqlens=seqlens)
    seqlens += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.gpu
def test_nothing_waits_for_the_device():
    q, k, v, *_ = PACK.tensors(torch.bfloat16, "cuda")
    q.requires_grad_()
    accumulator = fold.new_accumulator(q.shape[1], q.device)

    def run(seqlens):
        out, rows = attention(q, k, v, is_causal=True, seqlens=seqlens)
        options = replace(PACK, is_causal=True).options(q, k, v, None, None)._replace(seqlens=seqlens)
        fold.fold(accumulator, q, k, rows, options._replace(seqlens=seqlens.to("cuda", non_blocking=True)))
        out.sum().backward()
        return out

    near = lengths(PACK.seqlens, "cpu")
    far = near.cuda()
    expected = run(far)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        got, moved = run(far), run(near)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(got, expected) and torch.equal(moved, expected)


@pytest.mark.gpu
def test_the_hopper_forward_takes_a_pack_and_the_library_does_not():
    q, k, v, *_ = Case(1, 2, 1, 256, 256, 64, 64).tensors(torch.bfloat16, "cuda")
    call = Call(q, k, v, Case(seqlens=(0, 100, 256)).options(q, k, v, None, None))
    assert engines.choose(engines.FORWARD, call).name == engines.HOPPER
    assert engines.choose(engines.output_backward(library.Choice()), call).name == engines.TRITON


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("is_causal", [False, True])
def test_error_is_at_most_twice_that_of_sdpa_sequence_by_sequence(head_dim, dtype, is_causal):
    """Relative to fp64, plus one rounding; sequences of less than a tile, of many, and of none."""
    pack = (0, 5, 300, 300, 1000, 1333)
    case = Case(1, 2, 2, 1400, 1400, head_dim, head_dim, is_causal=is_causal, spread=2.0, seqlens=pack)

    def library(q, k, v):
        alone = [sdpa(*(x[:, :, part] for x in (q, k, v)), is_causal) for part in parts(case)]
        return torch.nn.functional.pad(torch.cat(alone, 2), (0, 0, 0, q.shape[2] - pack[-1]))

    for name, (ours, theirs) in errors_beside(library, case, dtype).items():
        assert ours <= 2 * theirs + torch.finfo(dtype).eps / 2, name
