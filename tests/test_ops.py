"""The public functions: dispatch, autograd, torch.library, torch.compile, autocast, measure."""

from dataclasses import replace

import pytest
import torch
from cases import CASES, Case
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import hnf_attention
from hnf_attention import attention, attention_stats
from hnf_attention.engine import api, operators, run
from hnf_attention.engine.call import Call
from hnf_attention.reference import attention as reference
from hnf_attention.reference.measured import measure

MEASURED = ["causal", "causal window", "everything", "empty rows", "bool mask by head"]
MEASURED += ["packed window", "packed everything"]
GRADCHECKED = ["causal", "softcap", "sinks", "bool mask", "empty rows"]
GRADCHECKED += ["window", "causal window", "additive mask", "negative scale", "packed causal"]


@pytest.mark.parametrize(
    "name", [*GRADCHECKED[:5], *(pytest.param(name, marks=pytest.mark.slow) for name in GRADCHECKED[5:])]
)
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


@pytest.mark.parametrize("shape", [(2, 4, 19, 23), (1, 4, 19, 23), (2, 1, 1, 23), (19, 23)])
def test_an_additive_mask_gets_the_gradient_that_sdpa_gives_it(shape, device):
    q, k, v, *_ = Case().tensors(torch.float32 if device == "cuda" else torch.float64, device)
    hidden = torch.arange(23, device=device) % 7 == 3
    mask = torch.randn(shape).to(q).masked_fill(hidden, -torch.inf).requires_grad_()
    attention(q, k, v, attn_mask=mask)[0].square().sum().backward()
    got, mask.grad = mask.grad, None
    k, v = (x.repeat_interleave(2, 1) for x in (k, v))
    with sdpa_kernel(SDPBackend.MATH):  # on a card the others refuse some of these lengths
        torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).square().sum().backward()
    torch.testing.assert_close(got, mask.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(2, 5, 6), (1, 5, 1), (6,)])
def test_gradcheck_of_the_mask(shape):
    q, k, v, *_ = Case(1, 1, 2, 5, 6, head_dim=3, value_dim=2).tensors(torch.float64)

    def run(mask):
        out, rows = attention(q, k, v, attn_mask=mask, softcap=1.5, is_causal=True)
        return out, rows.lse, rows.entropy

    assert torch.autograd.gradcheck(run, torch.randn(shape, dtype=torch.float64, requires_grad=True))


@pytest.mark.gpu
def test_the_kernels_compute_the_gradient_of_a_mask(monkeypatch):
    """A bias that the batch shares, as T5's: beside fp64, and without the reference."""
    q, k, v, mask, _ = Case(2, 2, 2, 300, 333, 64, 64, mask="additive").tensors(torch.bfloat16, "cuda")
    gradients = []
    for inputs in ([x.cpu().double() for x in (q, k, v, mask)], (q, k, v, mask)):
        leaf = inputs[3].requires_grad_()
        out, rows = attention(*inputs[:3], attn_mask=leaf)
        (out.square().sum() + rows.entropy.sum()).backward()
        gradients.append(leaf.grad.cpu().double())
        for name in ("attention", "backward"):
            monkeypatch.setattr(reference, name, _never)
    exact, got = gradients
    assert (got - exact).norm() <= 1e-2 * exact.norm()


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


@pytest.mark.slow
@pytest.mark.parametrize("name", ["causal", "packed everything"])
def test_opcheck(name, device):
    case = CASES[name]
    q, k, v, mask, sinks = case.tensors(device=device)
    options = case.options(q, k, v, mask, sinks)
    q.requires_grad_()
    for extended in (False, True):
        torch.library.opcheck(operators.forward_op, operators.flat(Call(q, k, v, options, extended)))
    query, key, _, *others = operators.flat(Call(q.detach(), k, None, options, True))
    torch.library.opcheck(operators.sample_op, (query, key, *others, 2, 1))


@pytest.mark.parametrize("extended", [False, True])
def test_opcheck_of_no_queries(extended):
    q, k = torch.randn(1, 2, 0, 4), torch.randn(1, 2, 5, 4)
    options = Case().options(q, k, k, None, None)
    torch.library.opcheck(operators.forward_op, operators.flat(Call(q, k, k, options, extended)))
    rows = attention(q, k, k, extended=extended)[1]
    assert rows.lse is not rows.entropy


def test_gradients_of_the_operator_in_a_batch():
    """The operator is there where a dispatch mode sees the call."""
    q, k, v, *_ = Case().tensors()
    one = q[:1, :1, :3, :].contiguous().requires_grad_()
    k, v = (x[:1, :1] for x in (k, v))

    def out(q):
        return attention(q, k, v)[0]

    expected = torch.autograd.functional.jacobian(out, one)
    with FlopCounterMode(display=False):
        got = torch.autograd.functional.jacobian(out, one, vectorize=True)
    torch.testing.assert_close(got, expected)


def test_compiles_to_a_full_graph(device):
    q, k, v, *_ = Case().tensors(device=device)
    bias = torch.randn(4, 1, 23, device=device)
    leaves = [x.requires_grad_() for x in (q, k, v, bias)]

    def loss(q, k, v, bias):
        out, rows = attention(q, k, v, attn_mask=bias, is_causal=True)
        return out.square().sum() + rows.entropy.sum()

    expected = torch.autograd.grad(loss(*leaves), leaves)
    # aot_eager traces forward and backward like the default backend, without needing a C++ compiler.
    got = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(*leaves), leaves)
    for actual, wanted in zip(got, expected):
        torch.testing.assert_close(actual, wanted)


def test_a_pack_compiles_to_a_full_graph(device):
    case = CASES["packed causal"]
    q, k, v, mask, sinks = case.tensors(device=device)
    keywords = case.keywords(mask, sinks)
    leaves = [x.requires_grad_() for x in (q, k, v)]

    def loss(q, k, v, seqlens):
        out, rows = attention(q, k, v, **keywords | {"seqlens": seqlens})
        some = attention_stats(q, k, **keywords | {"seqlens": seqlens}, sample=(2, 1))
        return out.square().sum() + rows.entropy.sum() + some.entropy.sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for seqlens in (case.seqlens, (0, 7, 23, 30)):  # of another length, and not a constant of the graph
        seqlens = torch.tensor(seqlens, dtype=torch.int32, device=device)
        expected = torch.autograd.grad(loss(*leaves, seqlens), leaves)
        got = torch.autograd.grad(compiled(*leaves, seqlens), leaves)
        for actual, wanted in zip(got, expected):
            torch.testing.assert_close(actual, wanted)


def _never(*_, **__):
    raise AssertionError("took another path")


def test_what_traces_the_call_sees_the_operator(monkeypatch):
    q, k, v, *_ = Case().tensors()
    monkeypatch.setattr(run.EagerAttention, "attach", _never)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(x) for x in (q, k, v)]
        out, rows = attention(*fakes)
        seqlens = torch.tensor([0, 2], dtype=torch.int32)  # fake, too: its numbers are not looked at
        attention_stats(*(x[:1, :, :19] for x in fakes[:2]), seqlens=seqlens, sample=(2, 0))
        fakes[0].requires_grad_()
        assert type(attention(*fakes)[0]) is FakeTensor
    assert type(out) is type(rows.lse) is FakeTensor and out.shape == q.shape
    graph = make_fx(lambda q, k, v: attention(q, k, v)[0])(q, k, v)
    assert any("hnf_attention" in str(node.target) for node in graph.graph.nodes)


def test_detached_statistics_leave_the_output_differentiable():
    case = Case(sinks=True)
    tensors = case.tensors()
    leaves = [tensors[i].requires_grad_() for i in (0, 1, 2, 4)]
    results = []
    for detached in (False, True):
        out, rows = api.attend(*tensors[:3], case.options(*tensors), detached=detached)
        assert rows.lse.requires_grad is rows.entropy.requires_grad is not detached
        results.append(torch.autograd.grad(out.square().sum(), leaves))
    for got, expected in zip(*results):
        assert torch.equal(got, expected)


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
    visible, sink_mass, _, query_square, key_square, sequences, *_ = measure(
        q, k, rows, case.options(q, k, v, mask, sinks)
    )
    empty = (visible == 0).expand(rows.lse.shape)
    assert torch.equal(empty, rows.max_logit == -torch.inf)
    # No fold takes in the mass of an empty row, which is all on its learned sink.
    torch.testing.assert_close(sink_mass[~empty], rows.sink_mass[~empty], rtol=1e-4, atol=1e-5)
    end = None if case.seqlens is None else case.seqlens[-1]
    for got, x in ((query_square, q), (key_square, k.repeat_interleave(case.group, 1))):
        torch.testing.assert_close(got[..., :end], x.square().sum(-1)[..., :end])
        assert end is None or not got[..., end:].any()
    assert sequences is None if end is None else sequences == len(set(case.seqlens)) - 1


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
