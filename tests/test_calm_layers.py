"""The forwards that QK-clip leaves to the look after the step: those of calm layers, and those it cannot change."""

import pytest
import torch
import torch.nn.functional as F
import transformers
from attention_layers import LLAMA, TOKENS
from leftovers import leave_nothing_behind  # noqa: F401
from odd_layers import Fused
from test_standing_clip import X, sizes, sizes_by_bound
from torch import nn

from hnf_attention import restore
from hnf_attention.interventions import QKClip
from hnf_attention.interventions.sizes import CALM_LOOKS, LayerSizes


def test_a_calm_layer_is_looked_at_after_the_step_alone_until_it_grows():
    torch.manual_seed(0)
    model = nn.Sequential(Fused()).train()
    limit = 6 * sizes_by_bound(model)
    clip = QKClip(model, limit)

    def seen(factor=1.0):
        """The largest range that the softmax sees in a training step, before which queries grow by the factor."""
        with torch.no_grad():
            model[0].qkv.weight[:32] *= factor
        found = float(sizes(model, lambda: model(X), grad=True)["0"].max())
        clip.step()
        return found

    for _ in range(CALM_LOOKS + 2):
        usual = seen()
    layer = clip._sizes.layers["0"]
    assert layer.calm(limit) and usual < limit / 2
    assert seen(100.0) > limit  # nobody expects that in one step
    assert seen() <= limit * (1 + 1e-5)  # it was clipped after the step
    assert not layer.calm(limit)  # the bound has been read by now
    for _ in range(2):
        assert seen(100.0) <= limit * (1 + 1e-5)
    assert clip.sizes["0"] and not clip.refused
    clip.remove()


class Heads(nn.Module):
    """Attention whose number of heads can be set."""

    def __init__(self):
        super().__init__()
        self.heads = 4
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(32, 32, bias=False) for _ in range(3))

    def forward(self, x):
        parts = (p(x).unflatten(-1, (self.heads, -1)) for p in (self.q_proj, self.k_proj, self.v_proj))
        q, k, v = (part.transpose(1, 2) for part in parts)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def tripled(model, clip, run, steps):
    """The largest size at the last of some steps, before each of which queries are tripled."""
    for _ in range(steps):
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "q_proj.weight" in name:
                    weight.mul_(3.0)
        run().square().mean().backward()
        clip.step()
    return max(max(heads) for heads in clip.sizes.values())


@pytest.mark.parametrize(
    "mode", ["written-out softmax", "evaluation mode", "evaluation mode at first", "other heads"]
)
def test_forwards_that_cannot_clip_themselves_are_clipped_after_the_step(mode):
    torch.manual_seed(0)
    if mode == "written-out softmax":
        config = transformers.LlamaConfig(**LLAMA.to_dict() | {"attn_implementation": "eager"})
        language = transformers.LlamaForCausalLM(config)
        model, run = language.train(), lambda: language(TOKENS).logits
    else:
        model = nn.Sequential(Heads()).train(mode != "evaluation mode at first")
        run = lambda: model(X)  # noqa: E731
    clip = QKClip(model, 20.0)
    for _ in range(CALM_LOOKS + 2):
        run().square().mean().backward()
        clip.step()
    assert max(max(heads) for heads in clip.sizes.values()) < 10
    if mode == "evaluation mode":
        model.eval()
    elif mode == "other heads":
        model[0].heads = 2
    # Brought to 20 after the step before, and tripled since.
    assert tripled(model, clip, run, 12) == pytest.approx(60.0, rel=0.05)
    assert not clip.refused
    clip.remove()


def test_a_layer_is_calm_by_recent_finite_looks_alone():
    layer = LayerSizes(2, torch.device("cpu"))
    layer.kept = True
    for _ in range(CALM_LOOKS):
        layer.note(1.0, threshold=100.0)
    assert layer.calm(100.0)
    for _ in range(3):
        assert layer.calm(100.0)
        layer.restart()
    assert not layer.calm(100.0)  # nothing was read for three steps
    layer.note(1.0, threshold=100.0)
    assert layer.calm(100.0)
    layer.note(float("inf"), threshold=100.0)
    layer.note(1.0, threshold=100.0)
    assert not layer.calm(100.0)
    for _ in range(200):
        layer.note(1.0, threshold=100.0)
    assert layer.calm(100.0)  # an inf is forgotten, too
    zero = LayerSizes(2, torch.device("cpu"))
    zero.kept = True
    for bound in (*[0.0] * CALM_LOOKS, 1.0):
        zero.note(bound, threshold=100.0)
    assert not zero.calm(100.0)  # nobody knows what it grows by


def test_nan_is_no_calm():
    torch.manual_seed(0)
    model = nn.Sequential(Fused()).train()
    clip = QKClip(model, 1e6)
    for factor, calm in ((1.0, True), (torch.nan, False)):
        for _ in range(CALM_LOOKS + 3):
            model(X * factor).sum().backward()
            clip.step()
        assert clip._sizes.layers["0"].calm(1e6) == calm
    clip.remove()


def test_a_layer_that_grows_is_not_calm():
    layer = LayerSizes(2, torch.device("cpu"))
    layer.kept = True
    for step in range(20):
        layer.note(0.001 * 2**step, threshold=100.0)
        # 0.001 * 2^13 grows to 33 within two steps, and the next one to 66.
        assert layer.calm(100.0) == (CALM_LOOKS - 1 <= step <= 13)
    for _ in range(20):
        layer.note(20.0, threshold=100.0)
    assert layer.calm(100.0)  # what it did long ago is forgotten
    layer.kept = False
    assert not layer.calm(100.0)


def test_restore_ends_it_and_a_later_one_takes_over(caplog):
    torch.manual_seed(0)
    model = nn.Sequential(Fused()).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    first = QKClip(model, 5.0).attach(optimizer)

    def step():
        model(X).square().sum().backward()
        optimizer.step()

    step()
    second = QKClip(model, 5.0).attach(optimizer)  # a notebook cell that runs twice
    assert "a new QKClip of this model takes over" in caplog.text
    step()
    assert (first.steps, second.steps) == (1, 1) and second.sizes
    restore(model)
    step()
    assert second.steps == 1
    model[0].qkv.weight.data.mul_(10.0)
    assert sizes(model, lambda: model(X), grad=True)["0"].max() > 50.0  # no forward clips itself
