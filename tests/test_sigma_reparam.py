"""sigmaReparam: the same layer at first, a size that follows gamma, and the way back."""

import pytest
import torch
from attention_layers import Multihead, changed, weights
from odd_layers import Fused, Separate
from torch import nn

from hnf_attention import apply_intervention

X = torch.randn(2, 20, 32, generator=torch.Generator().manual_seed(0))
MODELS = {"fused": Fused, "separate": Separate, "grouped keys": lambda: Separate(groups=2)}
WANTED = {"action": "sigma_reparam", "layers": {"0": 4}}


@pytest.fixture(params=MODELS)
def run(request):
    torch.manual_seed(0)
    model = nn.Sequential(MODELS[request.param]()).train()
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2)


def step(model, optimizer):
    optimizer.zero_grad()
    model(X).square().mean().backward()
    optimizer.step()


def projections(module):
    """(weight that is computed with, rows) of queries and keys."""
    if hasattr(module, "qkv"):
        return [(module.qkv.weight, slice(0, 32)), (module.qkv.weight, slice(32, 64))]
    return [(module.q_proj.weight, slice(None)), (module.k_proj.weight, slice(None))]


def test_it_starts_as_the_same_layer_and_its_size_is_gamma(run):
    model, optimizer = run
    expected = model(X)
    applied = apply_intervention(optimizer, WANTED, model)
    assert "sigmaReparam on query and key weights of 0" in applied.description
    torch.testing.assert_close(model(X), expected, rtol=1e-3, atol=1e-4)
    gammas = [p for n, p in model.named_parameters() if n.endswith("gamma")]
    held = {id(p) for p in optimizer.param_groups[0]["params"]}
    assert all(id(gamma) in held for gamma in gammas)
    for _ in range(3):
        step(model, optimizer)
    wanted = torch.cat([gamma.detach() for gamma in gammas])
    found = [torch.linalg.matrix_norm(weight[rows], 2) for weight, rows in projections(model[0])]
    torch.testing.assert_close(torch.stack(found).detach(), wanted, rtol=2e-2, atol=0)
    with torch.no_grad():  # a weight that grows makes no scores grow
        for module in model.modules():
            if hasattr(module, "parametrizations"):
                module.parametrizations.weight.original[:32] *= 50
    found = torch.linalg.matrix_norm(projections(model[0])[0][0][:32], 2)
    torch.testing.assert_close(found.detach(), wanted[0], rtol=2e-2, atol=0)


def test_reverting_is_exact_or_keeps_what_was_learnt(run):
    model, optimizer = run
    step(model, optimizer)
    old, parameters = weights(model), [id(p) for p in model.parameters()]
    applied = apply_intervention(optimizer, WANTED, model)
    applied.revert()
    assert not changed(old, weights(model)) and set(old) == set(weights(model))
    assert [id(p) for p in model.parameters()] == parameters
    applied = apply_intervention(optimizer, WANTED, model)
    step(model, optimizer)
    model.eval()
    expected = model(X)
    applied.revert()
    torch.testing.assert_close(model(X), expected)
    assert set(old) == set(weights(model)) and len(optimizer.state) == len(parameters)


@pytest.mark.parametrize(
    ("build", "layers", "message"),
    [
        (Fused, None, "'layers' to map layer names to their number of heads, got None"),
        (Fused, {"0": 0}, "number of heads of layer '0', got 0"),
        (lambda: Fused("heads, kinds"), {"0": 4}, "whole blocks of rows of linear projections"),
        (Multihead, {"0.attention": 4}, "whole blocks of rows of linear projections"),
    ],
)
def test_what_is_refused(build, layers, message):
    model = nn.Sequential(build())
    old = weights(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=message):
        apply_intervention(optimizer, {"action": "sigma_reparam", "layers": layers}, model)
    assert not changed(old, weights(model))
