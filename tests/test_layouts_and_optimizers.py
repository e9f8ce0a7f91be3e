"""QK-clip on every layout beside every optimizer: the largest score is the threshold, and nothing else moves a bit.

Or the layer is refused, and nothing moves at all. The way back is exact in either case.
"""

import copy

import pytest
import torch
import transformers
from attention_layers import GPT2, LLAMA, SIZES, TOKENS, Multihead, Outer, PlainBlock
from odd_layers import (
    Biased,
    Cross,
    Fused,
    Gated,
    Grouped,
    Latent,
    Reused,
    Separate,
    Softcapped,
    normed,
    rotated,
)
from torch import nn

from hnf_attention import apply_intervention, instrument
from hnf_attention.interventions import layout

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::FutureWarning")]

t = transformers
X = torch.randn(2, 20, 32, generator=torch.Generator().manual_seed(0))


class Alone(nn.Module):
    """A layer of its own in a model that does something before and after it."""

    def __init__(self, layer, **inputs):
        super().__init__()
        self.first, self.attn, self.last = nn.Linear(32, 32), layer, nn.LayerNorm(32)

    def forward(self, x):
        x = self.first(x)
        return self.last(self.attn(x, x.flip(1)) if isinstance(self.attn, Cross) else self.attn(x))


def alone(build):
    return lambda: Alone(build())


def tied():
    model = Alone(Separate())
    model.attn.k_proj = model.attn.q_proj
    return model


def shared_by_two():
    model = nn.Sequential(Separate(), nn.LayerNorm(32), Separate())
    model[2].q_proj, model[2].k_proj = model[0].q_proj, model[0].k_proj
    return model


def frozen():
    model = Alone(Fused())
    model.attn.qkv.requires_grad_(False)
    return model


def parametrized():
    model = Alone(Separate())
    nn.utils.parametrizations.weight_norm(model.attn.q_proj)
    return model


def heads_joined():
    return Alone(nn.Sequential(Outer()))


#: name -> (model, whether it can be clipped)
LAYOUTS = {
    "fused q, k, v": (alone(Fused), True),
    "fused per head": (alone(lambda: Fused("heads, kinds")), True),
    "fused per group": (alone(lambda: Grouped(2)), True),
    "multi-query, fused": (alone(lambda: Grouped(1)), True),
    "separate": (alone(Separate), True),
    "grouped keys": (alone(lambda: Separate(groups=2)), True),
    "rotary": (alone(lambda: Fused(inside=rotated)), True),
    "gated": (alone(Gated), True),
    "gate after the queries": (alone(lambda: Gated(inner=False)), True),
    "latent": (alone(Latent), True),
    "latent queries": (alone(lambda: Latent(latent_queries=True)), True),
    "cross attention": (alone(Cross), True),
    "a softmax of its own": (alone(lambda: Fused(softmax=True)), True),
    "torch.nn": (alone(Multihead), True),
    "torch.nn, extra key": (alone(lambda: Multihead(add_bias_kv=True)), True),
    "gpt2": (lambda: t.GPT2LMHeadModel(GPT2).eval(), True),
    "llama": (lambda: t.LlamaForCausalLM(LLAMA), True),
    "gpt-neox": (lambda: t.GPTNeoXForCausalLM(t.GPTNeoXConfig(**SIZES)), True),
    "functional QK-norm": (alone(lambda: Fused(inside=normed)), False),
    "soft-cap": (alone(Softcapped), False),
    "keys are values": (alone(lambda: Reused("values")), False),
    "kinds backwards": (alone(lambda: Fused("kinds backwards")), False),
    "q is k": (tied, False),
    "two layers share": (shared_by_two, False),
    "frozen": (frozen, False),
    "parametrized": (parametrized, False),
    "bias on the scores": (alone(Biased), True),
    "user's block": (lambda: nn.Sequential(nn.Embedding(40, 32), PlainBlock("qkv")), True),
    "projections around": (lambda: nn.Sequential(nn.Embedding(40, 32), Outer()), True),
}
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9),
    "adamw, foreach": lambda p: torch.optim.AdamW(p, lr=1e-3, foreach=True),
    "adamw, fused": lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True, amsgrad=True),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-3),
    "muon": lambda p: torch.optim.Muon([x for x in p if x.dim() == 2], lr=1e-3),
}


def inputs_of(model):
    first = next(model.modules()) if not isinstance(model, nn.Sequential) else model[0]
    tokens = isinstance(first, nn.Embedding) or hasattr(model, "config")
    return TOKENS if tokens else X


def run(model):
    out = model(inputs_of(model))
    return out if isinstance(out, torch.Tensor) else out[0]


def sizes_of(model):
    """The largest |q.k| of each head that is visible, without any bias on it, by layer."""
    seen = {}
    with instrument(model, mode="probe") as handle, torch.no_grad():
        handle.on_measure = lambda found: seen.setdefault(found.layer, []).append(found)
        run(model)
    sizes = {}
    for layer, found in seen.items():
        for one in found:
            rows = one.rows
            low = rows.min_logit if one.options is not None else rows.max_logit
            size = torch.maximum(rows.max_logit.abs(), low.abs()).amax((0, 2))
            sizes[layer] = torch.maximum(sizes[layer], size) if layer in sizes else size
    return sizes


def loud(model):
    """Scores of 20 to 200 nats, of different sizes in each head."""
    words = ("qkv", "q_proj", "k_proj", "q_b_proj", "kv_b_proj", "c_attn", "in_proj_w", "query_key_value")
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(word in name for word in words) and parameter.dim() == 2:
                parameter.mul_(8.0 if "k_proj" not in name else 4.0)
                parameter.mul_(0.6 + 0.8 * torch.rand(parameter.shape[0], 1))


def numbers(model, optimizer):
    return copy.deepcopy((dict(model.state_dict()), optimizer.state_dict()))


def without_what_may_change(model, layer, heads):
    """The state of a model whose query and key weights of a layer are blanked out."""
    twin = copy.deepcopy(model)
    found = layout.find(twin, layer, heads)
    with torch.no_grad():
        for part in (*found.query, *found.key, *found.rest):
            part.zero_()
    return dict(twin.state_dict())


def assert_same(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    "optimizer_kind",
    [x if n == 0 else pytest.param(x, marks=pytest.mark.exhaustive) for n, x in enumerate(OPTIMIZERS)],
)
@pytest.mark.parametrize("kind", LAYOUTS)
def test_the_largest_score_is_the_threshold_and_nothing_else_moves(kind, optimizer_kind):
    build, treated = LAYOUTS[kind]
    check_clip(build, treated, kind == "bias on the scores", OPTIMIZERS[optimizer_kind])


def check_clip(build, treated, biased, make_optimizer):
    """Clip a layer of a model between the sizes of its heads. treated: else it is refused. biased: scores are not q.k
    alone, so that their sizes do not tell.
    """
    torch.manual_seed(0)
    model = build()
    loud(model)
    optimizer = make_optimizer([p for p in model.parameters() if p.requires_grad])
    run(model).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    sizes = sizes_of(model)
    layer, largest = next(iter(sizes.items()))
    threshold = float(largest.sort().values[1:3].mean())
    wanted = {"action": "qk_clip", "threshold": threshold, "layers": {layer: largest.tolist()}, "reason": ""}
    before = numbers(model, optimizer)
    if not treated:
        with pytest.raises(ValueError, match="expected"):
            apply_intervention(optimizer, wanted, model)
        assert_same(numbers(model, optimizer), before)
        return
    rest = without_what_may_change(model, layer, len(largest))
    applied = apply_intervention(optimizer, wanted, model)
    after = sizes_of(model)[layer]
    if not biased:
        torch.testing.assert_close(after, largest.clamp(max=threshold), rtol=1e-3, atol=0)
    assert_same(without_what_may_change(model, layer, len(largest)), rest)
    assert_same(numbers(model, optimizer)[1], before[1])
    applied.revert()
    assert_same(numbers(model, optimizer), before)
    apply_intervention(optimizer, wanted, model)
    for group in optimizer.param_groups:  # the optimizer holds no other copy of the weights
        group["lr"] = 0.0
    optimizer.step()
    if not biased:
        torch.testing.assert_close(sizes_of(model)[layer], after, rtol=1e-3, atol=0)
