"""ScaledDotProductAttention against the function that it replaces, and its statistics against fp64."""

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from hnf_attention.nn import ScaledDotProductAttention
from hnf_attention.reference import attention as reference
from hnf_attention.reference.options import Options

M, N, D = 5, 7, 8
SEEN = torch.arange(N) <= torch.arange(M)[:, None] + 1
CALLS = {  # shapes of query, key and value, and the other arguments
    "plain": ([(2, 3, M, D), (2, 3, N, D), (2, 3, N, D)], {}),
    "causal": ([(2, 3, M, D), (2, 3, N, D), (2, 3, N, D)], {"is_causal": True}),
    "scale": ([(2, 3, M, D), (2, 3, N, D), (2, 3, N, 12)], {"scale": 0.9}),
    "grouped": ([(2, 6, M, D), (2, 2, N, D), (2, 2, N, D)], {"enable_gqa": True, "is_causal": True}),
    "one key head": ([(2, 3, M, D), (2, 1, N, D), (2, 1, N, D)], {}),
    "broadcast batch": ([(2, 3, M, D), (1, 3, N, D), (1, 3, N, D)], {}),
    "boolean mask": ([(2, 3, M, D), (2, 3, N, D), (2, 3, N, D)], {"attn_mask": SEEN}),
    "additive mask": (
        [(2, 3, M, D), (2, 3, N, D), (2, 3, N, D)],
        {"attn_mask": torch.linspace(-2, 2, M * N).view(M, N)},
    ),
    "two dimensions": ([(M, D), (N, D), (N, D)], {"attn_mask": SEEN}),
    "three dimensions": ([(2, M, D), (2, N, D), (2, N, D)], {"attn_mask": SEEN[None].expand(2, M, N)}),
    "five dimensions": ([(2, 2, 3, M, D), (2, 2, 3, N, D), (2, 2, 3, N, D)], {"is_causal": True}),
}


def tensors(shapes, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(x, generator=generator).to(dtype).requires_grad_() for x in shapes]


@pytest.mark.parametrize("name", CALLS)
def test_it_gives_what_the_function_gives(name):
    shapes, options = CALLS[name]
    module, given = ScaledDotProductAttention(), tensors(shapes, torch.float64)
    if torch.is_tensor(options.get("attn_mask")) and options["attn_mask"].is_floating_point():
        options = options | {"attn_mask": options["attn_mask"].double()}
    out, expected = module(*given, **options), scaled_dot_product_attention(*given, **options)
    torch.testing.assert_close(out, expected)
    gradients, wanted = (torch.autograd.grad(x.square().sum(), given) for x in (out, expected))
    torch.testing.assert_close(gradients, wanted)
    batch = (
        expected.shape[:-3].numel()
        if expected.dim() > 3
        else (expected.shape[0] if expected.dim() == 3 else 1)
    )
    heads = expected.shape[-3] if expected.dim() > 3 else 1
    assert module.row_stats.lse.shape == (batch, heads, M) and not module.row_stats.lse.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", ["causal", "grouped", "boolean mask"])
def test_it_is_as_exact_as_the_function(name, dtype):
    shapes, options = CALLS[name]
    module, given = ScaledDotProductAttention(), [x.detach() for x in tensors(shapes, dtype)]
    mask = options.get("attn_mask")
    of_scores = Options(
        None if mask is None else mask[None, None], "is_causal" in options, D**-0.5, None, None, None
    )
    exact, rows = reference.attention(*(x.double() for x in given), of_scores)
    mine, theirs = module(*given, **options), scaled_dot_product_attention(*given, **options)
    assert mine.dtype == dtype
    mine, theirs = ((x.double() - exact).abs().max() for x in (mine, theirs))
    assert mine <= 2 * theirs + torch.finfo(dtype).eps
    torch.testing.assert_close(module.row_stats.entropy.double(), rows.entropy, atol=2e-6, rtol=0)
    torch.testing.assert_close(module.row_stats.max_logit.double(), rows.max_logit, atol=2e-6, rtol=0)


def test_dropout_is_pytorchs_and_the_statistics_are_those_before_it():
    module, given = ScaledDotProductAttention(), tensors(CALLS["plain"][0])
    module(*given)
    rows = module.row_stats
    torch.manual_seed(0)
    out = module(*given, dropout_p=0.4)
    torch.manual_seed(0)
    assert torch.equal(out, scaled_dot_product_attention(*given, dropout_p=0.4))
    assert torch.equal(module.row_stats.entropy, rows.entropy)


def test_a_mask_that_learns_gets_its_gradient():
    module, given = ScaledDotProductAttention(), tensors(CALLS["plain"][0])
    bias = nn.Parameter(torch.randn(3, M, N))
    wanted = torch.autograd.grad(scaled_dot_product_attention(*given, bias).square().sum(), bias)
    torch.testing.assert_close(torch.autograd.grad(module(*given, bias).square().sum(), bias), wanted)


def test_numbers_that_models_hide_keys_with_are_no_scores():
    module, given = ScaledDotProductAttention(), tensors(CALLS["plain"][0])
    mask = torch.zeros(M, N).masked_fill(~SEEN, torch.finfo(torch.float32).min)
    module(*given, mask)
    low = module.row_stats.min_logit
    module(*given, SEEN)
    assert torch.equal(low, module.row_stats.min_logit) and low.min() > -100


def test_a_mask_and_a_causal_flag_combine():
    module, given = ScaledDotProductAttention(), tensors(CALLS["plain"][0])
    mask = torch.rand(M, N, generator=torch.Generator().manual_seed(0)) > 0.3
    causal = torch.ones(M, N, dtype=torch.bool).tril()
    expected = scaled_dot_product_attention(*given, mask & causal)
    seen = (mask & causal).any(-1)
    out = module(*given, mask, is_causal=True)
    torch.testing.assert_close(out[:, :, seen], expected[:, :, seen])
    assert out[:, :, ~seen].eq(0).all()
    torch.manual_seed(0)
    assert module(*given, mask, 0.5, True).isfinite().all()


WRONG = {
    "heads": (
        [(2, 4, M, D), (2, 2, N, D), (2, 2, N, D)],
        {},
        ValueError,
        "enable_gqa=True for grouped heads",
    ),
    "dimensions": ([(2, M, D), (2, 2, N, D), (2, 2, N, D)], {}, ValueError, "as many dimensions"),
    "width": ([(2, 2, M, D), (2, 2, N, 4), (2, 2, N, D)], {}, ValueError, "head dimension 8, got 4"),
    "mask": (
        [(2, 2, M, D), (2, 2, N, D), (2, 2, N, D)],
        {"attn_mask": SEEN.T},
        ValueError,
        "attn_mask that broad",
    ),
    "dropout": (
        [(2, 2, M, D), (2, 2, N, D), (2, 2, N, D)],
        {"dropout_p": 1.5},
        ValueError,
        "dropout_p from 0",
    ),
    "scale": ([(2, 2, M, D), (2, 2, N, D), (2, 2, N, D)], {"scale": "1"}, TypeError, "scale to be a number"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_input_is_refused(wrong):
    shapes, options, error, message = WRONG[wrong]
    with pytest.raises(error, match=message):
        ScaledDotProductAttention()(*tensors(shapes), **options)
    with pytest.raises(TypeError, match="to be tensors, got list"):
        ScaledDotProductAttention()([1.0], *tensors(shapes)[1:])
