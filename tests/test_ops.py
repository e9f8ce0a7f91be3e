"""The public functions: dispatch, autograd, torch.library, torch.compile, autocast, measure."""

from dataclasses import replace

import pytest
import torch
from cases import CASES, Case

import hnf_attention
from hnf_attention import attention, attention_stats, ops, reference

MEASURED = [
    "causal",
    "causal window",
    "everything",
    "empty rows",
    "bool mask by head",
    "packed causal",
    "packed window",
    "packed everything",
]


@pytest.mark.parametrize("name", ["causal", "softcap", "sinks", "bool mask", "empty rows", "packed causal"])
def test_gradcheck_of_out_lse_and_entropy(name):
    case = replace(CASES[name], batch=1, num_queries=6, num_keys=7, head_dim=3, value_dim=2)
    if case.seqlens is not None:
        case = replace(case, num_keys=6, seqlens=(0, 3, 3, 5))
    q, k, v, mask, sinks = case.tensors(torch.float64)
    leaves = [x.requires_grad_() for x in (q, k, v)] + (
        [] if sinks is None else [sinks.double().requires_grad_()]
    )

    def run(q, k, v, sinks=None):
        out, rows = attention(q, k, v, **case.keywords(mask, sinks))
        return out, torch.where(rows.lse.isfinite(), rows.lse, 0.0), rows.entropy

    assert torch.autograd.gradcheck(run, leaves)


def test_gradcheck_of_the_statistics_alone():
    q, k, *_ = Case(batch=1, num_queries=5, num_keys=6, head_dim=3).tensors(torch.float64)

    def run(q, k):
        rows = attention_stats(q, k, is_causal=True)
        return rows.lse, rows.entropy

    assert torch.autograd.gradcheck(run, (q.requires_grad_(), k.requires_grad_()))


def test_an_additive_mask_that_requires_a_gradient_gets_it():
    q, k, v, mask, _ = Case(mask="additive").tensors(torch.float64)
    mask = mask.double().masked_fill(mask.isinf(), -5.0).requires_grad_()
    attention(q, k, v, attn_mask=mask)[0].square().sum().backward()
    got, mask.grad = mask.grad, None
    k, v = (x.repeat_interleave(2, 1) for x in (k, v))
    torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).square().sum().backward()
    torch.testing.assert_close(got, mask.grad)


def test_matches_sdpa_with_its_own_arguments(device):
    q, k, v, mask, _ = Case(mask="bool").tensors(device=device)
    ours, _ = attention(q, k, v, attn_mask=mask, scale=0.3)
    theirs = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, scale=0.3, enable_gqa=True
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_max_and_min_are_not_differentiable():
    q, k, v, *_ = Case().tensors()
    rows = attention(q.requires_grad_(), k, v)[1]
    assert rows.lse.requires_grad and rows.entropy.requires_grad
    assert not rows.max_logit.requires_grad and not rows.min_logit.requires_grad


@pytest.mark.parametrize("name", ["causal", "everything", "packed causal"])
def test_opcheck(name, device):
    case = CASES[name]
    q, k, v, mask, sinks = case.tensors(device=device)
    o = case.options(q, k, v, mask, sinks)
    q.requires_grad_()
    tensors = (q, k, v, o.attn_mask, o.sinks, o.seqlens)
    arguments = (*tensors, o.is_causal, o.scale, o.window_size, o.softcap)
    torch.library.opcheck(ops._forward_op, arguments)


@pytest.mark.parametrize("name", ["causal", "packed"])
def test_compiles_to_a_full_graph(name, device):
    case = CASES[name]
    q, k, v, mask, sinks = case.tensors(device=device)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    keywords = case.keywords(mask, sinks)

    def loss(q, k, v):
        out, rows = attention(q, k, v, **keywords)
        return out.square().sum() + rows.entropy.sum()

    expected = torch.autograd.grad(loss(*leaves), leaves)
    # aot_eager traces forward and backward like the default backend, without needing a C++ compiler.
    got = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(*leaves), leaves)
    for actual, wanted in zip(got, expected):
        torch.testing.assert_close(actual, wanted)


def test_autocast_casts_as_sdpa_does(device):
    q, k, v, *_ = Case(group=1).tensors(device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        out, rows = attention(q, k, v)
        theirs = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    assert out.dtype == theirs.dtype == torch.bfloat16
    assert rows.lse.dtype == torch.float32
    torch.testing.assert_close(out, theirs, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("name", MEASURED)
def test_measure_agrees_with_the_extended_reference(name, device):
    case = CASES[name]
    q, k, v, mask, sinks = case.tensors(device=device)
    keywords = case.keywords(mask, sinks)
    rows = attention_stats(q, k, extended=True, **keywords)
    visible, sink_mass, query_norm, key_norm = ops.measure(q, k, rows, **keywords)
    torch.testing.assert_close(sink_mass, rows.sink_mass, rtol=1e-4, atol=1e-5)
    assert torch.equal((visible == 0).expand(rows.lse.shape), rows.lse == -torch.inf)
    torch.testing.assert_close(query_norm, q.square().sum((2, 3)).sqrt().amax(0))
    torch.testing.assert_close(key_norm, k.square().sum((2, 3)).sqrt().amax(0).repeat_interleave(case.group))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_packed_sequences_equal_one_call_a_sequence(dtype, device):
    seqlens = torch.tensor([0, 7, 7, 40, 41, 55], dtype=dtype, device=device)
    q, k, v, *_ = Case(1, num_queries=60, num_keys=60).tensors(device=device)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out, rows = attention(q, k, v, is_causal=True, window_size=12, seqlens=seqlens)
    (out.square().sum() + rows.entropy.sum()).backward()
    grads = [x.grad for x in leaves]
    for start, end in zip(seqlens[:-1], seqlens[1:]):
        parts = [x.detach()[:, :, start:end].requires_grad_() for x in leaves]
        alone, alone_rows = attention(*parts, is_causal=True, window_size=12)
        (alone.square().sum() + alone_rows.entropy.sum()).backward()
        torch.testing.assert_close(out[:, :, start:end], alone)
        for name in ("lse", "entropy", "max_logit", "min_logit"):
            torch.testing.assert_close(getattr(rows, name)[..., start:end], getattr(alone_rows, name))
        for grad, part in zip(grads, parts):
            torch.testing.assert_close(grad[:, :, start:end], part.grad)
    assert not out[:, :, 55:].any() and (rows.lse[..., 55:] == -torch.inf).all()
    assert not any(grad[:, :, 55:].any() for grad in grads)


@pytest.mark.gpu
def test_packed_sequences_never_wait_for_the_device():
    q, k, v, *_ = Case(1, num_queries=60, num_keys=60).tensors(torch.bfloat16, "cuda")
    q.requires_grad_()
    cpu = torch.tensor([0, 20, 60])
    on_device = cpu.cuda()

    def run(seqlens):
        out, rows = attention(q, k, v, is_causal=True, seqlens=seqlens)
        ops.measure(q, k, rows, is_causal=True, seqlens=seqlens)
        out.sum().backward()
        return out

    expected = run(on_device)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        got, moved = run(on_device), run(cpu)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(got, expected) and torch.equal(moved, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("numbers", [[5, 3, 90], [-7, 20, 10, -3], [0, 2**31 - 1]])
def test_wrong_sequence_lengths_on_the_device_stay_inside_the_tensors(numbers):
    q, k, v, mask, _ = Case(1, num_queries=60, num_keys=60, mask="bool").tensors(device="cuda")
    out, rows = attention(q, k, v, attn_mask=mask, seqlens=torch.tensor(numbers, device="cuda"))
    assert out.isfinite().all() and rows.entropy.isfinite().all()


def test_head_dims_beyond_the_kernels_take_the_reference(device):
    q, k, v, *_ = Case(head_dim=300, value_dim=16, group=1).tensors(device=device)
    out, rows = attention(q, k, v)
    expected, expected_rows = reference.attention(q, k, v, Case().options(q, k, v, None, None))
    assert torch.equal(out, expected) and torch.equal(rows.entropy, expected_rows.entropy)


def test_tie_mass_asks_for_the_extended_statistics():
    q, k, *_ = Case().tensors()
    with pytest.raises(ValueError, match="extended=True"):
        _ = attention_stats(q, k).tie_mass


def test_public_names_are_there():
    for name in hnf_attention.__all__:
        assert hasattr(hnf_attention, name), name
