"""torch.compile: measured in whichever order, never compiled again for it, and the model's numbers are its own."""

import copy
import shutil

import pytest
import torch
import torch.nn.functional as F
import transformers
from attention_layers import LLAMA, TOKENS
from attention_models import (
    LAYERS,
    Attention,
    Block,
    ByNameAttention,
    HandWrittenAttention,
    LinearAttention,
    Model,
    x,
)
from torch import nn
from torch._dynamo.utils import counters

from hnf_attention import AttentionStabilityMonitor, apply_intervention
from hnf_attention.instrumentation import instrument

pytestmark = [
    # PyTorch's own words, while it compiles whatever model.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
    pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning"),
]
BACKEND = "aot_eager"  # lowers forward and backward like the default one, without a C++ compiler


@pytest.fixture(autouse=True)
def afresh():
    torch._dynamo.reset()
    counters.clear()


def compiled(model, backend=BACKEND, **options):
    return torch.compile(model, backend=backend, fullgraph=True, **options)


def graphs():
    return counters["stats"]["unique_graphs"]


def numbers(run, model):
    """The output and all gradients."""
    model.zero_grad()
    torch.manual_seed(0)
    out = run(model)
    out.square().sum().backward()
    return [out.detach(), *(p.grad.clone() for p in model.parameters())]


def equal(some, others):
    return all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


def compare(model, run, backend=BACKEND, interceptor=None, exact=True):
    """Compiled before, while and after it is measured: the same numbers. Measured in the graph as outside of it."""
    graph = compiled(model, backend)
    before = numbers(lambda _: run(graph), model)
    with instrument(model) as handle:
        during = numbers(lambda _: run(graph), model)
        in_graph = dict(handle.latest)
        ways = set(handle.coverage.measured.values())
        handle.latest.clear()
        torch.manual_seed(0)
        run(model)
        outside = dict(handle.latest)
    after = numbers(lambda _: run(graph), model)
    assert equal(before, after)
    if exact:
        assert equal(before, during)
    else:
        torch.testing.assert_close(before, during)
    assert in_graph.keys() == outside.keys() and in_graph
    for name, measurement in in_graph.items():
        assert measurement.rows.lse.shape == outside[name].rows.lse.shape
        torch.testing.assert_close(measurement.rows.lse, outside[name].rows.lse)
        torch.testing.assert_close(measurement.rows.entropy, outside[name].rows.entropy)
        assert (measurement.visible_keys == outside[name].visible_keys).all()
    assert interceptor is None or ways == {interceptor}


@pytest.mark.slow
@pytest.mark.parametrize(
    "order", ["compiled first", "run before", "instrumented first", "in place", "blocks"]
)
def test_every_order_is_measured_and_puts_itself_back(order):
    model, inputs = Model(), x()
    run = compiled(model) if order in ("compiled first", "run before") else model
    if order == "run before":
        run(inputs)
    if order == "in place":
        model.compile(backend=BACKEND, fullgraph=True)
    if order == "blocks":
        model.blocks = nn.ModuleList(compiled(block) for block in model.blocks)
    with instrument(run) as handle:
        if order == "instrumented first":
            run = compiled(model)
        run(inputs)
        assert list(handle.latest) == LAYERS
        assert not handle.coverage.not_measured
        known = graphs()
        for wanted in (False, True, False, True):
            handle.latest.clear()
            handle.measuring = wanted
            run(inputs)
            assert list(handle.latest) == (LAYERS if wanted else [])
        assert graphs() == known
    handle.latest.clear()
    run(inputs)
    assert not handle.latest
    assert not any("_hnf_attention_layer" in vars(module) for module in model.modules())


def test_log_steps_and_the_steps_between_share_one_graph():
    model, inputs = Model(), x()
    run = compiled(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with (
        AttentionStabilityMonitor(run, log_every=3) as monitor,
        torch._dynamo.config.patch(error_on_recompile=True),
    ):
        for step in range(1, 8):
            run(inputs).sum().backward()
            optimizer.step()
            assert (monitor.on_step() is not None) == (step % 3 == 0)
        assert graphs() == 1
        assert [list(snapshot.layers) for snapshot in monitor.history] == [LAYERS] * 2
        clip = {"action": "qk_clip", "threshold": 1.0, "layers": {LAYERS[0]: [4.0] * 4}}
        apply_intervention(None, clip, run)


@pytest.mark.slow
def test_instrumenting_again_and_again_compiles_twice():
    model, inputs = Model(), x()
    run = compiled(model)
    for _ in range(10):  # more than Dynamo's limit of recompilations
        run(inputs)
        with instrument(model) as handle:
            run(inputs)
            assert list(handle.latest) == LAYERS
    assert graphs() == 2


@pytest.mark.slow
def test_a_process_that_has_compiled_nothing_yet_looks_into_the_interceptors():
    model = SoftmaxAttention()
    torch._dynamo.trace_rules.clear_lru_cache()  # as in a new process
    with instrument(model) as handle:
        compiled(model)(x())
    assert list(handle.latest) == [""]
    assert not handle.coverage.not_measured


@pytest.mark.slow
def test_blocks_that_share_a_graph_keep_their_names():
    model = nn.Sequential(*(Block() for _ in range(5)))
    for block in model:
        block.compile(backend=BACKEND, fullgraph=True)
    with instrument(model) as handle:
        model(x())
    assert list(handle.latest) == [f"{i}.attn" for i in range(5)]
    assert graphs() == 2  # the first input has no gradient


class SoftmaxAttention(HandWrittenAttention):
    def forward(self, inputs):
        q, k, v = self.split(inputs)
        out = F.softmax(q @ k.transpose(-1, -2) / 2, dim=-1) @ v
        return out.transpose(-2, -3).flatten(-2)


class Multihead(nn.Module):
    def __init__(self, need_weights):
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
        self.need_weights = need_weights

    def forward(self, inputs):
        return self.attention(inputs, inputs, inputs, need_weights=self.need_weights)[0]


SDPA = "probe (scaled_dot_product_attention)"
INTERCEPTORS = {
    "causal": (lambda: Model(is_causal=True), SDPA),
    "masked": (lambda: Model(attn_mask=torch.ones(20, 20).tril().bool()), SDPA),
    "dropout": (lambda: Model(False, dropout_p=0.3), SDPA),
    "by name": (lambda: nn.Sequential(ByNameAttention()), SDPA),
    "softmax": (lambda: nn.Sequential(SoftmaxAttention()), "probe (softmax)"),
    "multihead": (lambda: Multihead(False), SDPA),
    "multihead with weights": (lambda: Multihead(True), None),  # by its softmax in a graph
}
QUICK = ("causal", "softmax")


@pytest.mark.parametrize(
    "name", [x if x in QUICK else pytest.param(x, marks=pytest.mark.slow) for x in INTERCEPTORS]
)
def test_a_graph_is_measured_like_the_model_and_computes_what_it_did(name):
    (make, interceptor), inputs = INTERCEPTORS[name], x()
    compare(make(), lambda run: run(inputs), interceptor=interceptor)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_hugging_face_with_grouped_heads_and_padding(implementation):
    config = copy.deepcopy(LLAMA)
    config._attn_implementation = implementation
    mask = torch.ones_like(TOKENS)
    mask[0, 15:] = 0
    compare(
        transformers.LlamaModel(config),
        lambda run: run(TOKENS, attention_mask=mask, use_cache=False).last_hidden_state,
        interceptor=f"probe (transformers {implementation})",
    )


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.skipif(shutil.which("g++") is None, reason="without a C++ compiler")
def test_the_default_backend_keeps_its_numbers():
    inputs = x()
    compare(Model(is_causal=True), lambda run: run(inputs), backend="inductor")


@pytest.mark.slow
@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("inside", [True, False])
def test_the_second_forward_of_a_checkpoint_is_not_measured(use_reentrant, inside):
    model, inputs, seen = Model(use_reentrant), x().requires_grad_(), []
    model.blocks[1].attn = SoftmaxAttention()
    run = model
    if inside:
        run = compiled(model, "aot_eager_decomp_partition")  # with the default backend's partitioner
    else:
        for block in model.blocks:
            block.compile(backend=BACKEND, fullgraph=True)
    with instrument(model) as handle:
        handle.on_measure = lambda measurement: seen.append(measurement.layer)
        run(inputs).sum().backward()
        run(inputs).sum().backward()
    assert seen == LAYERS * 2


class WideAttention(Attention):
    def split(self, inputs):
        return (part.float() for part in super().split(inputs))


@pytest.mark.slow
def test_autocast_reaches_what_is_measured():
    model, inputs = WideAttention(), x()
    run = compiled(model)
    with instrument(model) as handle, torch.autocast("cpu", torch.bfloat16):
        run(inputs)
        in_graph = handle.latest[""]
        model(inputs)
    assert in_graph.dtype == torch.bfloat16
    assert torch.equal(in_graph.rows.lse, handle.latest[""].rows.lse)


@pytest.mark.slow
def test_dynamic_shapes_stay_one_graph():
    model = Model(is_causal=True)
    run = compiled(model, dynamic=True)
    with instrument(model) as handle:
        for length in (20, 24, 33):
            run(x(2, length, 16))
            assert handle.latest[LAYERS[0]].rows.lse.shape == (2, 4, length)
    assert graphs() == 1


def attend(q, k, v):
    return F.softmax(q @ k.transpose(-1, -2), dim=-1) @ v


class BrokenAttention(Attention):
    """What follows a graph break is another graph; the last part calls a graph of its own."""

    def forward(self, inputs):
        q, k, v = self.split(inputs)
        torch._dynamo.graph_break()
        return F.scaled_dot_product_attention(q, k, v).transpose(-2, -3).flatten(-2)


class NestedAttention(Attention):
    """Its `self` belongs to a function inside of the method as well."""

    def forward(self, inputs):
        def joined(out):
            return out.transpose(-2, -3).flatten(-2) * self.heads

        return joined(F.scaled_dot_product_attention(*self.split(inputs)))


class HelpedAttention(Attention):
    """Not compiled itself, but the function that it calls is."""

    helper = staticmethod(torch.compile(attend, backend=BACKEND, fullgraph=True))

    def forward(self, inputs):
        return self.helper(*self.split(inputs)).transpose(-2, -3).flatten(-2)


@pytest.mark.slow
def test_the_layer_is_found_behind_graph_breaks_and_around_compiled_functions():
    kinds = BrokenAttention, NestedAttention, HelpedAttention
    broken, nested, helped = (nn.Sequential(kind(), kind()) for kind in kinds)
    around = torch.compile(broken, backend=BACKEND)
    for model, run in ((broken, around), (nested, compiled(nested)), (helped, helped)):
        with instrument(model) as handle:
            run(x())
        assert list(handle.latest) == ["0", "1"]
        assert not handle.coverage.not_measured


@pytest.mark.slow
def test_a_graph_from_before_notices_that_its_model_is_instrumented_beside_another():
    other, model, inputs = Model(), Model(), x()
    run = compiled(model)
    with instrument(other) as theirs:
        run(inputs)
        with instrument(model) as handle:
            run(inputs)
            assert list(handle.latest) == LAYERS
        run(inputs)
        assert not theirs.latest


@pytest.mark.slow
@pytest.mark.parametrize("strict", [True, False])
def test_an_exported_program_holds_nothing_of_it(strict):
    model = Model().eval()
    with instrument(model):
        program = torch.export.export(model, (x(),), strict=strict)
    assert not any("hnf_attention" in str(node.target) for node in program.graph.nodes)


@pytest.mark.slow
def test_what_a_graph_hides_is_listed():
    model, inputs = nn.Sequential(HandWrittenAttention(), Attention()), x()
    run = compiled(model)
    with instrument(model, mode="fused") as handle:
        run(inputs)
    assert handle.coverage.measured == {"1": "probe: compiled (scaled_dot_product_attention)"}
    assert "tensor.softmax()" in handle.coverage.not_measured["0"]
    transform = compiled(lambda inputs: torch.func.vmap(lambda part: model[1](part))(inputs))
    with instrument(model) as handle:
        transform(inputs[None])
    assert set(handle.coverage.not_measured) == {"0", "1"}


@pytest.mark.slow
def test_the_inference_fast_path_is_off_in_a_graph_and_said_to_be():
    model = nn.TransformerEncoderLayer(16, 4, 16, batch_first=True).eval()
    run = compiled(model)
    with torch.no_grad(), instrument(model) as handle:
        run(x())
    assert set(handle.coverage.measured.values()) == {
        "probe (scaled_dot_product_attention), inference fast path off"
    }


@pytest.mark.slow
def test_strict_judges_a_compiled_model_from_outside():
    inputs, good, bad = x(), Model(), LinearAttention()
    with instrument(compiled(good), strict=True):
        good(inputs)
    good.compile(backend=BACKEND, fullgraph=True)
    with instrument(good, strict=True):  # its hooks are inside the graph
        good(inputs)
    run = compiled(bad)
    with instrument(run, strict=True), pytest.raises(RuntimeError, match="nothing measured"):
        run(inputs)


def test_a_fault_in_measuring_leaves_the_graph_alone(caplog):
    model, inputs = Model(), x()
    run = compiled(model)
    plain = run(inputs)

    def fail(measurement):
        raise ValueError("full disk")

    with instrument(model) as handle:
        handle.on_measure = fail
        assert torch.equal(run(inputs), plain)
    assert "full disk" in handle.coverage.not_measured[LAYERS[0]]
