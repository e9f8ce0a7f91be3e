"""torch.compile: whatever else stands in a traced call, measuring adds no guard and no error to it."""

import copy
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from attention_models import LAYERS, Attention, Model, x
from torch import nn
from torch._dynamo.utils import counters

from hnf_attention.instrumentation import instrument


@pytest.fixture(autouse=True)
def afresh():
    torch._dynamo.reset()
    counters.clear()


def compiled(function):
    return torch.compile(function, backend="aot_eager", fullgraph=True)


class Mixing(Attention):
    """Does not say attention in its name."""


class HeldAttention(Attention):
    """Its forward holds `self` in a cell, since a generator inside uses it."""

    def forward(self, x):
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


@pytest.mark.slow
def test_a_module_that_its_forward_holds_in_a_cell_is_found():
    model = nn.Sequential(HeldAttention(), HeldAttention())
    with instrument(model) as handle:
        compiled(model)(x())
    assert list(handle.latest) == ["0", "1"]


@pytest.mark.slow
def test_a_scale_that_is_a_tensor_in_the_graph_is_listed():
    model, inputs = Mixing(scale=np.float64(0.5)), x()  # as 1 / np.sqrt(d) is
    run = compiled(model)
    plain = run(inputs)
    for _ in range(2):  # also by a graph from before
        with instrument(model) as handle:
            assert torch.equal(run(inputs), plain)
        assert "a compiled graph calls it with a scale that is a" in handle.coverage.not_measured[""]


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # PyTorch's own, under vmap
@pytest.mark.parametrize("wrap", [compiled, lambda run: run], ids=["compiled", "plain"])
def test_what_a_transform_runs_is_listed(wrap):
    model, inputs = nn.Sequential(Mixing()), x()
    run = wrap(lambda inputs: torch.func.vmap(lambda part: model(part))(inputs))
    for _ in range(2):  # also by a graph from before
        with instrument(model) as handle:
            run(inputs[None])
        assert handle.coverage.not_measured == {"0": "it runs inside a transform of torch.func"}
        assert not handle.coverage.measured


class ByHandAttention(Attention):
    def forward(self, x):
        q, k, v = self.split(x)
        return (torch.softmax(q @ k.mT, -1) @ v).transpose(-2, -3).flatten(-2)


class Multihead(nn.MultiheadAttention):
    def __init__(self, need_weights=True):
        super().__init__(16, 4, batch_first=True)
        self.need_weights = need_weights

    def forward(self, x):
        return super().forward(x, x, x, need_weights=self.need_weights)[0]


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.parametrize("kind", [ByHandAttention, Multihead, lambda: Multihead(need_weights=False)])
@pytest.mark.parametrize("how", ["vmap", "grad"])
def test_a_layer_that_was_measured_is_listed_once_a_transform_runs_it(kind, how):
    model, inputs = nn.Sequential(kind()), x().detach()
    with instrument(model) as handle:
        plain = model(inputs)
        assert list(handle.coverage.measured) == ["0"] and not handle.coverage.not_measured
        if how == "vmap":
            torch.testing.assert_close(torch.func.vmap(model)(inputs[None])[0], plain)
        else:
            torch.func.grad(lambda inputs: model(inputs).sum())(inputs)
    assert handle.coverage.not_measured == {"0": "it runs inside a transform of torch.func"}


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@torch.no_grad()
def test_the_fast_path_inside_a_transform_is_listed():
    model = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True).eval()
    with instrument(model) as handle:
        torch.func.vmap(model)(x()[None])
    assert handle.coverage.not_measured[""] == "it runs inside a transform of torch.func"
    assert not handle.coverage.measured


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.mixing = Mixing()

    def forward(self, x):
        return torch.cond(x.sum() > 0, lambda x: self.mixing(x), lambda x: 2 * self.mixing(x), (x,))


class Repeating(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Region() for _ in range(3))
        self.mixing = Mixing()

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.mixing(x)


class Region(Mixing):
    forward = torch.compiler.nested_compile_region(Mixing.forward)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Branching, Repeating])
def test_what_a_higher_order_operator_runs_is_listed(kind):
    model, inputs = kind(), x().detach()
    run = compiled(model)
    with torch.no_grad():
        plain = run(inputs)
        for _ in range(2):  # also by a graph from before
            with instrument(model) as handle:
                assert torch.equal(run(inputs), plain)
            coverage = handle.coverage
            if kind is Branching:
                assert coverage.not_measured == {"mixing": "a compiled graph runs it inside cond"}
                assert not coverage.measured
            else:  # the layers are traced once
                assert list(coverage.not_measured) == ["layers.0", "layers.1", "layers.2"]
                assert "inside invoke_subgraph" in coverage.not_measured["layers.0"]
                assert list(coverage.measured) == ["mixing"]


def test_attention_of_a_shared_region_is_not_listed_where_it_is_measured():
    model, inputs = nn.Sequential(Region(), Region()), x().detach()
    with instrument(model) as handle, torch.no_grad():
        compiled(model[0])(inputs)
        assert list(handle.coverage.not_measured) == ["0", "1"]
        model[1](inputs)
    assert list(handle.coverage.not_measured) == ["0"] and list(handle.coverage.measured) == ["1"]


class Checkpointed(Mixing):
    def forward(self, x):
        return torch.utils.checkpoint.checkpoint(super().forward, x, use_reentrant=False)


class Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return F.scaled_dot_product_attention(x, x, x)

    @staticmethod
    def backward(ctx, grad):
        return grad


class OfFunction(nn.Module):
    def forward(self, x):
        return Function.apply(x[:, None])


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo does it
@pytest.mark.parametrize("kind", [Checkpointed, OfFunction])
def test_what_becomes_part_of_the_graph_around_it_is_measured(kind):
    model = nn.Sequential(kind())
    with instrument(model) as handle:
        compiled(model)(x().requires_grad_()).sum().backward()
    assert list(handle.coverage.measured) == ["0"] and not handle.coverage.not_measured


@pytest.mark.parametrize("whose", ["its own", "another's"])
def test_arguments_of_a_function_around_the_model_are_not_guarded(whose):
    model, other, inputs = Attention(), Attention(), x()

    @compiled
    def step(tag, inputs):
        return model(inputs)

    with instrument(model if whose == "its own" else other):
        for number in range(4):
            step(f"step {number}", inputs)
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.slow
def test_a_copy_of_a_compiled_model_is_measured_once_it_is_instrumented_itself():
    model, inputs = Model(), x()
    with instrument(model):
        compiled(model)(inputs)
        twin = copy.deepcopy(model)
    with instrument(twin) as handle:
        compiled(twin)(inputs)
    assert list(handle.latest) == LAYERS


def test_a_graph_that_is_used_again_still_has_its_fast_path_off():
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True).eval()
    run = compiled(layer)
    for _ in range(2):
        with instrument(layer) as handle, torch.no_grad():
            run(x())
        assert "inference fast path off" in handle.coverage.measured["self_attn"]


@pytest.mark.slow
def test_copies_are_not_taken_for_the_model():
    model, inputs = Model(), x()
    run = compiled(model)
    with instrument(model) as handle:
        run(inputs)
        handle.latest.clear()
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            compiled(twin)(inputs)
        assert not handle.latest
        run(inputs)
        assert list(handle.latest) == LAYERS
