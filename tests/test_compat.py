"""What each private name of torch and transformers carries: the public behaviour that fails if it answers wrongly."""

import ast
import functools
import inspect
import sys
import types
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from attention_models import LAYERS, Attention, HandWrittenAttention, Model, x
from torch import nn
from torch._dynamo.utils import counters
from torch.autograd import forward_ad
from torch.nn.attention import flex_attention as flex
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import hnf_attention
from hnf_attention import (
    ProcessGroups,
    apply_intervention,
    attention,
    attention_stats,
    compat,
    instrument,
)
from hnf_attention.compat import dynamo
from hnf_attention.engine import library
from hnf_attention.engine.call import check
from hnf_attention.interventions import learning_rate, qk_clip

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning"),  # PyTorch's own, under vmap
]

HERE = sys.modules[__name__]
PACKAGE = Path(hnf_attention.__file__).parent
HELD = torch.compile(flex.flex_attention, backend="eager")
tested: set[str] = set()


def carried_by(*names):
    """Marks the test of a behaviour that these entries of `compat` carry."""
    tested.update(names)
    return lambda test: test


def qkv(**options):
    return [torch.randn(2, 3, 7, 4, **options) for _ in range(3)]


class Operators(TorchDispatchMode):
    """Records the operators that run inside."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, operator, _types, args=(), kwargs=None):
        self.seen.append(str(operator))
        return operator(*args, **kwargs or {})


def compiled(model, backend="eager"):
    torch._dynamo.reset()
    counters.clear()
    return torch.compile(model, backend=backend, fullgraph=True)


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


@carried_by("current_level")
@pytest.mark.filterwarnings(
    "ignore:.*torch.jit.script:DeprecationWarning"
)  # PyTorch's own, at its first dual level
def test_forward_mode_differentiation_meets_the_one_operator_on_every_device():
    query, key, value = qkv()
    with forward_ad.dual_level():
        out, _ = attention(forward_ad.make_dual(query, torch.ones_like(query)), key, value)
        assert forward_ad.unpack_dual(out).tangent is None


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


@carried_by("cudnn_backward", "flash_backward")
@pytest.mark.parametrize("kind", [library.CUDNN, library.FLASH])
def test_pytorchs_backward_takes_the_arguments_that_it_is_given(kind):
    query, key, value = (torch.empty(2, 4, 128, 64, dtype=torch.bfloat16, device="meta") for _ in range(3))
    options = dict(attn_mask=None, is_causal=True, scale=None, window_size=None, softcap=None, sinks=None)
    lse = torch.empty(2, 4, 128, device="meta")
    call = query, key, value, check(query, key, value, **options)
    gradients = library.backward(kind, *call, torch.empty_like(query), lse, torch.empty_like(query))
    assert [g.shape for g in gradients[:3]] == [x.shape for x in (query, key, value)]


@pytest.mark.gpu
@carried_by("cudnn_backward", "flash_backward")
@pytest.mark.parametrize("kind", [library.CUDNN, library.FLASH])
def test_pytorchs_backward_gives_the_gradients(kind, monkeypatch):
    shape = dict(device="cuda", dtype=torch.bfloat16, requires_grad=True)
    leaves = [torch.randn(2, 4, 128, 64, **shape) for _ in range(3)]
    expected = torch.autograd.grad(F.scaled_dot_product_attention(*leaves).sum(), leaves)
    monkeypatch.setattr(library, "choose", lambda *_: kind)
    got = torch.autograd.grad(attention(*leaves)[0].sum(), leaves)
    for ours, theirs in zip(got, expected):
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)


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
        self.q_proj, self.k_proj = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, inputs):
        q, k = (p(inputs).unflatten(-1, (4, 4)).transpose(1, 2) for p in (self.q_proj, self.k_proj))
        return F.scaled_dot_product_attention(q, k, k)


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


@pytest.fixture
def four_processes():
    """This process as the first of four, of which the others do not exist."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    yield
    dist.destroy_process_group()


@carried_by("flattened")
def test_all_other_dimensions_of_a_mesh_hold_the_batch(four_processes):
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "pp"))
    batch = ProcessGroups.of_mesh(mesh).batch
    assert dist.get_process_group_ranks(batch) == [0, 1, 2, 3]


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
        assert "'flash_attention_3' is not measured" in handle.coverage.not_measured["transformer.h.0.attn"]


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
    assert [arguments[-1] for arguments in given] == [None, mesh]


# torch.compile


@carried_by("is_wrapper", "without_wrappers")
@torch.no_grad()
def test_layers_of_compiled_blocks_keep_their_names():
    model = Model()
    model.blocks = nn.ModuleList(compiled(block) for block in model.blocks)
    with instrument(model) as handle:
        model(x())
    assert list(handle.latest) == LAYERS


class OfFile(nn.Module):
    def forward(self, *tensors):
        return HELD(*tensors)


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


# The whole of it


def test_every_entry_has_a_test():
    functions = {name for name, value in vars(dynamo).items() if inspect.isfunction(value)}
    methods = {name for name in vars(dynamo.Frame) if not name.startswith("_")}
    of_dynamo = {name for name in functions | methods if not name.startswith("_")} - {"child"}
    assert tested == {*compat.__all__, *of_dynamo}


def sources():
    """Every file of the package and of its kernels: (path, tree)."""
    folders = [PACKAGE, PACKAGE.parent / "kernels"]
    for path in sorted({path for folder in folders for path in folder.rglob("*.py")}):
        yield path, ast.parse(path.read_text(encoding="utf-8"))


def imports(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


LOOKUPS = {"getattr", "hasattr", "setattr", "delattr", "import_module", "attrgetter", "_find"}


def private_names(tree):
    """Private attributes that are read, private modules that are imported, and either as text in a lookup."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_"):
            yield node.attr, node.lineno
        elif isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in LOOKUPS:
            texts = (x.value for x in node.args if isinstance(x, ast.Constant) and isinstance(x.value, str))
            for part in ".".join(texts).split("."):
                if part.startswith("_"):
                    yield part, node.lineno
    for name in imports(tree):
        for part in name.split("."):
            if part.startswith("_"):
                yield part, 0


def own_names(tree):
    """Private names that the project gives: functions, classes, attributes, variables, parameters, slots."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr


def texts(tree, known):
    """Known private names that are a whole string."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and node.value in known:
            yield node.value, node.lineno


OTHERS = {
    "_replace", "_asdict", "_fields",  # of Python's NamedTuple
    "_getframe",  # of Python's sys
    "_batches_that_stepped",  # of Lightning, which has no public name for it
}  # fmt: skip


def test_no_private_name_of_a_library_stands_outside_of_compat():
    trees = dict(sources())
    inside = {path: tree for path, tree in trees.items() if path.parent == PACKAGE / "compat"}
    known = {name for tree in inside.values() for name, _ in private_names(tree)}
    known -= {name for tree in inside.values() for name in own_names(tree)}
    own = {name for tree in trees.values() for name in own_names(tree)}
    found = [
        f"{path.relative_to(PACKAGE.parent)}:{line}: {name}"
        for path, tree in trees.items()
        if path not in inside
        for name, line in (*private_names(tree), *texts(tree, known))
        if not name.startswith("__") and (name in known or name not in own | OTHERS)
    ]
    assert not found, "\n".join(found)


def test_compat_imports_torch_alone():
    for path in (PACKAGE / "compat").glob("*.py"):
        statements = ast.parse(path.read_text(encoding="utf-8")).body
        names = set(imports(ast.Module(statements, []))) if path.name != "dynamo.py" else set()
        top = {name.partition(".")[0] for name in names} - set(sys.stdlib_module_names)
        assert top <= {"torch"}, path
        for statement in statements:
            if isinstance(statement, (ast.Import, ast.ImportFrom)):
                assert not any("_dynamo" in name for name in imports(ast.Module([statement], [])))
