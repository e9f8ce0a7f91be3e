"""Inputs at the edge of what SDPA takes: sizes of 0, hidden rows, huge scores, odd tensors. Ours must do no worse."""

import math

import pytest
import torch
from random_calls import HUGE
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from hnf_attention import MultiheadAttention, attention, attention_stats
from hnf_attention.engine.call import check
from hnf_attention.kernels.portable import backward, forward, probe
from hnf_attention.reference import attention as reference

SDPA = functional.scaled_dot_product_attention
ON_GPU = torch.cuda.is_available()


def _options(q, k, v, **keywords):
    defaults = dict.fromkeys(("attn_mask", "scale", "window_size", "softcap", "sinks")) | {"is_causal": False}
    return check(q, k, v, **defaults | keywords)


def _kernels(q, k, v, extended=False, **keywords):
    """(out, lse, entropy, max_logit, min_logit, more) of the portable kernels."""
    return forward.forward(q, k, v, _options(q, k, v, **keywords), extended=extended)


SIZES = {
    "no batch": (0, 2, 3, 4, 8, 8),
    "no heads": (2, 0, 3, 4, 8, 8),
    "no queries": (2, 2, 0, 4, 8, 8),
    "no keys": (2, 2, 3, 0, 8, 8),
    "no head dimension": (2, 2, 3, 4, 0, 8),
    "no value dimension": (2, 2, 3, 4, 8, 0),
    "neither": (2, 2, 3, 4, 0, 0),
}


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("name", SIZES)
def test_a_size_of_zero_gives_what_sdpa_gives_with_gradients(name, is_causal, device):
    batch, heads, queries, keys, width, value_dim = SIZES[name]
    shapes = ((queries, width), (keys, width), (keys, value_dim))
    q, k, v = (torch.randn(batch, heads, *shape, device=device).requires_grad_() for shape in shapes)
    with sdpa_kernel(SDPBackend.MATH):  # others fail in their backward without a head
        theirs = SDPA(q, k, v, is_causal=is_causal)
    ours, rows = attention(q, k, v, is_causal=is_causal)
    torch.testing.assert_close(ours, theirs)
    wanted = torch.autograd.grad(theirs.sum(), (q, k, v), allow_unused=True)
    got = torch.autograd.grad(ours.sum() + rows.lse.nan_to_num(neginf=0.0).sum(), (q, k, v))
    for x, mine in zip((q, k, v), got):
        assert mine.shape == x.shape and mine.isfinite().all()
    torch.testing.assert_close(got[2], torch.zeros_like(v) if wanted[2] is None else wanted[2])
    assert rows.lse.shape == (batch, heads, queries)


@pytest.mark.parametrize("kind", ["bool", "-inf", "expanded"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_row_whose_keys_are_all_hidden_is_zero_and_gets_no_gradient(kind, dtype, device):
    q, k, v = (torch.randn(1, 2, 5, 8, device=device, dtype=dtype).requires_grad_() for _ in range(3))
    hidden = torch.tensor([False, True, False, True, False], device=device)[:, None]
    mask = ~hidden.expand(5, 5)
    if kind == "-inf":
        mask = torch.zeros(5, 5, device=device, dtype=dtype).masked_fill(hidden, -torch.inf)
    if kind == "expanded":
        mask = mask[None, None].expand(1, 2, 5, 5)
    out, rows = attention(q, k, v, attn_mask=mask)
    gradients = torch.autograd.grad((out * out.detach() + 1).sum() + rows.entropy.sum(), (q, k, v))
    assert all(x.isfinite().all() for x in (out, *gradients))
    assert not out[:, :, 1::2].any() and not gradients[0][:, :, 1::2].any()
    assert gradients[0][:, :, ::2].any()
    with sdpa_kernel(SDPBackend.MATH):  # cuDNN's kernel leaves numbers other than 0 in such rows
        theirs = SDPA(q, k, v, attn_mask=mask)
    torch.testing.assert_close(out, theirs, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("width", [16, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_keys_hidden_with_the_least_number_leave_the_statistics_finite(dtype, width, device):
    # The mask is in fp32: its least number times log2 e is -inf in fp32.
    q, k, v = (torch.randn(1, 1, 9, width, device=device, dtype=dtype) for _ in range(3))
    mask = torch.zeros(9, 9, device=device)
    mask[:, 1:4] = torch.finfo(torch.float32).min  # in every row; in two rows every key
    mask[3:5] = torch.finfo(torch.float32).min
    options = _options(q, k, v, attn_mask=mask)
    out, *core, more = forward.forward(q, k, v, options, extended=True)
    assert all(x.isfinite().all() for x in (out, *core, *more))
    exact, rows = reference.attention(q, k, v, options)
    torch.testing.assert_close(out, exact, rtol=2e-3, atol=2e-3)  # SDPA's kernels differ in such rows
    for mine, name in zip(core, ("lse", "entropy", "max_logit", "min_logit")):
        torch.testing.assert_close(mine, getattr(rows, name), rtol=1e-3, atol=1e-3)
    shown = torch.ones(9, 1, device=device)
    shown[3:5] = 0
    d_out = (torch.randn(out.shape, device=device) * shown).to(dtype)
    got = backward.backward(q, k, v, options, out, *core[:2], d_out, None, None)
    wanted = reference.backward(q, k, v, options, exact, rows.lse, rows.entropy, d_out, None, None)
    for mine, theirs in zip(got[:3], wanted[:3]):
        torch.testing.assert_close(mine, theirs, rtol=1e-2, atol=1e-2)


def _equal(number, length, dtype, device, width=64):
    """q is `number` everywhere and k 5/8 of it, so that q.k is exact but its product with the scale is not."""
    q = torch.full((1, 1, length, width), number, dtype=dtype, device=device)
    return q, q * 0.625, torch.randn(1, 1, length, width, device=device).to(dtype)


# Through the interpreter only fp16 shows a rounding error, as it is multiplied and added in one step there, too.
HUGE_CASES = [(torch.float16, 2.0**15), (torch.float16, 3072.0), (torch.float32, HUGE)]
if ON_GPU:
    HUGE_CASES += [(torch.bfloat16, number) for number in (HUGE, 2.0**14, 2.0**40, 2.0**59)]


@pytest.mark.parametrize("scale", [None, *(pytest.param(x, marks=pytest.mark.slow) for x in (0.3, 1.0))])
@pytest.mark.parametrize("dtype, number", HUGE_CASES)
def test_huge_scores_have_a_finite_output_and_statistics(dtype, number, scale, device):
    q, k, v = _equal(number, 70, dtype, device)
    out, lse, entropy, max_logit, min_logit, more = _kernels(q, k, v, extended=True, scale=scale)
    wanted = v.double().mean(2, keepdim=True).expand(out.shape)
    torch.testing.assert_close(out.double(), wanted, rtol=1e-2, atol=1e-3)
    assert (max_logit == min_logit).all() and (lse >= max_logit).all()
    torch.testing.assert_close(entropy, torch.full_like(entropy, math.log(70)), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(more[5], torch.full_like(lse, math.log(70)), rtol=1e-3, atol=1e-3)
    d_out = torch.randn(out.shape, device=device).to(dtype)
    options = _options(q, k, v, scale=scale)
    gradients = backward.backward(q, k, v, options, out, lse, entropy, d_out, None, None)
    assert all(x.isfinite().all() for x in gradients[:3])


@pytest.mark.parametrize("sign", [1, -1])
def test_rows_that_become_huge_on_the_way_take_the_right_key(sign, device):
    # Keys of every size, so that the maximum of a row rises from small to huge within one row and the next.
    q = torch.full((1, 1, 20, 16), 6e4, dtype=torch.float16, device=device)
    k = torch.zeros(1, 1, 200, 16, dtype=torch.float16, device=device)
    k[..., 0] = sign * torch.logspace(-6, 4.7, 200, device=device)
    v = torch.randn(1, 1, 200, 16, device=device).half()
    out, lse, entropy, max_logit, min_logit, _ = _kernels(q, k, v)
    scores = q.double() @ k.double().transpose(2, 3) / 4
    torch.testing.assert_close(out.double(), scores.softmax(-1) @ v.double(), rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(max_logit.double(), scores.amax(-1), rtol=1e-5, atol=1e-2)
    torch.testing.assert_close(min_logit.double(), scores.amin(-1), rtol=1e-5, atol=1e-2)
    assert entropy.isfinite().all() and (lse >= max_logit).all()


@pytest.mark.gpu
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize(
    "dtype, number", [(torch.bfloat16, n) for n in (HUGE, 3e3, 1e12)] + [(torch.float16, 6e4)]
)
def test_huge_scores_through_the_hopper_kernel(dtype, number, width, is_causal):
    q, k, v = _equal(number, 300, dtype, "cuda", width)
    q = q.clone()
    q[:, :, ::3] *= -1  # huge negative maxima
    k = k * torch.linspace(0.5, 1.0, 300, device="cuda").to(dtype)[:, None].flip(0)
    out, rows = attention(q, k, v, is_causal=is_causal)
    exact = SDPA(q.double(), k.double(), v.double(), is_causal=is_causal)
    assert out.isfinite().all() and all(x.isfinite().all() for x in (rows.lse, rows.entropy, rows.min_logit))
    assert (rows.max_weight <= 1).all() and (rows.entropy > -1e-3).all()
    norm = exact.norm()
    theirs = SDPA(q, k, v, is_causal=is_causal)
    error = float((out - exact).norm() / norm)
    assert error <= 2 * float((theirs - exact).norm() / norm).__abs__() + 1e-2 or not theirs.isfinite().all()


@pytest.mark.parametrize("where", ["reference", "kernels", "no keys"])
def test_a_row_without_a_key_gives_its_sink_and_the_sinks_gradient(where, device):
    queries, keys = 4, 0 if where == "no keys" else 6
    q = torch.randn(1, 2, queries, 16, device=device)
    k = v = torch.randn(1, 2, keys, 16, device=device)
    sinks = torch.tensor([0.7, -2.0], device=device)
    mask = torch.ones(queries, keys, dtype=torch.bool, device=device)
    mask[1::2] = False
    empty = torch.ones(queries, dtype=torch.bool, device=device) if keys == 0 else ~mask.any(1)
    options = _options(q, k, v, attn_mask=mask, sinks=sinks)
    if where == "kernels":
        out, *core, more = forward.forward(q, k, v, options, extended=True)
        probed = probe.probe(q, k, options, parts=2)[:4]
        gradients = backward.backward(q, k, v, options, out, *core[:2], None, torch.ones_like(core[0]), None)
        collision, sink_mass = more[1], more[3]
        torch.testing.assert_close(probed[0], core[0])
    else:
        leaf = sinks.clone().requires_grad_()
        out, rows = attention(q, k, v, attn_mask=mask, sinks=leaf, extended=True)
        core = rows.lse, rows.entropy, rows.max_logit, rows.min_logit
        collision, sink_mass = rows.collision, rows.sink_mass
        d_sinks = torch.autograd.grad(rows.lse.sum(), leaf)[0]
    d_sinks = gradients.sinks if where == "kernels" else d_sinks
    torch.testing.assert_close(core[0][..., empty], sinks[:, None].expand(2, int(empty.sum()))[None])
    assert not out[:, :, empty].any() and not core[1][..., empty].any()
    assert (core[2][..., empty] == -torch.inf).all() and (core[3][..., empty] == torch.inf).all()
    assert (collision[..., empty] == 1).all() and (sink_mass[..., empty] == 1).all()
    # d lse / d sink is the sink's weight: 1 in a row that has nothing else.
    weight = (sinks[:, None] - core[0].detach()).exp()
    torch.testing.assert_close(d_sinks, weight.sum((0, 2)), rtol=1e-5, atol=1e-5)


def test_a_sink_of_minus_infinity_is_no_sink(device):
    q = torch.randn(1, 1, 3, 8, device=device)
    mask = torch.zeros(3, 3, dtype=torch.bool, device=device)
    rows = attention_stats(
        q, q, attn_mask=mask, sinks=torch.tensor([-torch.inf], device=device), extended=True
    )
    assert (rows.lse == -torch.inf).all() and not rows.sink_mass.any() and not rows.collision.any()


@pytest.mark.parametrize("sinks", [None, 2.0**25])
@pytest.mark.parametrize("kernels", [False, True])
def test_blocks_whose_maxima_are_equal_at_2_to_the_25_add_their_denominators(kernels, sinks, device):
    # 1 key and 3 keys with one score of 2^25, where neighbouring numbers in fp32 are 4 apart.
    q = torch.full((1, 1, 2, 16), 2.0**11, device=device)
    k = torch.full((1, 1, 4, 16), 2.0**10, device=device)
    v = torch.randn(1, 1, 4, 16, device=device)
    blocks = []
    for part in (slice(0, 1), slice(1, 4)):
        x, y = k[:, :, part], v[:, :, part]
        if kernels:
            out, *rows = _kernels(q, x, y, extended=True, scale=1.0)
            blocks.append((out, type(attention_stats(q, x)).unpack(*rows)))
        else:
            blocks.append(attention(q, x, y, scale=1.0, extended=True))
    from hnf_attention.statistics.merge import merge_attention

    sink = None if sinks is None else torch.tensor([sinks], device=device)
    merged, rows = merge_attention(blocks, sinks=sink)
    parts = 4 if sinks is None else 5
    torch.testing.assert_close(merged, v.sum(2, keepdim=True).expand(merged.shape) / parts)
    torch.testing.assert_close(rows.log_denominator, torch.full_like(rows.lse, math.log(parts)))
    torch.testing.assert_close(rows.max_weight, torch.full_like(rows.lse, 1 / parts))


def test_a_merge_with_denominators_leads_the_gradient_to_lse(device):
    q, k, v = (torch.randn(1, 1, 6, 8, device=device, dtype=torch.float64).requires_grad_() for _ in range(3))
    from hnf_attention.statistics.merge import merge_attention

    whole = attention(q, k, v, extended=True)
    parts = merge_attention(
        [attention(q, k[:, :, s], v[:, :, s], extended=True) for s in (slice(2), slice(2, 6))]
    )
    for name in ("log_denominator", "lse", "entropy", "collision", "logit_var"):
        torch.testing.assert_close(getattr(parts[1], name), getattr(whole[1], name))
    for (out, rows), (true_out, true_rows) in [(parts, whole)]:
        got = torch.autograd.grad(out.square().sum() + rows.lse.sum() + rows.entropy.sum(), (q, k, v))
        loss = true_out.square().sum() + true_rows.lse.sum() + true_rows.entropy.sum()
        for mine, true in zip(got, torch.autograd.grad(loss, (q, k, v))):
            torch.testing.assert_close(mine, true)


def test_integers_mixed_dtypes_and_other_devices_are_clear_errors(device):
    q = torch.randn(1, 2, 3, 8, device=device)
    mask = torch.zeros(3, 3)
    with pytest.raises(
        TypeError, match="expected query of a floating dtype of 16 to 64 bits, got torch.int32"
    ):
        attention(q.int(), q.int(), q.int())
    with pytest.raises(TypeError, match="expected key of the query's dtype torch.float32, got torch.float64"):
        attention(q, q.double(), q)
    with pytest.raises(TypeError, match="expected attn_mask of dtype in .*, got torch.int64"):
        attention(q, q, q, attn_mask=mask.to(device).long())
    with pytest.raises(ValueError, match="expected attn_mask on the query's device .*, got meta"):
        attention(q, q, q, attn_mask=mask.to("meta"))
    with pytest.raises(ValueError, match="expected value on the query's device .*, got meta"):
        attention(q, q, q.to("meta"))
    wide = q.double()
    torch.testing.assert_close(attention(wide, wide, wide)[0], SDPA(wide, wide, wide))


@pytest.mark.gpu
def test_tensors_on_the_cpu_beside_a_card_are_clear_errors():
    q = torch.randn(1, 2, 3, 8, device="cuda")
    for keyword in ({"attn_mask": torch.zeros(3, 3)}, {"sinks": torch.zeros(2)}):
        with pytest.raises(ValueError, match="on the query's device cuda:0, got cpu"):
            attention(q, q, q, **keyword)
    with pytest.raises(ValueError, match="expected key on the query's device cuda:0, got cpu"):
        attention(q, q.cpu(), q)


@pytest.mark.slow
def test_multihead_attention_takes_what_pytorchs_does(device):
    torch.manual_seed(0)
    ours = MultiheadAttention(24, 3, device=device)
    theirs = torch.nn.MultiheadAttention(24, 3, device=device)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(7, 2, 48, device=device)[..., ::2]  # an inner stride of 2
    padding = torch.zeros(2, 7, dtype=torch.bool, device=device)
    padding[1] = True  # every key of a batch element is hidden
    for keywords in ({}, {"key_padding_mask": padding}, {"attn_mask": torch.zeros(7, 7, device=device)}):
        mine = ours(x, x, x, need_weights=False, **keywords)[0]
        torch.testing.assert_close(mine, theirs(x, x, x, need_weights=False, **keywords)[0])
    nothing = torch.randn(0, 2, 24, device=device)
    assert ours(nothing, x.contiguous(), x.contiguous(), need_weights=False)[0].shape == (0, 2, 24)
