"""FlexAttention inside a compiled model: measured like outside, with what its functions hold at each run, or listed."""

import sys

import pytest
import torch
import transformers
from flex_calls import CASES, alibi, block_mask, causal, check, document, statistics, tensors
from torch import nn
from torch._dynamo.utils import counters
from torch.nn.attention import flex_attention as flex

from hnf_attention import compat, instrument

flex_compiled = sys.modules["hnf_attention.instrumentation.compiled.flex"]


@pytest.fixture(autouse=True)
def afresh():
    torch._dynamo.reset()
    counters.clear()


class Mixing(nn.Module):
    """Does not say attention in its name. Its functions hold a parameter, a tensor and a number."""

    def __init__(self):
        super().__init__()
        self.slopes = nn.Parameter(torch.randn(4))

    def forward(self, query, key, value, distances, reach, mask=None):
        def score_mod(score, b, h, i, j):
            return score + self.slopes[h] * distances[b, i, j] / reach

        return flex.flex_attention(query, key, value, score_mod, mask, scale=0.5)


class Plain(nn.Module):
    def forward(self, *args, **kwargs):
        return flex.flex_attention(*args, **kwargs)


HELD = torch.compile(flex.flex_attention, backend="eager")


class OfFile(nn.Module):
    def forward(self, *args):
        return HELD(*args)


class OfClass(nn.Module):
    held = staticmethod(HELD)

    def forward(self, *args):
        return self.held(*args)


def compiled(model, backend="eager"):
    return torch.compile(model, backend=backend, fullgraph=True)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["plain", "mask", "hidden by the scores"])
def test_statistics_are_those_of_the_modified_scores(case):
    score_mod, mask_mod = CASES[case]
    query, key, value = tensors(kv_heads=2)
    mask = None if mask_mod is None else block_mask(mask_mod)
    options = {"score_mod": score_mod, "block_mask": mask, "enable_gqa": True}
    model = nn.Sequential(Plain())
    run = compiled(model[0])
    plain = run(query, key, value, **options)
    with instrument(model) as handle:
        assert torch.equal(run(query, key, value, **options), plain)
    assert handle.coverage.measured == {"0": "probe (flex_attention)"} and not handle.coverage.not_measured
    check(handle.latest["0"], statistics(query, key, score_mod, mask_mod))


@pytest.mark.parametrize("kind", [OfFile, OfClass])
@pytest.mark.slow
def test_a_compiled_function_that_a_compiled_model_calls_is_measured(kind):
    model, (query, key, value) = nn.Sequential(kind()), tensors()
    run = compiled(model[0])
    plain = run(query, key, value)
    for called in (run, model[0]):  # from a graph, and from Python
        with instrument(model) as handle:
            assert torch.equal(called(query, key, value), plain)
        assert (
            handle.coverage.measured == {"0": "probe (flex_attention)"} and not handle.coverage.not_measured
        )
        check(handle.latest["0"], statistics(query, key))
    assert torch.equal(run(query, key, value), plain)


@torch.no_grad()
@pytest.mark.slow
def test_what_the_functions_hold_is_read_at_every_run():
    model, (query, key, value) = Mixing(), tensors()
    run = compiled(model, "aot_eager")  # lowers as the default backend does
    with instrument(run, strict=True) as handle:
        for reach in (2, 3, 4, 5):
            model.slopes.normal_()
            distances = torch.randn(2, 30, 26)
            run(query, key, value, distances, reach, block_mask(document))

            def biased(score, b, h, i, j, distances=distances, reach=reach):
                return score + model.slopes[h] * distances[b, i, j] / reach

            check(handle.latest[""], statistics(query, key, biased, document, 0.5))
        known = counters["stats"]["unique_graphs"]
        assert known == 2  # the number became one that changes
        handle.latest.clear()
        handle.measuring = False
        run(query, key, value, distances, reach, block_mask(document))
        assert counters["stats"]["unique_graphs"] == known and not handle.latest
    assert list(handle.coverage.measured) == [""]


@pytest.mark.parametrize("what", ["another Dynamo", pytest.param("another process", marks=pytest.mark.slow)])
def test_one_that_cannot_be_read_is_listed_and_strict_raises(what, monkeypatch, caplog):
    if what == "another Dynamo":
        monkeypatch.setattr(flex_compiled, "_functions_of", lambda tracer: 1 / 0)
    if what == "another process":
        monkeypatch.setattr(flex_compiled, "_known", type("Forgetful", (dict,), {"get": lambda *_: None})())
    model, args = Plain(), tensors()
    run = compiled(model)
    plain = run(*args)
    for _ in range(2):  # the second time there is a graph already
        with (
            instrument(run, strict=True) as handle,
            pytest.raises(RuntimeError, match="a compiled graph calls"),
        ):
            run(*args)
        assert list(handle.coverage.not_measured) == [""] and not handle.coverage.measured
    assert torch.equal(run(*args), plain)


def broken(score, b, h, i, j):
    torch._dynamo.graph_break()
    return 2.0 * score


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.filterwarnings("ignore")  # Dynamo's own, about what it cannot trace
def test_one_that_dynamo_cannot_trace_is_listed_without_an_error(caplog):
    model, args = Plain(), tensors()
    run = torch.compile(model, backend="eager")
    plain = run(*args, score_mod=broken)
    with instrument(model) as handle:
        assert torch.equal(run(*args, score_mod=broken), plain)
    assert "that cannot be read" in handle.coverage.not_measured[""] and not handle.coverage.measured
    assert not [record for record in caplog.records if record.name == "hnf_attention"]


def test_functions_are_evaluated_where_graphs_of_the_default_backend_run_operators():
    exclude = torch._C._dispatch_tls_local_exclude_set()
    for name in ("FuncTorchBatched", "FuncTorchDynamicLayerFrontMode", "FuncTorchDynamicLayerBackMode"):
        exclude |= torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, name))
    plain = flex.create_mask(document, 2, 1, 30, 26, "cpu")
    with torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), exclude):
        with pytest.raises(RuntimeError):
            flex.create_mask(document, 2, 1, 30, 26, "cpu")
        with compat.vmap_in_operators():
            assert torch.equal(flex.create_mask(document, 2, 1, 30, 26, "cpu"), plain)


@pytest.mark.gpu
def test_a_model_compiled_for_a_card_trains_as_before():
    model, results = Plain(), []
    run = torch.compile(model, fullgraph=True)
    tensors = [torch.randn(2, 4, 512, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    tensors = [x.requires_grad_() for x in tensors]
    mask = flex.create_block_mask(causal, None, None, 512, 512, device="cuda")
    for score_mod in (None, alibi):
        for measured in (False, True):
            handle = instrument(run, strict=True) if measured else None
            options = {"score_mod": score_mod, "block_mask": mask, "return_aux": flex.AuxRequest(lse=True)}
            out, aux = run(*tensors, **options)
            results.append([out, *torch.autograd.grad(out.float().square().sum(), tensors)])
        torch.testing.assert_close(handle.latest[""].rows.lse, aux.lse, atol=2e-2, rtol=1e-2)
        assert all(torch.equal(a, b) for a, b in zip(*results[-2:]))
        handle.restore()


class Caller(nn.Module):
    def forward(self, *args, **options):
        return transformers.AttentionInterface()["flex_attention"](self, *args, **options)[0]


@pytest.mark.slow
def test_what_hugging_face_adds_to_the_scores():
    model, (query, key, value), bias = Caller(), tensors(kv_heads=2), torch.randn(2, 4, 30, 26)

    def added(score, b, h, i, j):
        return 2.0 * torch.tanh(score / 2.0) + bias

    run = compiled(model)
    plain = run(query, key, value, block_mask(document), softcap=2.0, position_bias=bias)
    with instrument(run, strict=True) as handle:
        out = run(query, key, value, block_mask(document), softcap=2.0, position_bias=bias)
    assert torch.equal(out, plain)
    assert handle.coverage.measured == {"": "probe (transformers flex_attention)"}
    check(handle.latest[""], statistics(query, key, added, document))


def test_sinks_of_hugging_face_by_their_place(monkeypatch):
    module, args, sinks, given = Caller(), tensors(), torch.randn(4), []
    monkeypatch.setattr(flex_compiled, "beside", lambda *args: given.append(args))
    huggingface = sys.modules["hnf_attention.instrumentation.interceptors.transformers"]
    huggingface._beside_flex(module, *args, None, 0.5, 2.0, sinks)
    huggingface._beside_flex(module, *args, None, scaling=0.5, s_aux=sinks, softcap=2.0)
    assert [call[5:] for call in given] == [(0.5, sinks), (0.5, sinks)]
