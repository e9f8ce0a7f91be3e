"""nn.MultiheadAttention under instrument(), and the drop-in: PyTorch's results, and the right statistics."""

import copy
import pickle
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from hnf_attention import MultiheadAttention, instrument

E, H, L, S = 16, 4, 6, 9
OPTIONS = {
    "plain": {},
    "batch first": {"batch_first": True},
    "no bias": {"bias": False},
    "bias and zero keys": {"add_bias_kv": True, "add_zero_attn": True},
    "other widths": {"kdim": 8, "vdim": 12, "batch_first": True},
    "dropout": {"dropout": 0.3},
    "fp64": {"dtype": torch.float64},
}
CALLS = {
    "weights": {},
    "weights by head": {"average_attn_weights": False},
    "no weights": {"need_weights": False},
    "boolean mask": {"attn_mask": torch.arange(S) > torch.arange(L)[:, None] + 2},
    "additive mask": {"attn_mask": torch.linspace(-2, 2, L * S).view(L, S), "need_weights": False},
    "mask by head": {"attn_mask": torch.rand(2 * H, L, S, generator=torch.Generator().manual_seed(0)) > 0.7},
    "padding": {"key_padding_mask": torch.arange(S) >= torch.tensor([[7], [9]]), "need_weights": False},
    "padding, weights": {"key_padding_mask": torch.arange(S) >= torch.tensor([[7], [9]])},
}
QUICK_CALLS = ("weights", "padding")  # with every option; the plain module gets every call
PAIRS = [
    pytest.param(
        options,
        call,
        id=f"{kind}-{name}",
        marks=() if kind == "plain" or name in QUICK_CALLS else pytest.mark.slow,
    )
    for kind, options in OPTIONS.items()
    for name, call in CALLS.items()
]


def inputs(options, unbatched=False):
    generator = torch.Generator().manual_seed(1)
    shapes = [(L, 2, E), (S, 2, options.get("kdim", E)), (S, 2, options.get("vdim", E))]
    if options.get("batch_first"):
        shapes = [(shape[1], shape[0], shape[2]) for shape in shapes]
    if unbatched:
        shapes = [(L, E), *((S, shape[2]) for shape in shapes[1:])]
    dtype = options.get("dtype", torch.float32)
    return [torch.randn(s, generator=generator, dtype=dtype, requires_grad=True) for s in shapes]


def typed(call, tensors):
    mask = call.get("attn_mask")
    if mask is None or not mask.is_floating_point():
        return call
    return call | {"attn_mask": mask.to(tensors[0])}


def run(module, tensors, call):
    """Output, weights, gradients of inputs and parameters; the same random numbers each time."""
    torch.manual_seed(3)
    out, weights = module(*tensors, **typed(call, tensors))
    gradients = torch.autograd.grad(out.square().sum(), [*tensors, *module.parameters()], allow_unused=True)
    return out, weights, gradients


def entropies(module, tensors, call):
    """Of each head, (B, H, L), from the weights of a copy without dropout."""
    module = copy.deepcopy(module).eval()
    call = typed(call, tensors) | {"need_weights": True, "average_attn_weights": False}
    weights = module(*(x.detach() for x in tensors), **call)[1]
    return torch.special.entr(weights.detach().double()).sum(-1).reshape(-1, H, L)


def same(results, expected):
    for got, wanted in zip(results, expected):
        if wanted is None:
            assert got is None
        else:
            torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("options", "call"), PAIRS)
def test_the_drop_in_gives_what_the_original_gives(options, call, training):
    torch.manual_seed(0)
    original = nn.MultiheadAttention(E, H, **options).train(training)
    ours = MultiheadAttention(E, H, **options).train(training)
    ours.load_state_dict(original.state_dict())
    tensors = inputs(options)
    out, weights, gradients = run(ours, tensors, call)
    expected = run(original, tensors, call)
    same((out, weights), expected[:2])
    same(gradients, expected[2])
    torch.testing.assert_close(
        ours.row_stats.entropy.double(), entropies(original, tensors, call), atol=1e-5, rtol=0
    )
    assert not ours.row_stats.entropy.requires_grad


@pytest.mark.parametrize("need_weights", [True, False])
def test_unbatched_input(need_weights):
    original = nn.MultiheadAttention(E, H)
    ours = MultiheadAttention(E, H)
    ours.load_state_dict(original.state_dict())
    tensors, call = inputs({}, unbatched=True), {"need_weights": need_weights}
    same(run(ours, tensors, call)[:2], run(original, tensors, call)[:2])
    assert ours.row_stats.entropy.shape == (1, H, L)


@pytest.mark.parametrize("need_weights", [True, False])
def test_a_causal_hint(need_weights):
    original = nn.MultiheadAttention(E, H, batch_first=True)
    ours = MultiheadAttention(E, H, batch_first=True)
    ours.load_state_dict(original.state_dict())
    x = torch.randn(2, L, E)
    mask = nn.Transformer.generate_square_subsequent_mask(L)
    call = {"attn_mask": mask, "is_causal": True, "need_weights": need_weights}
    same(ours(x, x, x, **call), original(x, x, x, **call))
    torch.testing.assert_close(
        ours.row_stats.entropy.double(),
        entropies(original, (x, x, x), {"attn_mask": mask}),
        atol=1e-5,
        rtol=0,
    )


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_state_dicts_go_both_ways(options):
    original, ours = nn.MultiheadAttention(E, H, **options), MultiheadAttention(E, H, **options)
    assert list(original.state_dict()) == list(ours.state_dict())
    original.load_state_dict(ours.state_dict())
    ours.load_state_dict(original.state_dict())


def test_statistics_are_neither_copied_nor_saved():
    ours = MultiheadAttention(E, H)
    x = torch.randn(L, 2, E)
    ours(x, x, x)
    assert ours.row_stats is not None
    assert copy.deepcopy(ours).row_stats is None
    assert pickle.loads(pickle.dumps(ours)).row_stats is None


def zeros(*shapes):
    return [torch.zeros(shape) for shape in shapes]


WRONG = {  # inputs, arguments, error, part of its message
    "width": (zeros((L, 2, 8), (S, 2, E), (S, 2, E)), {}, AssertionError, "embedding dimension 16, got 8"),
    "values": (zeros((L, 2, E), (S, 2, E), (L, 2, E)), {}, AssertionError, "one \\(batch, length\\)"),
    "batch": (zeros((L, 3, E), (S, 2, E), (S, 2, E)), {}, RuntimeError, "batch size 3, got 2"),
    "dimensions": (zeros((L, E), (S, 2, E), (S, 2, E)), {}, AssertionError, "3 dimensions each"),
    "mask": (None, {"attn_mask": torch.zeros(3, 3)}, RuntimeError, "or \\(8, 6, 9\\), got \\(3, 3\\)"),
    "kind": (None, {"attn_mask": torch.zeros(L, S, dtype=torch.int32)}, AssertionError, "or floating"),
    "padding": (None, {"key_padding_mask": torch.zeros(S, 2)}, AssertionError, "of shape \\(2, 9\\)"),
    "hint": (None, {"is_causal": True}, RuntimeError, "attn_mask with the is_causal hint"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_input_raises_the_class_that_the_original_raises(wrong):
    tensors, call, error, message = WRONG[wrong]
    tensors = tensors or zeros((L, 2, E), (S, 2, E), (S, 2, E))
    with pytest.raises(error):
        nn.MultiheadAttention(E, H)(*tensors, **call)
    with pytest.raises(error, match=message):
        MultiheadAttention(E, H)(*tensors, **call)


@pytest.mark.parametrize("call", [{}, {"need_weights": False}])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_no_function_is_replaced_while_it_runs(call, dropout):
    functions = {
        (nn.functional, "scaled_dot_product_attention"),
        (nn.functional, "multi_head_attention_forward"),
        (torch.backends.mha, "get_fastpath_enabled"),
    }
    before = {(place, name): getattr(place, name) for place, name in functions}
    seen = []

    class Look(TorchFunctionMode):
        def __torch_function__(self, function, _types, args=(), kwargs=None):
            seen.append({(place, name): getattr(place, name) for place, name in functions} == before)
            return function(*args, **kwargs or {})

    ours, x = MultiheadAttention(E, H, dropout=dropout), torch.randn(L, 2, E)
    with Look():
        ours(x, x, x, **call)
    assert len(seen) > 5 and all(seen)


def test_a_query_that_sees_no_key_gives_zero():
    ours, x = MultiheadAttention(E, H, bias=False), torch.randn(L, 2, E, requires_grad=True)
    padding = torch.tensor([[False] * L, [True] * L])
    for need_weights in (True, False):
        out, weights = ours(x, x, x, key_padding_mask=padding, need_weights=need_weights)
        assert out[:, 1].eq(0).all() and out[:, 0].ne(0).all()
        assert weights is None or weights[1].eq(0).all()
        assert torch.autograd.grad(out.sum(), x)[0].isfinite().all()


@pytest.mark.parametrize(
    ("training", "mode"),
    [
        (True, "probe"),
        (False, "fused"),
        pytest.param(True, "fused", marks=pytest.mark.slow),
        pytest.param(False, "probe", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize(("options", "call"), PAIRS)
def test_instrumented(options, call, training, mode):
    torch.manual_seed(0)
    module = nn.MultiheadAttention(E, H, **options).train(training)
    tensors = inputs(options)
    expected = run(module, tensors, call)
    with instrument(module, mode) as instrumentation:
        out, weights, gradients = run(module, tensors, call)
    rows = instrumentation.latest[""].rows
    torch.testing.assert_close(rows.entropy.double(), entropies(module, tensors, call), atol=1e-5, rtol=0)
    if mode == "probe":
        assert torch.equal(out, expected[0])
        assert weights is None or torch.equal(weights, expected[1])
    same((out, weights), expected[:2])
    same(gradients, expected[2])
    assert not instrumentation.coverage.not_measured


def _stack(layer, stack, **options):
    torch.manual_seed(0)
    layer = layer(E, H, 32, batch_first=True, dropout=0.0, **options)
    return stack(layer, 2).eval()


@pytest.mark.parametrize("norm_first", [True, False])
def test_an_encoder_in_inference_is_measured_with_its_fast_path_off(norm_first):
    with pytest.warns(UserWarning, match="enable_nested_tensor") if norm_first else nullcontext():
        encoder = _stack(nn.TransformerEncoderLayer, nn.TransformerEncoder, norm_first=norm_first)
    x, padding = torch.randn(2, L, E), torch.arange(L) >= torch.tensor([[4], [6]])
    with torch.no_grad():
        encoder.train()  # the plain path, without dropout the same function
        expected = encoder(x, src_key_padding_mask=padding)
        encoder.eval()
        with instrument(encoder, strict=True) as instrumentation:
            got = encoder(x, src_key_padding_mask=padding)
            measured = instrumentation.coverage.measured
            instrumentation.measuring = False
            assert torch.backends.mha.get_fastpath_enabled()
    torch.testing.assert_close(got[~padding], expected[~padding])
    assert list(measured) == ["layers.0.self_attn", "layers.1.self_attn"]
    assert all("fast path off" in how for how in measured.values())


def test_a_decoder_is_measured():
    decoder = _stack(nn.TransformerDecoderLayer, nn.TransformerDecoder)
    x, memory = torch.randn(2, L, E), torch.randn(2, S, E)
    mask = nn.Transformer.generate_square_subsequent_mask(L)
    expected = decoder(x, memory, tgt_mask=mask, tgt_is_causal=True)
    with instrument(decoder, strict=True) as instrumentation:
        got = decoder(x, memory, tgt_mask=mask, tgt_is_causal=True)
    torch.testing.assert_close(got, expected)
    names = [f"layers.{i}.{kind}" for i in (0, 1) for kind in ("self_attn", "multihead_attn")]
    assert sorted(instrumentation.coverage.measured) == sorted(names)


@pytest.mark.parametrize("need_weights", [True, False])
def test_tensors_without_numbers(need_weights):
    ours, inputs = MultiheadAttention(E, H, device="meta"), torch.empty(L, 2, E, device="meta")
    assert ours(inputs, inputs, inputs, need_weights=need_weights)[0].shape == (L, 2, E)
    assert ours.row_stats is None


@pytest.mark.parametrize("need_weights", [True, False])
def test_gradients_under_autocast(need_weights):
    ours, original, x = MultiheadAttention(E, H), nn.MultiheadAttention(E, H), torch.randn(L, 2, E)
    original.load_state_dict(ours.state_dict())

    def gradient(module, autocast):
        module.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = module(x, x, x, need_weights=need_weights)[0]
            out.float().square().sum().backward()
        return out.dtype, module.in_proj_weight.grad.double()

    exact = gradient(original, False)[1]
    (dtype, mine), (wanted, theirs) = gradient(ours, True), gradient(original, True)
    assert dtype == wanted == torch.bfloat16
    assert (mine - exact).norm() <= 2 * (theirs - exact).norm() + 1e-3 * exact.norm()
    assert ours.row_stats.entropy.dtype == torch.float32


def test_the_drop_in_hands_its_statistics_to_the_instrumentation():
    ours, x = MultiheadAttention(E, H), torch.randn(L, 2, E)
    with instrument(ours) as instrumentation:
        ours(x, x, x)
        assert torch.equal(instrumentation.latest[""].rows.entropy, ours.row_stats.entropy)
        assert instrumentation.coverage.measured == {"": "fused (hnf_attention.nn.MultiheadAttention)"}
        instrumentation.measuring = False
        ours(x, x, x)
        assert ours.row_stats is not None
