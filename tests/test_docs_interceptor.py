"""The interceptor of docs/extending.md, run as it stands there."""

import re
import sys
from pathlib import Path
from textwrap import dedent
from types import ModuleType

import pytest
import torch
from compat_helpers import compiled
from torch import nn

from hnf_attention import attention_stats, instrument
from hnf_attention.instrumentation import handle

PAGE = Path(__file__).resolve().parents[1] / "docs" / "extending.md"
if not PAGE.is_file():
    pytest.skip("the documentation is in the checkout only", allow_module_level=True)

LIBRARY = """
import torch

def attention(q, k, v, causal=False, window=None):
    (M, N), scale = (q.shape[1], k.shape[1]), q.shape[3] ** -0.5
    scores = torch.einsum("bmhd,bnhd->bhmn", q, k) * scale
    behind = torch.arange(M)[:, None] + N - M - torch.arange(N)
    hidden = behind < 0 if causal else torch.zeros(M, N, dtype=torch.bool)
    if window is not None:
        hidden = hidden | (behind.abs() >= window)
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    return torch.einsum("bhmn,bnhd->bmhd", weights, v)
"""


class Attention(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.options = options
        self.projections = nn.Linear(16, 48)

    def forward(self, x):
        q, k, v = self.projections(x).view(*x.shape[:2], 3, 4, 4).unbind(2)
        return sys.modules["theirs"].attention(q, k, v, **self.options)


@pytest.fixture(scope="module")
def interceptor():
    section = PAGE.read_text(encoding="utf-8").split("## An interceptor")[1].split("\n## ")[0]
    blocks = re.findall(r"^( *)```python\n(.*?)^\1```$", section, re.DOTALL | re.MULTILINE)
    module = ModuleType("hnf_attention.instrumentation.interceptors.theirs")
    module.__package__ = module.__name__.rpartition(".")[0]
    sys.modules[module.__name__] = module  # Dynamo looks up the globals of what it traces there
    exec(compile("\n".join(dedent(code) for _, code in blocks), str(PAGE), "exec"), vars(module))
    yield module
    del sys.modules[module.__name__]


@pytest.fixture
def library(interceptor, monkeypatch):
    theirs = ModuleType("theirs")
    exec(LIBRARY, vars(theirs))
    monkeypatch.setitem(sys.modules, "theirs", theirs)
    install = handle._install

    def with_theirs(modules, patches):
        install(modules, patches)
        patches += interceptor.install(modules)

    monkeypatch.setattr(handle, "_install", with_theirs)
    return theirs


def run(model, x):
    model.zero_grad()
    out = model(x)
    out.square().sum().backward()
    return out.detach(), model.projections.weight.grad.clone()


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"causal": True, "window": 3}], ids=str)
def test_it_measures_and_changes_nothing(library, options):
    torch.manual_seed(0)
    model, x, original = Attention(**options), torch.randn(2, 9, 16), library.attention
    plain = run(model, x)
    with instrument(model) as handle:
        assert all(torch.equal(a, b) for a, b in zip(run(model, x), plain))
        assert handle.coverage.measured == {"": "probe (theirs)"}
        q, k, _ = model.projections(x).view(2, 9, 3, 4, 4).transpose(1, 3).unbind(2)
        expected = attention_stats(q, k, is_causal="causal" in options, window_size=options.get("window"))
        torch.testing.assert_close(handle.latest[""].rows.entropy, expected.entropy.detach())
    assert library.attention is original
    with instrument(model, "fused") as handle:
        for ours, theirs in zip(run(model, x), plain):
            torch.testing.assert_close(ours, theirs)
        assert handle.coverage.measured == {"": "fused (theirs)"}


@pytest.mark.slow
def test_compiled_graphs_are_measured_and_transforms_are_listed(library):
    model, x = Attention(causal=True), torch.randn(2, 9, 16)
    with instrument(model) as handle:
        run = compiled(model, "aot_eager")
        torch.testing.assert_close(run(x), Attention.forward(model, x))
        assert handle.coverage.measured == {"": "probe (theirs)"} and not handle.coverage.not_measured
        torch.func.vmap(model)(x[None])
        assert "transform of torch.func" in handle.coverage.not_measured[""]


def test_what_it_does_not_describe_is_listed(library):
    class Cross(Attention):
        def forward(self, x):
            q, k, v = self.projections(x).view(*x.shape[:2], 3, 4, 4).unbind(2)
            return library.attention(q[:, :5], k, v, causal=True)

    model, x = Cross(), torch.randn(2, 9, 16)
    plain = model(x)
    with instrument(model) as handle:
        assert torch.equal(model(x), plain)
        assert "bottom right" in handle.coverage.not_measured[""]
