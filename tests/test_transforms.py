"""attention() under each way in which PyTorch differentiates and batches, beside the same formula in plain PyTorch."""

from dataclasses import replace

import pytest
import torch
from cases import CASES
from compat_helpers import carried_by
from torch.autograd import forward_ad, functional
from torch.func import grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from hnf_attention import attention, attention_stats
from hnf_attention.engine import api, engines, plain
from hnf_attention.reference.options import Options

pytestmark = [
    pytest.mark.filterwarnings(
        "ignore:Attempted to insert a get_attr Node:UserWarning"
    ),  # PyTorch's, in linearize
]

ALL = (0, 1, 2, 3, 4)
SCALE = 0.4


def arguments(**options):
    """query, key, value, additive mask and sinks; two heads share their keys."""
    generator = torch.Generator().manual_seed(0)
    shapes = (1, 2, 4, 3), (1, 1, 5, 3), (1, 1, 5, 2), (1, 2, 4, 5), (2,)
    drawn = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return tuple(x.to(**options) for x in drawn)


def ours(query, key, value, mask=None, sinks=None):
    out, rows = attention(query, key, value, attn_mask=mask, sinks=sinks, scale=SCALE)
    return out.square().sum() + (rows.lse * rows.entropy).sum()


def formula(query, key, value, mask=None, sinks=None):
    group = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(group, 1) for x in (key, value))
    scores = query @ key.mT * SCALE
    scores = scores if mask is None else scores + mask
    if sinks is not None:
        column = sinks[None, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, column], -1)
    log_p = scores.log_softmax(-1)
    out = log_p[..., : key.shape[2]].exp() @ value
    return out.square().sum() + (scores.logsumexp(-1) * -(log_p.exp() * log_p).sum(-1)).sum()


def same(transformed):
    """What `transformed` makes of our function and of the formula is the same."""
    torch.testing.assert_close(transformed(ours), transformed(formula))


def penalty(f):
    """The gradient of a gradient's square, as gradient penalties take it."""
    leaves = [x.requires_grad_() for x in arguments()]
    first = torch.autograd.grad(f(*leaves), leaves, create_graph=True)
    return torch.autograd.grad(sum(x.square().sum() for x in first), leaves)


def third(f):
    others = arguments()[1:]

    def again(g):
        return grad(lambda query: g(query).sin().sum())

    return again(again(grad(lambda query: f(query, *others))))(arguments()[0])


TRANSFORMS = {
    "grad": lambda f: grad(f, ALL)(*arguments()),
    "without a mask": lambda f: grad(f, (0, 1, 2))(*arguments()[:3]),
    "vjp": lambda f: vjp(f, *arguments())[1](torch.ones((), dtype=torch.float64)),
    "jvp": lambda f: jvp(f, arguments(), arguments()),
    "jacrev": lambda f: jacrev(f, ALL)(*arguments()),
    "jacfwd": lambda f: jacfwd(f, ALL)(*arguments()),
    "hessian": lambda f: hessian(f, ALL)(*arguments()),
    "reverse over reverse": lambda f: jacrev(jacrev(f, (0, 3)), (1, 4))(*arguments()),
    "reverse over forward": lambda f: jacrev(jacfwd(f, (0, 3)), (1, 4))(*arguments()),
    "forward over forward": lambda f: jacfwd(jacfwd(f, 0), (1, 4))(*arguments()),
    "third": third,
}
TRACED = {
    "make_fx of grad": lambda f: make_fx(grad(f, ALL))(*arguments())(*arguments()),
    "linearize": lambda f: linearize(f, *arguments())[1](*arguments()),
}


@pytest.mark.parametrize("transformed", TRANSFORMS.values(), ids=TRANSFORMS)
def test_transforms_of_torch_func(transformed):
    same(transformed)


@pytest.mark.slow
@pytest.mark.parametrize("transformed", TRACED.values(), ids=TRACED)
def test_traced_transforms_of_torch_func(transformed):
    same(transformed)


@pytest.mark.parametrize("inner", ["values", "grad", "jvp", "hessian"])
@pytest.mark.parametrize(
    "in_dims",
    [
        (0, 0, 0, None, None),
        (None, 0, 0, None, None),
        (2, None, None, 0, None),
        (None, None, None, 1, None),
        (0, 0, 0, 0, 0),
        (None, None, None, None, 0),
    ],
)
def test_vmap(in_dims, inner):
    several = [torch.stack([x, x.flip(-1), 2 * x], d or 0) for x, d in zip(arguments(), in_dims)]
    given = [x if d is None else many for x, many, d in zip(arguments(), several, in_dims)]
    kinds = {
        "values": lambda f: f,
        "grad": lambda f: grad(f, ALL),
        "jvp": lambda f: lambda *a: jvp(f, a, a)[1],
        "hessian": lambda f: hessian(f, (0, 4)),
    }
    same(lambda f: vmap(kinds[inner](f), in_dims)(*given))
    if inner == "values":
        same(lambda f: grad(lambda *a: vmap(f, in_dims)(*a).square().sum(), ALL)(*given))


def test_gradients_of_examples_are_one_call(monkeypatch):
    calls = []
    for name in ("forward", "backward"):
        run = getattr(engines, name)
        monkeypatch.setattr(
            engines, name, lambda call, *a, run=run: (calls.append(call.query.shape), run(call, *a))[1]
        )
    many = [torch.stack([x, x, x]) for x in arguments()[:3]]
    vmap(grad(ours, (0, 1, 2)))(*many)
    assert calls == [(3, 2, 4, 3)] * 2


def test_vmap_of_packed_sequences_and_of_samples():
    query = torch.randn(3, 1, 2, 70, 4)
    seqlens = torch.tensor([0, 30, 70])

    def both(query):
        rows = attention(query, query, query, seqlens=seqlens, extended=True)[1]
        some = attention_stats(query, query, sample=(2, 1))
        return rows.score_std, rows.visible_keys, some.lse, some.row_index

    torch.testing.assert_close(vmap(both)(query), tuple(map(torch.stack, zip(*map(both, query)))))


@pytest.mark.parametrize("transformed", [False, True])
def test_autocast_does_not_round_second_derivatives(transformed):
    query, key, value, *_ = arguments(dtype=torch.bfloat16)

    def loss(query):
        return attention(query, key, value)[0].float().square().sum()

    def second(enabled):
        leaf = query.clone().requires_grad_()
        (first,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            if transformed:
                return jacrev(grad(loss))(query)
            return torch.autograd.grad(first.float().square().sum(), leaf)[0]

    assert torch.equal(second(False), second(True))


def test_second_derivatives_of_the_statistics_alone():
    query, key, *_ = arguments()
    got = hessian(lambda q, k: attention_stats(q, k).entropy.sum(), (0, 1))(query, key)
    wanted = hessian(lambda q, k: attention(q, k, k)[1].entropy.sum(), (0, 1))(query, key)
    torch.testing.assert_close(got, wanted)


def in_mode(mode):
    def run(f):
        with mode():
            return penalty(f)

    return run


def in_checkpoint(f):
    leaves = [x.requires_grad_() for x in arguments()]
    first = torch.autograd.grad(checkpoint(f, *leaves, use_reentrant=False), leaves, create_graph=True)
    return torch.autograd.grad(sum(x.square().sum() for x in first), leaves)


def in_reentrant_checkpoint(f):
    leaves = [x.requires_grad_() for x in arguments()]
    checkpoint(f, *leaves, use_reentrant=True).backward()
    return [x.grad for x in leaves]


def of_a_jacobian(f):
    query, *others = arguments()
    query.requires_grad_()

    def two(query):
        return torch.stack([f(query, *others), f(2 * query, *others)])

    first = functional.jacobian(two, query, create_graph=True, vectorize=True)
    return torch.autograd.grad(first.square().sum(), query)


AUTOGRAD = {
    "gradient penalty": penalty,
    "hooks on saved tensors": in_mode(
        lambda: torch.autograd.graph.saved_tensors_hooks(lambda x: x.clone(), lambda x: x.clone())
    ),
    "tensors saved on the CPU": in_mode(torch.autograd.graph.save_on_cpu),
    "a dispatch mode": in_mode(lambda: FlopCounterMode(display=False)),
    "anomaly detection": in_mode(lambda: torch.autograd.set_detect_anomaly(True)),
    "checkpoint": in_checkpoint,
    "reentrant checkpoint": in_reentrant_checkpoint,
    "hessian, vectorized": lambda f: functional.hessian(f, arguments(), vectorize=True),
    "hessian, forward mode": lambda f: functional.hessian(
        f, arguments(), vectorize=True, outer_jacobian_strategy="forward-mode"
    ),
    "jacobian, vectorized, twice": of_a_jacobian,
}


@carried_by("in_gradient_batch")
@pytest.mark.parametrize("differentiated", AUTOGRAD.values(), ids=AUTOGRAD)
@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled:UserWarning")
def test_second_derivatives_of_autograd(differentiated):
    same(differentiated)


def test_a_graph_of_the_gradient_alone_takes_the_kernels(monkeypatch):
    query, key, value, mask, sinks = arguments()
    plainly = torch.autograd.grad(ours(query.requires_grad_(), key, value, mask, sinks), query)
    monkeypatch.setattr(plain, "pull_back", None)  # the second derivative alone needs it
    graphed = torch.autograd.grad(ours(query, key, value, mask, sinks), query, create_graph=True)
    assert torch.equal(plainly[0], graphed[0]) and graphed[0].requires_grad


def test_second_derivatives_of_an_output_whose_statistics_are_detached():
    tensors = arguments()

    def gradient(f):
        leaves = [x.clone().requires_grad_() for x in tensors[:3]]
        (first,) = torch.autograd.grad(f(*leaves).square().sum(), leaves[:1], create_graph=True)
        return torch.autograd.grad(first.square().sum(), leaves)

    options = Options(None, False, SCALE, None, None, None)
    got = gradient(lambda *qkv: api.attend(*qkv, options, detached=True)[0])
    torch.testing.assert_close(got, gradient(lambda *qkv: attention(*qkv, scale=SCALE)[0]))


def dual(f):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(*(forward_ad.make_dual(x, 2 * x) for x in arguments())))


def dual_sinks(f):
    *others, sinks = arguments()
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(*others, forward_ad.make_dual(sinks, sinks)))


def dual_gradient(f):
    leaves = [x.requires_grad_() for x in arguments()]
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(x, x.detach()) for x in leaves]
        found = torch.autograd.grad(f(*duals), leaves, create_graph=True)
        return [forward_ad.unpack_dual(x).tangent for x in found]


@carried_by("current_level")
@pytest.mark.parametrize("differentiated", [dual, dual_sinks, dual_gradient])
def test_forward_mode(differentiated):
    same(differentiated)


def test_forward_mode_takes_the_kernels_for_tensors_without_a_tangent(monkeypatch):
    monkeypatch.setattr(plain, "attend", None)
    with forward_ad.dual_level():
        assert forward_ad.unpack_dual(ours(*arguments())).tangent is None


def test_only_the_output_lse_and_entropy_have_a_tangent():
    query, key, value, *_ = arguments()
    with forward_ad.dual_level():
        rows = attention(forward_ad.make_dual(query, query), key, value, extended=True)[1]
        known = [
            x
            for x, y in vars(rows).items()
            if y is not None and forward_ad.unpack_dual(y).tangent is not None
        ]
    assert known == ["lse", "entropy"]


QUICK = ["everything"]


def checked(name):
    """A tiny fp64 case: the function that torch.autograd.gradcheck takes, and its leaves."""
    case = replace(CASES[name], batch=1, kv_heads=1, num_queries=3, num_keys=4, head_dim=2, value_dim=2)
    if case.seqlens is not None:
        case = replace(case, num_keys=3, seqlens=(0, 1, 1, 2))
    query, key, value, mask, sinks = case.tensors(torch.float64)
    leaves = [query, key, value] + ([] if sinks is None else [sinks.double()])

    def run(query, key, value, sinks=None):
        out, rows = attention(query, key, value, **case.keywords(mask, sinks))
        return out, torch.where(rows.lse.isfinite(), rows.lse, 0.0), rows.entropy

    return run, [x.requires_grad_() for x in leaves]


@pytest.mark.parametrize(
    "name", [x if x in QUICK else pytest.param(x, marks=pytest.mark.slow) for x in CASES]
)
def test_finite_differences_of_every_option(name):
    run, leaves = checked(name)
    assert torch.autograd.gradcheck(
        run, leaves, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(x, marks=pytest.mark.exhaustive if i % 2 else ()) for i, x in enumerate(CASES)]
)
def test_finite_differences_of_the_gradient_of_every_option(name):
    run, leaves = checked(name)
    assert torch.autograd.gradgradcheck(run, leaves, check_fwd_over_rev=True)


COMPILED = {
    "grad": lambda f: grad(f, ALL),
    "jvp": lambda f: lambda *a: jvp(f, a, a),
    "jacrev": lambda f: jacrev(f, ALL),
    "hessian": lambda f: hessian(f),
    "vmap": lambda f: lambda *a: vmap(f)(*(torch.stack([x, 2 * x]) for x in a)),
    "vmap of grad": lambda f: lambda *a: vmap(grad(f, ALL))(*(torch.stack([x, 2 * x]) for x in a)),
}


@pytest.mark.slow
@pytest.mark.parametrize("transform", COMPILED.values(), ids=COMPILED)
def test_transforms_compile_to_a_full_graph(transform):
    torch._dynamo.reset()
    compiled = torch.compile(transform(ours), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*arguments()), transform(formula)(*arguments()))


@pytest.mark.slow
def test_a_compiled_call_keeps_its_tangent():
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*arguments()), ours(*arguments()))
    torch.testing.assert_close(dual(compiled), dual(formula))
