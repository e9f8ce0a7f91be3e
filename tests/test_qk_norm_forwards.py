"""Which forward QK-norm is measured in: what is left if none of its layers can have it, or if it raises."""

import pytest
import torch
from leftovers import leave_nothing_behind  # noqa: F401
from odd_layers import Fused, WithModule
from torch import nn

from hnf_attention.instrumentation import treating
from hnf_attention.interventions import apply_intervention, start_qk_norm

X = torch.randn(2, 20, 32, generator=torch.Generator().manual_seed(0))


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1)


def hooks(model):
    return [*model._forward_hooks, *model._forward_pre_hooks]


@pytest.mark.parametrize(
    "layer, why",
    [
        (lambda: WithModule("q_norm", nn.RMSNorm(8)), "got none in its forward; refused: 0: it has QK-norm"),
        (lambda: Fused(softmax=True), "got none in its forward"),
    ],
)
def test_it_says_once_that_no_layer_can_have_it(layer, why, caplog):
    model = nn.Sequential(layer())
    expected = model(X)
    done = apply_intervention(sgd(model), {"action": "qk_norm"}, model)
    for _ in range(3):
        assert torch.equal(model(X), expected)
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith("QK-norm was not started: ") and why in said
    assert not treating.finders and not hooks(model)
    (verdict,) = done.verify({})
    assert verdict.holds is None and verdict.text == "no layer has the norm"
    assert "not started" in repr(done.actions[0].started)


class Failing(nn.Module):
    """Fails once."""

    def __init__(self):
        super().__init__()
        self.fails = True

    def forward(self, x):
        if self.fails:
            self.fails = False
            raise RuntimeError("its own error")
        return x


@pytest.mark.parametrize("place", [0, 1, 2])
def test_the_error_of_a_forward_comes_out_and_the_next_one_is_taken(place):
    layers = [Fused(), Fused()]
    layers.insert(place, Failing())
    model = nn.Sequential(*layers)
    start = start_qk_norm(model, sgd(model))
    model.register_forward_hook(lambda *_: None)  # PyTorch goes on to it after those of QK-norm
    with pytest.raises(RuntimeError, match="its own error"):
        model(X)
    assert start.listening and not start.started and "next forward" in repr(start)
    model(X)
    assert start.started and len(start.layers) == 2 and not treating.finders


def test_so_does_that_of_a_model_which_is_the_layer():
    model = nn.MultiheadAttention(32, 4, batch_first=True)
    hook = model.register_forward_hook(lambda *_: 1 / 0)
    start = start_qk_norm(model, sgd(model))
    with pytest.raises(ZeroDivisionError):
        model(X, X, X, need_weights=False)
    hook.remove()
    assert start.listening
    model(X, X, X, need_weights=False)
    assert start.started
    start.revert()
    assert not treating.finders and not hooks(model)
