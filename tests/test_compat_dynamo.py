"""What each private name of Dynamo carries: the public behaviour that fails if it answers wrongly."""

import functools
import sys

import pytest
import torch
import torch.nn.functional as F
from attention_models import LAYERS, Attention, HandWrittenAttention, Model, x
from compat_helpers import carried_by, compiled, qkv
from torch import nn
from torch._dynamo.utils import counters
from torch.nn.attention import flex_attention as flex
from torch.utils.checkpoint import checkpoint

from hnf_attention import (
    attention_stats,
    instrument,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning"),  # PyTorch's own, under vmap
]

TOKENS = torch.arange(20)[None]
HERE = sys.modules[__name__]
HELD = torch.compile(flex.flex_attention, backend="eager")


# torch.compile


@carried_by("is_wrapper")
@torch.no_grad()
def test_layers_of_compiled_blocks_keep_their_names():
    model = Model()
    model.blocks = nn.ModuleList(compiled(block) for block in model.blocks)
    with instrument(model) as handle:
        model(x())
    assert list(handle.latest) == LAYERS


@carried_by("unwrapped", "wrapper_classes")
@torch.no_grad()
def test_a_call_through_the_compiled_model_is_a_forward_of_the_model():
    model, ended = nn.Sequential(), []  # an empty one is false
    run = compiled(model)
    with instrument(model) as handle:
        handle.on_forward_end = ended.append
        run(x())
        run(x())
    assert [forward.number for forward in ended] == [1, 2]


class Traceable(nn.Module):
    def forward(self, inputs):
        return (inputs @ inputs.mT).softmax(-1) @ inputs


@carried_by("runs_graph")
@torch.no_grad()
def test_a_graph_is_not_watched_while_it_runs_and_a_traced_module_is():
    model = HandWrittenAttention()
    with instrument(model) as handle:
        compiled(model)(x())  # with tensor.softmax(), which leaves no operator
        assert not handle.latest
    traced = torch.fx.symbolic_trace(Traceable())
    with instrument(traced) as handle:
        traced(x())
    assert list(handle.latest) == [""]


class OfFile(nn.Module):
    def forward(self, *tensors):
        return HELD(*tensors)


@pytest.mark.slow
@carried_by("is_compiled")
def test_a_compiled_function_that_a_file_holds_is_measured():
    model, before = OfFile(), HELD
    with instrument(model) as handle:
        model(*qkv())
        assert HELD is not before
    assert list(handle.latest) == [""] and HELD is before


@carried_by("let_trace")
def test_a_compiled_function_inside_a_compiled_model_is_measured():
    model, tensors = nn.Sequential(), qkv()
    model.add_module("caller", OfFile())
    run = compiled(model.caller)
    with instrument(model) as handle:
        run(*tensors)
    assert handle.coverage.measured == {"caller": "probe (flex_attention)"}


class SoftmaxAttention(HandWrittenAttention):
    def forward(self, inputs):
        q, k, v = self.split(inputs)
        return (F.softmax(q @ k.mT, dim=-1) @ v).transpose(-2, -3).flatten(-2)


@carried_by("fill_function_table")
def test_a_process_that_compiles_for_the_first_time_while_instrumented_measures():
    torch._dynamo.trace_rules.clear_lru_cache()  # as in a new process
    model = SoftmaxAttention()
    with instrument(model) as handle:
        compiled(model)(x())
    assert list(handle.latest) == [""] and not handle.coverage.not_measured


@carried_by("renew_function_table")
def test_a_function_that_was_replaced_while_dynamo_looked_is_traced_as_before_afterwards():
    model, inputs = SoftmaxAttention(), x()
    with instrument(model):
        torch._dynamo.trace_rules.clear_lru_cache()
        compiled(model)(inputs)
    torch.testing.assert_close(compiled(model)(inputs), model(inputs))
    table = torch._dynamo.trace_rules.get_torch_obj_rule_map()
    assert F.softmax in table and not any("hnf_attention" in str(getattr(f, "__code__", "")) for f in table)


@carried_by("comptime", "callers", "first_argument", "module_of", "assign")
def test_a_graph_knows_the_layer_of_each_call_in_it():
    model = Model()
    with instrument(model) as handle:
        compiled(model)(x())
    assert list(handle.latest) == LAYERS


class Held(Attention):
    """Its `self` is held in a cell, since a function inside uses it."""

    def forward(self, inputs):
        def joined(out):
            return out.transpose(-2, -3).flatten(-2) * self.heads

        return joined(F.scaled_dot_product_attention(*self.split(inputs)))


@carried_by("first_argument")
def test_arguments_of_a_function_around_the_model_are_not_guarded():
    model, inputs = Held(), x()
    torch._dynamo.reset()
    counters.clear()

    @functools.partial(torch.compile, backend="eager", fullgraph=True)
    def step(tag, inputs):
        return model(inputs)

    with instrument(model) as handle:
        for number in range(4):
            step(f"step {number}", inputs)
    assert counters["stats"]["unique_graphs"] == 1 and list(handle.latest) == [""]


@carried_by("code", "local", "is_none")
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.slow
def test_heads_that_transformers_repeats_are_measured_one_by_one_in_a_graph(implementation):
    transformers = pytest.importorskip("transformers")
    sizes = dict(vocab_size=40, num_hidden_layers=1, hidden_size=32, intermediate_size=16)
    config = transformers.LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
    model = transformers.LlamaModel._from_config(config, attn_implementation=implementation).eval()
    run = compiled(model)
    with torch.no_grad(), instrument(model) as handle:
        run(TOKENS, use_cache=False)
        in_graph = handle.latest.pop("layers.0.self_attn")
        model(TOKENS, use_cache=False)
        outside = handle.latest["layers.0.self_attn"]
    assert handle.coverage.measured == {"layers.0.self_attn": f"probe (transformers {implementation})"}
    torch.testing.assert_close(in_graph.rows.lse, outside.rows.lse)


@carried_by("is_exported")
def test_an_exported_program_holds_nothing_of_it():
    model = Model().eval()
    with instrument(model):
        program = torch.export.export(model, (x(),), strict=True)
    assert not any("hnf_attention" in str(node.target) for node in program.graph.nodes)


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = Attention()

    def forward(self, inputs):
        return torch.cond(inputs.sum() > 0, self.attn, lambda x: 2 * self.attn(x), (inputs,))


class Checkpointed(Attention):
    def forward(self, inputs):
        return checkpoint(super().forward, inputs, use_reentrant=False)


@carried_by("bodies")
def test_attention_inside_a_branch_is_listed_and_inside_a_checkpoint_measured():
    model = Branching()
    with torch.no_grad(), instrument(model) as handle:
        compiled(model)(x())
    assert handle.coverage.not_measured == {"attn": "a compiled graph runs it inside cond"}
    model = Checkpointed()
    with instrument(model) as handle:
        compiled(model)(x())
    assert list(handle.latest) == [""] and not handle.coverage.not_measured


class Flexible(nn.Module):
    """The function over its scores holds a parameter and a number."""

    def __init__(self):
        super().__init__()
        self.slopes = nn.Parameter(torch.randn(3))

    def forward(self, query, key, value, reach):
        def score_mod(score, b, h, i, j):
            return score + self.slopes[h] * (i - j) / reach

        return flex.flex_attention(query, key, value, score_mod)


@carried_by("last_call", "subgraph", "example", "detached", "number", "constant", "sequence")
@torch.no_grad()
@pytest.mark.slow
def test_what_functions_over_scores_hold_is_read_at_every_run_of_a_graph():
    model, (query, key, value) = Flexible(), qkv()
    run = compiled(model)
    distance = torch.arange(7)[:, None] - torch.arange(7)
    with instrument(model) as handle:
        for reach in (2, 3, 4):
            model.slopes.normal_()
            run(query, key, value, reach)
            bias = model.slopes[:, None, None] * distance / reach
            expected = attention_stats(query, key, attn_mask=bias[None])
            torch.testing.assert_close(handle.latest[""].rows.entropy, expected.entropy)
    assert not handle.coverage.not_measured


class Scaled(nn.Module):
    def forward(self, query, key, value, scale):
        return F.scaled_dot_product_attention(query, key, value, scale=scale.item())


@carried_by("types_in", "constant")
def test_a_scale_that_no_operator_can_take_is_listed():
    numpy = pytest.importorskip("numpy")
    model = Attention(scale=numpy.float64(0.5))
    with instrument(model) as handle:
        compiled(model)(x())
    assert "a compiled graph calls it with a scale that is a" in handle.coverage.not_measured[""]


class Routed(Attention):
    """A softmax of a module inside that is no attention."""

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(16, 4)

    def forward(self, inputs):
        gates = self.router(inputs)[:, None]
        return super().forward(inputs) * torch.softmax(gates, -1).mean()


class Mixer(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(Router())

    def forward(self, inputs):
        return self.inner(inputs)


class Router(nn.Module):
    def forward(self, inputs):
        return torch.softmax(inputs, -1)


@carried_by("constant_of")
def test_a_softmax_in_a_graph_counts_only_in_a_module_named_like_attention():
    for model, layers in ((Mixer(), []), (SoftmaxAttention(), [""])):
        with instrument(model) as handle:
            compiled(model)(x())
        assert list(handle.latest) == layers
