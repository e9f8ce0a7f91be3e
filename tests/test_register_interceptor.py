"""`register_interceptor`: functions that the user names are measured, and nothing else changes."""

import functools
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from compat_helpers import compiled
from torch import nn

from hnf_attention import (
    AttentionAnalyzer,
    AttentionStabilityMonitor,
    CallDescription,
    Unmeasurable,
    attention_stats,
    instrument,
    register_interceptor,
)

GUIDE = Path(__file__).resolve().parents[1] / "docs" / "guides" / "other-attention.md"
LIBRARY = """
import torch

def sageattn(q, k, v, tensor_layout="HND", is_causal=False, sm_scale=None, return_lse=False, **kwargs):
    if tensor_layout == "NHD":
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    scale = q.shape[3] ** -0.5 if sm_scale is None else sm_scale
    scores = torch.einsum("bhmd,bhnd->bhmn", q, k) * scale
    if is_causal:
        scores = scores.masked_fill(torch.ones(scores.shape[2:], dtype=torch.bool).triu(1), -torch.inf)
    lse = scores.logsumexp(-1) + kwargs.get("error", 0.0)
    out = torch.einsum("bhmn,bhnd->bhmd", (scores - scores.logsumexp(-1, keepdim=True)).exp(), v)
    if tensor_layout == "NHD":
        out = out.transpose(1, 2)
    return (out, lse) if return_lse else out

class Kernel:
    @staticmethod
    def run(q, k, v):
        return sageattn(q, k, v, is_causal=True)

    def method(self, q, k, v):
        return sageattn(q, k, v, is_causal=True)

    @classmethod
    def of_class(cls, q, k, v):
        return sageattn(q, k, v)

def helper(*args, **kwargs):
    return sageattn(*args, **kwargs)
"""


def describe(q, k, v, tensor_layout="HND", is_causal=False, sm_scale=None, return_lse=False, **options):
    if options.get("attn_mask") is not None:
        raise Unmeasurable("its attn_mask is not described")
    if tensor_layout == "NHD":
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    lse = (lambda result: result[1]) if return_lse else None
    return CallDescription(q, k, v, is_causal=is_causal, scale=sm_scale, lse=lse)


class Attention(nn.Module):
    def __init__(self, call=None, **options):
        super().__init__()
        self.call, self.options = call, options
        self.projections = nn.Linear(16, 48)

    def qkv(self, x):
        return self.projections(x).view(*x.shape[:2], 3, 4, 4).transpose(1, 3).unbind(2)

    def forward(self, x):
        call = self.call or sys.modules["sageattention"].sageattn
        out = call(*self.qkv(x), **self.options)
        return out[0] if isinstance(out, tuple) else out


@pytest.fixture
def sage(monkeypatch):
    library = ModuleType("sageattention")
    exec(LIBRARY, vars(library))
    for function in (library.sageattn, library.Kernel, library.helper):
        function.__module__ = "sageattention"
    monkeypatch.setitem(sys.modules, "sageattention", library)
    return library


def run(model, x):
    model.zero_grad()
    out = model(x)
    out.square().sum().backward()
    return out.detach(), model.projections.weight.grad.clone()


X = torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "mode",
    ["probe", pytest.param("fused", marks=pytest.mark.slow), pytest.param("auto", marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("options", [{}, {"is_causal": True, "sm_scale": 0.3}, {"return_lse": True}], ids=str)
def test_it_measures_and_changes_nothing(sage, options, mode):
    model, original = Attention(**options), sage.sageattn
    plain = run(model, X)
    with (
        register_interceptor("sageattention.sageattn", describe),
        instrument(model, mode, strict=True) as handle,
    ):
        assert sage.sageattn is not original
        assert all(torch.equal(a, b) for a, b in zip(run(model, X), plain))
    assert sage.sageattn is original
    q, k, _ = (x.detach() for x in model.qkv(X))
    wanted = attention_stats(
        q.double(), k.double(), is_causal=bool(options.get("is_causal")), scale=options.get("sm_scale")
    )
    for name in ("lse", "entropy", "max_logit", "min_logit"):
        got = getattr(handle.latest[""].rows, name)
        torch.testing.assert_close(got.double(), getattr(wanted, name), rtol=1e-5, atol=1e-5)
    how = handle.coverage.measured[""]
    assert "sageattention.sageattn" in how and how.endswith(", its lse agrees") == ("return_lse" in options)


def test_the_guide_as_it_stands(sage):
    if not GUIDE.is_file():
        pytest.skip("the documentation is in the checkout only")
    blocks = re.findall(
        r"^```python\n(.*?)^```$", GUIDE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )
    model = nn.Sequential()
    model.add_module("attn", Attention(tensor_layout="HND", is_causal=True))
    names = {"model": model, "x": X}
    for block in blocks:
        exec(compile(block, str(GUIDE), "exec"), names)
    assert names["instrumentation"].coverage.measured == {"attn": "probe (sageattention.sageattn)"}
    assert "unregistered" in repr(names["sage"])


@pytest.mark.slow
def test_monitor_and_analyzer(sage):
    model = Attention(is_causal=True, return_lse=True)
    with register_interceptor(sage.sageattn, describe):
        monitor = AttentionStabilityMonitor(model, log_every=1)
        analyzer = AttentionAnalyzer(model)
        run(model, X)
        diagnosis = monitor.on_step()
        for stats in (diagnosis.stats[""], analyzer.diagnose().stats[""]):
            assert len(stats.entropy) == 4 and (stats.rows == 2 * 9).all()
        assert not diagnosis.not_measured
        monitor.restore(), analyzer.restore()


def test_after_unregistering_the_layer_is_listed(sage):
    model = Attention()
    handle = register_interceptor("sageattention.sageattn", describe)
    handle.unregister(), handle.unregister()
    with instrument(model) as instrumentation:
        model(X)
    assert not instrumentation.coverage.measured and "" in instrumentation.coverage.not_measured


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_later_description_holds_for_models_that_are_instrumented(sage, compiled):
    def wrong(q, k, v, **options):
        return CallDescription(q, k, v, scale=7.0)

    models, rows = (Attention(), Attention()), []
    models[1].load_state_dict(models[0].state_dict())
    run_one = torch.compile(models[0], backend="eager") if compiled else models[0]
    first = register_interceptor("sageattention.sageattn", wrong)
    with instrument(models[0]) as handle:
        run_one(X)
        rows.append(handle.latest[""].rows.lse)
        first.unregister()
        with register_interceptor("sageattention.sageattn", describe), instrument(models[1]) as other:
            run_one(X), models[1](X)
            rows += [handle.latest[""].rows.lse, other.latest[""].rows.lse]
        run_one(X)  # unregistered, and still measured
        rows.append(handle.latest[""].rows.lse)
    assert not torch.allclose(rows[0], rows[1])
    assert torch.equal(rows[1], rows[2]) and torch.equal(rows[1], rows[3])


@pytest.mark.slow
def test_wherever_it_is_held(sage):
    other = ModuleType("sage_user")
    other.attend = sage.sageattn
    sys.modules["sage_user"] = other
    held, by_class = (
        Attention(sage.sageattn),
        type("ByClass", (Attention,), {"fn": staticmethod(sage.sageattn)})(),
    )
    by_class.forward = lambda x: by_class.fn(*by_class.qkv(x))
    aliased, original = Attention(lambda *args: other.attend(*args)), sage.sageattn
    model = nn.ModuleDict(
        {"held": held, "by_class": by_class, "aliased": aliased, "helper": Attention(sage.helper)}
    )
    model.forward = lambda x: [module(x) for module in model.values()]
    try:
        with (
            register_interceptor("sageattention.sageattn", describe),
            instrument(model, strict=True) as handle,
        ):
            model(X)
            assert list(handle.coverage.measured) == list(model)
    finally:
        del sys.modules["sage_user"]
    assert held.call is other.attend is type(by_class).fn is original


@pytest.mark.parametrize("name", ["run", "method"])
def test_methods(sage, name):
    kernel = sage.Kernel()
    model = Attention(lambda *args: getattr(kernel, name)(*args))
    plain, before = model(X), vars(sage.Kernel)[name]

    def of_method(*args):
        return CallDescription(*args[-3:], is_causal=True)

    with (
        register_interceptor(f"sageattention.Kernel.{name}", of_method),
        instrument(model, strict=True) as handle,
    ):
        assert torch.equal(model(X), plain)
    assert vars(sage.Kernel)[name] is before or vars(sage.Kernel)[name].__func__ is before.__func__
    assert handle.coverage.measured == {"": f"probe (sageattention.Kernel.{name})"}


def test_a_wrong_description_is_found_by_the_lse(sage):
    model = Attention(return_lse=True, error=0.5)
    with register_interceptor("sageattention.sageattn", describe), instrument(model, sample=2) as handle:
        model(X)
    assert "differ by up to 5.0e-01" in handle.coverage.not_measured[""] and not handle.coverage.measured


@pytest.mark.parametrize(
    "description, reason",
    [
        (
            lambda *a, **k: (a, k),
            "expected the description of sageattention.sageattn to be a CallDescription",
        ),
        (lambda q, k, v: CallDescription(q, k[:, :3], v), "measuring failed: ValueError"),
        pytest.param(lambda q, k, v: 1 / 0, "ZeroDivisionError", marks=pytest.mark.slow),
        pytest.param(lambda q, k, v, missing: None, "missing", marks=pytest.mark.slow),
    ],
)
def test_a_description_that_fails_costs_the_call_and_nothing_else(sage, description, reason, caplog):
    model = Attention()
    plain = model(X)
    with register_interceptor("sageattention.sageattn", description), instrument(model) as handle:
        assert torch.equal(model(X), plain)
    assert reason in handle.coverage.not_measured[""] and "could not measure" in caplog.text


@pytest.mark.slow
def test_what_it_cannot_describe_is_listed(sage):
    mask, model = torch.ones(9, 9, dtype=torch.bool), Attention()
    with register_interceptor("sageattention.sageattn", describe), instrument(model) as handle:
        model.options = {"attn_mask": mask}
        model(X)
        assert handle.coverage.not_measured[""] == "its attn_mask is not described"
        torch.func.vmap(model)(X[None])
        assert "transform of torch.func" in handle.coverage.not_measured[""]
    model.options, model.call = {}, functools.partial(sage.sageattn, sm_scale=0.1)
    with register_interceptor("sageattention.sageattn", describe), instrument(model) as handle:
        model(X)
    assert "functools.partial of sageattn" in handle.coverage.not_measured[""]


@pytest.mark.slow
def test_a_compiled_graph_measures_it(sage):
    model = Attention(is_causal=True, sm_scale=0.3)
    plain = model(X)
    with register_interceptor("sageattention.sageattn", describe), instrument(model, strict=True) as handle:
        model(X)
        (eager,) = handle.latest.values()
        handle.latest.clear()
        run = compiled(model, "aot_eager")
        for _ in range(2):
            torch.testing.assert_close(run(X), plain)
        ours, theirs = handle.latest[""].rows, eager.rows
        torch.testing.assert_close(ours.entropy, theirs.entropy)
        torch.testing.assert_close(ours.max_logit, theirs.max_logit)
    assert (
        handle.coverage.measured == {"": "probe: compiled (sageattention.sageattn)"}
        or handle.coverage.measured
    )


@pytest.mark.slow
@pytest.mark.exhaustive
def test_arguments_that_a_compiled_graph_cannot_hold_are_listed(sage):
    model = Attention(extra=torch.float16)
    with register_interceptor("sageattention.sageattn", describe), instrument(model) as handle:
        compiled(model, "aot_eager")(X)
    assert "sageattention.sageattn and arguments that cannot be read" in handle.coverage.not_measured[""]


@pytest.mark.parametrize(
    "function, error, text",
    [
        (3, TypeError, "a Python function or its path, got int"),
        ("sageattn", ValueError, "a path like"),
        ("no_such_module.f", ImportError, "no_such_module"),
        ("sageattention.nothing", AttributeError, "no 'nothing'"),
        ("sageattention.Kernel", TypeError, "to be a function, got type"),
        ("sageattention.Kernel.of_class", TypeError, "to be a function, got method"),
        ("torch.nn.functional.scaled_dot_product_attention", ValueError, "not measured without it"),
        (torch.nn.functional.scaled_dot_product_attention, (ImportError, ValueError), "_nn|expected"),
        (lambda q, k, v: q, AttributeError, "lambda"),
    ],
)
def test_bad_functions_are_refused(sage, function, error, text):
    with pytest.raises(error, match=text):
        register_interceptor(function, describe)


def test_a_second_registration_and_a_description_that_cannot_be_called_are_refused(sage):
    with pytest.raises(TypeError, match="describe to be a function, got dict"):
        register_interceptor("sageattention.sageattn", {})
    with register_interceptor("sageattention.sageattn", describe) as first:
        with pytest.raises(ValueError, match="unregister it first"):
            register_interceptor(sage.sageattn, describe)
        assert first.path == "sageattention.sageattn"
