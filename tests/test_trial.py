"""A layer of no known class is scaled only if a trial proves it, whatever its projections and norms are called."""

import copy

import pytest
import torch
import torch.nn.functional as F
from attention_layers import Multihead, changed, weights
from odd_layers import (
    DIM,
    HEADS,
    ORDERS,
    WIDTH,
    Biased,
    Cross,
    Fused,
    Gated,
    Grouped,
    Latent,
    Norm,
    Reused,
    Separate,
    Softcapped,
    Twice,
    TwoArguments,
    WithModule,
    all_heads_normed,
    clamped,
    cosine,
    keys_normed,
    normed,
    queries_normed,
    rotated,
    shifted,
)
from torch import nn

from hnf_attention import AttentionStabilityMonitor, apply_intervention, instrument
from hnf_attention.instrumentation import witness
from hnf_attention.interventions import qk_clip, temperature

SIZES = [100.0, 10.0, 50.0, 40.0]  # said to be the largest score of each head

PROVED = {
    "fused": Fused,
    "fused, by a softmax": lambda: Fused(softmax=True),
    "fused, causal": lambda: Fused(is_causal=True),
    "fused, rotary": lambda: Fused(inside=rotated),
    "fused, without a bias": lambda: _without_bias(Fused()),
    "Wqkv": lambda: Fused(name="Wqkv"),
    "bf16": lambda: Fused().bfloat16(),
    "fp64": lambda: Fused().double(),
    "separate": Separate,
    "separate, by a softmax": lambda: Separate(softmax=True),
    "grouped keys": lambda: Separate(groups=2),
    "one key head": lambda: Separate(groups=1),
    "grouped keys, by a softmax": lambda: Separate(groups=2, softmax=True),
    "cross attention": Cross,
    "a bias on the scores, zero output": Biased,
    "rows by heads, kinds": lambda: Fused("heads, kinds"),
    "rows by heads, kinds, by a softmax": lambda: Fused("heads, kinds", softmax=True),
    "rows by groups": lambda: Grouped(2),
    "rows by one group": lambda: Grouped(1),
    "a gate beside the queries of each head": Gated,
    "a gate beside all queries": lambda: Gated(inner=False),
    "latent keys": Latent,
    "latent queries and keys": lambda: Latent(latent_queries=True),
}
REFUSED = {
    **{f"rows by {x}": (lambda x=x: Fused(x), "order|something else") for x in list(ORDERS)[2:]},
    "a norm by a call": (lambda: Fused(inside=normed), "stay as they are"),
    "a norm by a call, separate": (lambda: Separate(inside=normed), "stay as they are"),
    "cosine": (lambda: Fused(inside=cosine), "stay as they are"),
    "a norm of queries": (lambda: Fused(inside=queries_normed), "stay as they are"),
    "a norm of keys": (lambda: Fused(inside=keys_normed), "its key weights"),
    "a norm of all heads": (lambda: Fused(inside=all_heads_normed), "stay as they are"),
    "a clamp": (lambda: Fused(inside=clamped), "not grow in proportion|stay as they are"),
    "a norm module": (lambda: WithModule("norm", Norm()), "stay as they are"),
    "a norm in the attention core": (lambda: WithModule("core", Norm()), "stay as they are"),
    "one norm for both": (lambda: WithModule("rms", nn.RMSNorm(DIM)), "stay as they are"),
    "a list of norms": (
        lambda: WithModule("norms", nn.ModuleList([nn.RMSNorm(DIM), nn.RMSNorm(DIM)])),
        "stay as",
    ),
    "a norm without gains": (
        lambda: WithModule("x", nn.LayerNorm(DIM, elementwise_affine=False)),
        "stay as they",
    ),
    "queries with a part of their own": (lambda: Fused(inside=shifted), "its key weights|something else"),
    "a soft-cap": (Softcapped, "not grow in proportion"),
    "a gate that is the queries": (lambda: Gated(gate="queries"), "something else"),
    "keys that are values": (lambda: Reused("values"), "something else"),
    "queries in the output": (lambda: Reused("residual"), "something else"),
    "two attentions": (Twice, "one attention .* got 2"),
    "another forward": (TwoArguments, "random inputs failed"),
    "no attention": (lambda: _Linear(), "one attention .* got 0"),
}


class _Linear(Fused):
    """Linear attention: no softmax."""

    def attend(self, q, k, v):
        return q @ (k.transpose(-1, -2) @ v)


def _without_bias(module):
    module.qkv.bias = None
    return module


def inputs(module):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 9, WIDTH, generator=generator).to(next(module.parameters()).dtype)
    return (x, x.flip(1)) if isinstance(module, Cross) else (x,)


def products(module):
    """The scores that the layer computes, before mask and scale, and its values."""
    q, k, v = module.parts(inputs(module)[0])
    return (q.double() @ k.double().transpose(-1, -2)).detach(), v.detach()


@pytest.mark.parametrize("build", PROVED.values(), ids=PROVED)
def test_what_is_proved_is_scaled_exactly(build):
    torch.manual_seed(0)
    module = build()
    model = nn.ModuleDict({"attn": module})
    (before, values), start = products(module), weights(model)
    done = apply_intervention(None, qk_clip.propose(30.0, {"attn": SIZES}, ""), model)
    after, values_after = products(module)
    factors = (30.0 / torch.tensor(SIZES)).clamp(max=1).view(-1, 1, 1)
    tolerance = 2e-2 if values.dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(
        after, before * factors, rtol=tolerance, atol=tolerance * float(before.abs().max())
    )
    assert torch.equal(values, values_after)
    done.revert()
    for name, value in weights(model).items():
        torch.testing.assert_close(
            value, start[name], rtol=2**-7 if value.dtype == torch.bfloat16 else 1e-6, atol=0
        )


@pytest.mark.parametrize("build, message", REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("action", ["qk_clip", "temperature"])
def test_what_is_not_proved_is_refused_before_anything_changes(build, message, action):
    torch.manual_seed(0)
    model = nn.ModuleDict({"sound": Fused(), "attn": build()})
    before = weights(model)
    layers = {"sound": SIZES, "attn": SIZES}
    wanted = qk_clip.propose(30.0, layers, "") if action == "qk_clip" else temperature.propose(layers, "")
    with pytest.raises(ValueError, match=f"proof that the scores of layer 'attn' follow .*({message})"):
        apply_intervention(None, wanted, model)
    assert not changed(before, weights(model))


def test_more_or_fewer_heads_than_there_are_prove_nothing():
    model = nn.ModuleDict({"attn": Fused()})
    for heads in (2, 8):
        with pytest.raises(ValueError, match=r"expected 4 heads in layer 'attn' .*, got"):
            apply_intervention(None, temperature.propose({"attn": [2.0] * heads}, ""), model)
    del model.attn.num_heads  # nor where the layer does not say how many there are
    for heads in (2, 8):
        with pytest.raises(ValueError, match="expected proof"):
            apply_intervention(None, temperature.propose({"attn": [2.0] * heads}, ""), model)


def test_a_subclass_of_torchs_multihead_attention_with_another_forward_is_no_known_class():
    class Normed(nn.MultiheadAttention):
        def forward(self, query, key, value, **options):
            return super().forward(F.normalize(query), key, value, **options)

    model = Multihead()
    model.attention = Normed(32, 4, batch_first=True)
    with pytest.raises(ValueError, match="expected proof"):
        apply_intervention(None, temperature.propose({"attention": [2.0] * 4}, ""), model)


def test_a_trial_leaves_no_trace():
    torch.manual_seed(0)
    module = Fused().train()
    module.register_buffer("steps", torch.zeros(1))
    module.last = module.qkv(inputs(module)[0])  # not a leaf: such a tensor cannot be copied
    seen, rows = [], []
    module.register_forward_hook(lambda *_: seen.append("layer"))
    module.proj.register_forward_hook(lambda *_: seen.append("projection"))
    module.inside = lambda self, q, k: (self.steps.add_(1) and q, k)
    model = nn.ModuleDict({"attn": module})
    random = torch.get_rng_state()
    with instrument(model) as handle:
        handle.on_measure = rows.append
        apply_intervention(None, temperature.propose({"attn": [1.0] * HEADS}, ""), model)
    assert not seen and not rows and module.steps == 0 and module.training
    assert torch.equal(random, torch.get_rng_state())


def test_a_trial_is_run_once_for_a_module_and_again_when_the_module_is_another():
    runs = []
    module = Fused(inside=lambda self, q, k: (runs.append(1) or q, k))
    model = nn.ModuleDict({"attn": module})
    wanted = temperature.propose({"attn": [2.0] * HEADS}, "")
    apply_intervention(None, wanted, model)
    once = len(runs)
    apply_intervention(None, wanted, model)
    assert len(runs) == once > 0
    module.core = Norm()
    module.inside = lambda self, q, k: self.core(q, k)
    with pytest.raises(ValueError, match="stay as they are"):
        apply_intervention(None, wanted, model)


def test_a_trial_shares_the_rest_of_the_model():
    """A module that refers to its parent would take a copy of the whole model otherwise."""
    model = nn.ModuleDict({"attn": Fused()})
    model["attn"].parent = [model]
    model["big"] = _Uncopied()
    apply_intervention(None, temperature.propose({"attn": [2.0] * HEADS}, ""), model)


class _Uncopied(nn.Module):
    def __deepcopy__(self, memo):
        raise AssertionError("copied")


@pytest.mark.parametrize("order", ["kinds, heads", "heads, kinds", "heads backwards"])
@pytest.mark.parametrize("norm", [None, normed])
def test_auto_intervene_moves_only_what_is_proved(order, norm):
    torch.manual_seed(0)
    model = nn.Sequential(Fused(order, inside=norm))
    with torch.no_grad():
        model[0].qkv.weight.mul_(20.0)
    before = copy.deepcopy(model)
    x = torch.randn(2, 32, WIDTH)
    with AttentionStabilityMonitor(model, log_every=1, auto_intervene=True) as monitor:
        for _ in range(3):
            model(x)
            monitor.on_step()
        assert "auto_intervene" not in repr(monitor)
    if order != "heads backwards" and norm is None:
        assert monitor.applied and products_of(model, x).abs().max() < 31
    else:
        assert not monitor.applied and not changed(weights(before), weights(model))


def products_of(model, x):
    q, k, _ = model[0].parts(x)
    return (q @ k.transpose(-1, -2) * DIM**-0.5).detach()


class Tables(Fused):
    """Its forward takes more than a sequence, in the ways of well-known code."""

    def __init__(self, way, order="kinds, heads", **options):
        super().__init__(order, **options)
        self.way = way

    def forward(self, x, *rest, **named):
        q, k, v = self.parts(x)
        mask = None
        if self.way == "cos, sin, mask":
            cos, sin, mask = rest
        elif self.way == "position, complex table":
            start, table, mask = rest
            assert isinstance(start, int)
            cos, sin = table[start : start + x.shape[1]].real, table[start : start + x.shape[1]].imag
        else:
            (cos, sin), cache = named["position_embeddings"], named["cache"]
            assert cache is None
        (a, b), (c, d) = q.chunk(2, -1), k.chunk(2, -1)
        q = torch.cat([a * cos - b * sin, a * sin + b * cos], -1)
        k = torch.cat([c * cos - d * sin, c * sin + d * cos], -1)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.proj(out.transpose(1, 2).flatten(2))


def tables_of(way, length, batch=2):
    angle = torch.arange(length)[:, None] * 10.0 ** -torch.arange(DIM // 2)
    mask = torch.ones(length, length, dtype=torch.bool).tril()
    return {
        "cos, sin, mask": ((angle.cos(), angle.sin(), mask.expand(batch, 1, -1, -1)), {}),
        "position, complex table": ((0, torch.polar(torch.ones_like(angle), angle), None), {}),
        "by name": ((), {"position_embeddings": (angle.cos(), angle.sin()), "cache": None}),
    }[way]


@pytest.mark.parametrize("length", [9, *(pytest.param(n, marks=pytest.mark.slow) for n in (33, WIDTH))])
@pytest.mark.parametrize(
    "order, norm", [("kinds, heads", None), ("heads, kinds", None), ("kinds, heads", normed)]
)
@pytest.mark.parametrize("way", ["cos, sin, mask", "position, complex table", "by name"])
def test_a_layer_that_is_given_more_is_tried_as_it_was_measured(way, order, norm, length):
    torch.manual_seed(0)
    model = nn.ModuleDict({"attn": Tables(way, order, inside=norm)})
    x, (rest, named) = torch.randn(2, length, WIDTH), tables_of(way, length)
    wanted = qk_clip.propose(30.0, {"attn": SIZES}, "")
    before = weights(model)
    with pytest.raises(ValueError, match="inputs failed|inputs by position"):
        apply_intervention(None, wanted, model)
    with instrument(model):
        model["attn"](x, *rest, **named)
    if norm is not None:
        with pytest.raises(ValueError, match="stay as they are"):
            apply_intervention(None, wanted, model)
        assert not changed(before, weights(model))
        return
    scores, values = products_of_heads(model["attn"], x)
    apply_intervention(None, wanted, model)
    after, values_after = products_of_heads(model["attn"], x)
    factors = (30.0 / torch.tensor(SIZES)).clamp(max=1).view(-1, 1, 1)
    torch.testing.assert_close(after, scores * factors, rtol=1e-4, atol=1e-4)
    assert torch.equal(values, values_after)


def products_of_heads(module, x):
    q, k, v = module.parts(x)
    return (q.double() @ k.double().transpose(-1, -2)).detach(), v.detach()


def test_a_witness_holds_no_activations():
    torch.manual_seed(0)
    model = nn.ModuleDict({"attn": Tables("by name")})
    x = torch.randn(2, 9, WIDTH, requires_grad=True)
    (rest, named) = tables_of("by name", 9)
    with instrument(model):
        model["attn"](x, *rest, **named)
    given = witness.of(model["attn"])
    assert given.args == (witness.Spec((2, 9, WIDTH), torch.float32),)
    assert set(given.kwargs) == {"position_embeddings", "cache"}


def test_a_witness_holds_one_copy_of_what_layers_share_and_no_long_lists():
    class Layer(Tables):
        def forward(self, x, mask=None, more=None, **named):
            return super().forward(x, **named)

    torch.manual_seed(0)
    layers, mask = nn.ModuleList(Layer("by name") for _ in range(3)), torch.zeros(9, 9)
    model = nn.Module()
    model.layers = layers
    (rest, named) = tables_of("by name", 9)
    with instrument(model):
        for layer in layers:
            layer(torch.randn(2, 9, WIDTH), *rest, mask=mask, more=range(10**9), **named)
    kept = [witness.of(layer).kwargs for layer in layers]
    assert all(x["mask"] is kept[0]["mask"] and x["more"] is None for x in kept)
    assert torch.equal(kept[0]["mask"], mask) and kept[0]["mask"].data_ptr() != mask.data_ptr()
    assert all(isinstance(witness.of(layer).args[0], witness.Spec) for layer in layers)


def test_a_witness_of_inference_mode_holds_copies_too():
    torch.manual_seed(0)
    model = nn.ModuleDict({"attn": Tables("by name")})
    with torch.inference_mode(), instrument(model) as handle:
        rest, named = tables_of("by name", 9)
        model["attn"](torch.randn(2, 9, WIDTH), *rest, **named)
        assert handle.latest
    assert witness.of(model["attn"]) is not None
