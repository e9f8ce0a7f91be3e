"""What each private name of torch and transformers carries: the public behaviour that fails if it answers wrongly."""

import sys
import types

import pytest
import torch
import torch.nn.functional as F
from attention_models import Attention, HandWrittenAttention, Model, x
from compat_helpers import Operators, carried_by, compiled, qkv
from torch import nn
from torch.nn.attention import flex_attention as flex
from torch.utils.checkpoint import checkpoint

from hnf_attention import (
    apply_intervention,
    attention,
    compat,
    instrument,
    trace_non_finite,
)
from hnf_attention.interventions import learning_rate, qk_clip

pytestmark = [
    pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning"),  # PyTorch's own, under vmap
]


# What runs with a call


@carried_by("functorch_transform")
def test_a_model_inside_a_transform_is_listed_and_outside_of_it_measured():
    model, inputs = Attention(), x()
    with instrument(model) as handle:
        torch.func.vmap(model)(inputs[None])
        assert not handle.latest and "transform of torch.func" in handle.coverage.not_measured[""]
        model(inputs)
    assert list(handle.latest) == [""]


class Multihead(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)

    def forward(self, inputs):
        return self.attention(inputs, inputs, inputs)[0]


@carried_by("lowered_graph")
@pytest.mark.slow
def test_a_call_that_dynamo_keeps_whole_is_left_alone_while_its_graph_is_lowered():
    model, inputs = Multihead(), x()
    plain = model(inputs)
    run = compiled(lambda given: F.multi_head_attention_forward(*given), "aot_eager")
    module = model.attention
    given = [inputs.transpose(0, 1)] * 3 + [
        16,
        4,
        module.in_proj_weight,
        module.in_proj_bias,
        None,
        None,
        False,
    ]
    given += [0.0, module.out_proj.weight, module.out_proj.bias]

    class Caller(nn.Module):
        def forward(self):
            return run(given)[0].transpose(0, 1)

    caller = Caller()
    with instrument(caller) as handle:
        torch.testing.assert_close(caller(), plain)
    assert not any("failed" in why for why in handle.coverage.not_measured.values())


@carried_by("dispatch_modes")
def test_a_dispatch_mode_sees_attention_as_one_operator():
    inputs = qkv()
    with Operators() as operators:
        attention(*inputs)
    assert operators.seen == ["hnf_attention.forward.default"]


@carried_by("without_dispatch_modes")
def test_a_dispatch_mode_sees_the_operators_of_the_model_alone():
    model, inputs = Attention(), x()
    with Operators() as plain:
        model(inputs)
    with instrument(model, mode="probe") as handle, Operators() as measured:
        model(inputs)
    assert list(handle.latest) == [""] and measured.seen == plain.seen


@carried_by("jit_trace")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_a_jit_trace_of_an_instrumented_model_is_that_of_the_model():
    model, inputs = Attention(), x()
    plain = torch.jit.trace(model, inputs, check_trace=False)
    with instrument(model, mode="fused") as handle:
        traced = torch.jit.trace(model, inputs, check_trace=False)
        assert not handle.latest
    assert [node.kind() for node in traced.graph.nodes()] == [node.kind() for node in plain.graph.nodes()]


@carried_by("running_backward")
@pytest.mark.parametrize("kind", [Attention, HandWrittenAttention])
def test_the_second_forward_of_a_checkpoint_is_not_recorded(kind):
    model, seen = kind(), []
    with instrument(model) as handle:
        handle.on_measure = seen.append
        checkpoint(model, x(requires_grad=True), use_reentrant=False).sum().backward()
        assert len(seen) == 1
        model(x())
    assert len(seen) == 2


@carried_by("any_autocast")
def test_autocast_is_noticed_on_whichever_device_it_is():
    assert not compat.any_autocast()
    for device in ("cpu", "cuda"):
        with torch.autocast(device, torch.bfloat16, enabled=device == "cpu" or torch.cuda.is_available()):
            assert compat.any_autocast() == torch.is_autocast_enabled(device)


@pytest.mark.gpu
@carried_by("any_autocast")
def test_attention_on_a_card_computes_in_the_dtype_of_autocast():
    inputs = qkv(device="cuda")
    assert attention(*inputs)[0].dtype == torch.float32
    with torch.autocast("cuda", torch.bfloat16):
        assert attention(*inputs)[0].dtype == torch.bfloat16


class Outer(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = Attention(), nn.Sequential(Attention())

    def forward(self, inputs):
        return F.scaled_dot_product_attention(*[self.second(self.first(inputs))[:, None]] * 3)[:, 0]


@carried_by("module_call_code")
def test_a_call_has_the_name_of_the_innermost_module_that_runs():
    model = Outer()
    with instrument(model) as handle:
        model(x())
    assert list(handle.latest) == ["first", "second.0", ""]


@carried_by("kept_in")
def test_what_is_kept_in_a_frame_stays_as_long_as_the_call():
    def call(depth):
        frame, made = sys._getframe(), []
        for _ in range(2):
            made.append(compat.kept_in(frame.f_locals, object))
            depth += 1  # the frame's variables are read anew
        inner = call(depth) if depth < 4 else None
        assert made[0] is made[1] is compat.kept_in(frame.f_locals, object) and made[0] is not inner
        return made[0]

    assert call(0) is not call(0)


def attention_to_script(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    weights = torch.softmax(torch.einsum("bhqd,bhkd->bhqk", query, key), -1)
    weights = torch.bmm(weights.flatten(0, 1), key.flatten(0, 1)).view_as(query)
    return torch.nn.functional.scaled_dot_product_attention(
        torch.matmul(weights, weights.mT) @ query, key, key
    )


@carried_by("script_as", "script_no_longer")
def test_code_that_is_scripted_while_a_model_is_instrumented():
    query, key = torch.randn(2, 3, 7, 4), torch.randn(2, 3, 7, 4)
    expected = attention_to_script(query, key)
    with instrument(Attention()):
        scripted = torch.jit.script(attention_to_script)
    torch.jit.script(attention_to_script)
    torch.testing.assert_close(scripted(query, key), expected)


@carried_by("Memory")
def test_memory_that_was_freed_is_nobodys():
    tensor = torch.randn(1000)
    memory = compat.Memory(tensor)
    assert memory.holds(tensor[5:]) and not memory.holds(tensor.clone())
    address = memory.address
    del tensor
    others = [torch.randn(1000) for _ in range(3)]
    assert not any(memory.holds(other) for other in others)
    assert compat.Memory(others[0]).address and address
    assert not compat.Memory(torch.empty(0)).holds(torch.empty(0))


@carried_by("learned")
def test_views_of_a_parameter_are_learned():
    weight = nn.Parameter(torch.randn(3, 4))
    assert compat.learned(weight) and compat.learned(weight.T) and not compat.learned(weight * 2)


@carried_by("vmap_in_operators")
def test_functions_over_scores_are_evaluated_where_a_graph_excludes_vmap():
    """Graphs of the default backend run operators like this."""

    def causal(b, h, i, j):
        return i >= j

    plain = flex.create_mask(causal, 2, 1, 30, 26, "cpu")
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for name in ("FuncTorchBatched", "FuncTorchDynamicLayerFrontMode", "FuncTorchDynamicLayerBackMode"):
        excluded |= torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, name))
    with torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded):
        with pytest.raises(RuntimeError):
            flex.create_mask(causal, 2, 1, 30, 26, "cpu")
        with compat.vmap_in_operators():
            assert torch.equal(flex.create_mask(causal, 2, 1, 30, 26, "cpu"), plain)


# Modules, schedulers, meshes


class Projected(nn.Module):
    """Attention with two projections, beside a name of a projection that is no module."""

    fc_qkv = property(lambda self: 1 / 0)

    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.out = nn.Linear(16, 16), nn.Linear(16, 16), nn.Identity()

    def forward(self, inputs):
        parts = (self.q_proj(inputs), self.k_proj(inputs), inputs)
        out = F.scaled_dot_product_attention(*(x.unflatten(-1, (4, 4)).transpose(1, 2) for x in parts))
        return self.out(out)


CLIP = qk_clip.propose(30.0, {"0": [120.0] * 4}, "large scores", None)


@carried_by("child")
def test_a_clip_finds_the_projections_among_the_modules():
    model = nn.Sequential(Projected())
    before = model[0].q_proj.weight.detach().clone()
    apply_intervention(None, CLIP, model=model)
    torch.testing.assert_close(model[0].q_proj.weight, before / 2)


@carried_by("own_parameter")
def test_a_clip_refuses_a_weight_that_is_computed_from_others():
    model = nn.Sequential(Projected())
    torch.nn.utils.parametrizations.weight_norm(model[0].q_proj)
    with pytest.raises(ValueError, match="q_proj"):
        apply_intervention(None, CLIP, model=model)


@carried_by("hooks")
def test_a_trial_of_a_layer_runs_none_of_its_hooks():
    model, seen = nn.Sequential(Projected()), []
    model[0].register_forward_hook(lambda *_: seen.append("layer"))
    model[0].out.register_forward_pre_hook(lambda *_: seen.append("module inside"))
    apply_intervention(None, CLIP, model=model)
    assert not seen


@carried_by("forward_hooks")
def test_a_clip_refuses_a_projection_whose_output_a_hook_may_change():
    for register in ("register_forward_hook", "register_forward_pre_hook"):
        model = nn.Sequential(Projected())
        getattr(model[0].k_proj, register)(lambda *_: None)
        with pytest.raises(ValueError, match="nothing else"):
            apply_intervention(None, CLIP, model=model)


@carried_by("inner_schedulers")
def test_a_cut_learning_rate_stays_cut_in_every_scheduler_inside():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedulers = torch.optim.lr_scheduler
    parts = [schedulers.ConstantLR(optimizer, 1.0, 1), schedulers.LambdaLR(optimizer, lambda step: 1.0)]
    scheduler = schedulers.SequentialLR(optimizer, parts, [2])
    apply_intervention(optimizer, learning_rate.propose(0.25, ""), scheduler=scheduler)
    for _ in range(4):
        optimizer.step()
        scheduler.step()
        assert optimizer.param_groups[0]["lr"] == 0.25


# transformers


def tiny_gpt2(implementation):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=40, n_layer=1, n_embd=32, n_head=4, n_positions=32)
    return transformers.GPT2LMHeadModel._from_config(config, attn_implementation=implementation).eval()


TOKENS = torch.arange(20)[None]


@carried_by("attention_implementation")
def test_coverage_names_an_implementation_that_is_not_measured():
    model = tiny_gpt2("eager")
    model.config._attn_implementation = "flash_attention_3"
    with instrument(model) as handle:
        assert (
            "'flash_attention_3': no function of FlashAttention"
            in handle.coverage.not_measured["transformer.h.0.attn"]
        )


@carried_by("collects_attention_weights")
@torch.no_grad()
def test_eager_attention_keeps_its_output_where_its_weights_are_collected():
    model = tiny_gpt2("eager")
    plain = model(TOKENS, output_attentions=True).attentions[0]
    with instrument(model, mode="fused") as handle:
        assert torch.equal(model(TOKENS, output_attentions=True).attentions[0], plain)
        (how,) = handle.coverage.measured.values()
        assert how == "probe: attention weights may be asked for (transformers eager)"
        model(TOKENS)
        (how,) = handle.coverage.measured.values()
    tells = int(sys.modules["transformers"].__version__.split(".")[0]) > 4
    assert how.startswith("fused") == tells


@carried_by("device_mesh")
def test_the_callback_takes_the_mesh_of_a_model_that_transformers_distributed():
    pytest.importorskip("transformers")
    from hnf_attention.integrations.huggingface import AttentionStabilityCallback

    given = []

    class Callback(AttentionStabilityCallback):
        def _begin(self, *arguments):
            given.append(arguments)

    model, mesh = Model(), object()
    state = types.SimpleNamespace(logging_steps=1, global_step=0, is_world_process_zero=True)
    Callback().on_train_begin(None, state, None, model=model)
    model._device_mesh = mesh
    Callback().on_train_begin(None, state, None, model=model)
    assert [arguments[4] for arguments in given] == [None, mesh]


@carried_by("initialise")
def test_random_weights_follow_the_depth_that_a_class_is_told():
    """Versions of transformers differ in what is wrapped around the function, and in what GPT-2 does with its depth."""

    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.config, self.out = types.SimpleNamespace(n_layer=3, n_head=4), nn.Linear(8, 8)

        def _init_weights(self, module):
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=(2 * self.config.n_layer) ** -0.5)

    class Wrapped(Plain):
        _init_weights = torch.no_grad()(Plain._init_weights)

    for model in (Plain(), Wrapped()):
        weight, spread = model.out.weight, {}
        for depth in (2, 200):
            torch.manual_seed(0)
            compat.initialise(model, {"n_layer": depth})
            spread[depth] = float(weight.detach().std())
        assert spread[2] / spread[200] == pytest.approx(10, rel=1e-3) and model.config.n_layer == 3
        before = weight.detach().clone()
        compat.initialise(model, {"n_head": 4})
        assert torch.equal(weight, before)  # a field that the class does not use


@carried_by("next_node_number", "running_node_number")
def test_a_gradient_that_is_not_finite_is_traced_to_the_module_of_its_forward():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 1))
    model[1].register_forward_hook(lambda _m, _i, out: out + (out - out.detach()).abs().sqrt())
    trace = trace_non_finite(model, torch.ones(2, 4), torch.sum, wide=False)
    assert (trace.phase, trace.layer) == ("backward", "1")


@carried_by("parameters_of", "DispatchMode")
def test_what_an_operation_writes_in_place_is_traced():
    def step():
        x = model(torch.ones(2, 4))
        x.detach().mul_(float("inf"))  # returns the memory that it was given
        return x.sum()

    model = nn.Linear(4, 4)
    assert trace_non_finite(model, step, wide=False).operation == "aten.mul_.Tensor"
