"""Functions of libraries in compiled graphs: an operator beside the call measures it."""

import sys

import library_standins as standins
import pytest
import torch
from compat_helpers import compiled
from flash_standins import packed
from test_flash_attn import K, Q, check, draw
from test_libraries import sequences
from torch import nn
from torch.nn.attention import varlen

from hnf_attention import instrument

pytestmark = pytest.mark.slow


@torch.library.custom_op("hnf_attention_tests::flash", mutates_args=())
def flash(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, starts: torch.Tensor, ends: torch.Tensor, causal: bool
) -> torch.Tensor:
    return packed(q, k, v, starts, ends, causal=causal)[0]


flash.register_fake(lambda q, *_: torch.empty_like(q))


class Packed(nn.Module):
    """A packed layer over FlashAttention, as a model's file calls it."""

    def __init__(self):
        super().__init__()
        self.q, self.k = nn.Linear(8, 32), nn.Linear(8, 16)

    def forward(self, x, y, starts, ends):
        q, k = self.q(x).view(-1, 4, 8), self.k(y).view(-1, 2, 8)
        attend = sys.modules["flash_attn"].flash_attn_varlen_func
        return attend(q, k, k, starts, ends, 8, max_seqlen_k=16, causal=True, window_size=(-1, -1)), q, k


WINDOW = (-1, -1)


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal=False, window_size=WINDOW
):
    return flash(q, k, v, cu_seqlens_q, cu_seqlens_k, causal)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.exhaustive)])
def test_a_pack_in_a_graph(monkeypatch, backend):
    library = standins.put_in_place(monkeypatch, "flash_attn", flash_attn_varlen_func=flash_attn_varlen_func)
    assert library.flash_attn_varlen_func is flash_attn_varlen_func
    model, x, y = Packed(), draw(20, 8), draw(29, 8)
    with torch.no_grad(), instrument(model, strict=True) as handle:
        run = compiled(model, backend)
        for starts, ends, keys in ((Q, Q, x), (Q, K, y)):
            out, q, k = run(x, keys, starts.int(), ends.int())
            torch.testing.assert_close(out, packed(q, k, k, starts, ends, causal=True)[0])
            check(handle.latest[""], sequences(q, k, starts, ends), causal=True)
    assert (
        "flash_attn.flash_attn_varlen_func" in handle.coverage.measured[""]
        and not handle.coverage.not_measured
    )


def test_pytorchs_own_varlen_in_a_graph(monkeypatch):
    @torch.library.custom_op("hnf_attention_tests::varlen", mutates_args=())
    def attend(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, starts: torch.Tensor, left: int, right: int
    ) -> torch.Tensor:
        return packed(q, k, v, starts, starts, window=(left, right))[0]

    attend.register_fake(lambda q, *_: torch.empty_like(q))

    def varlen_attn(
        query,
        key,
        value,
        cu_seq_q,
        cu_seq_k,
        max_q,
        max_k,
        *,
        scale=None,
        window_size=WINDOW,
        enable_gqa=False,
    ):
        return attend(query, key, value, cu_seq_q, *window_size)

    monkeypatch.setattr(varlen, "varlen_attn", varlen_attn)

    class Model(nn.Module):
        def forward(self, q, k, starts):
            return varlen.varlen_attn(q, k, k, starts, starts, 8, 8, window_size=(3, 0), enable_gqa=True)

    model, q, k = Model(), draw(20, 4, 8), draw(20, 2, 8)
    with torch.no_grad(), instrument(model, strict=True) as handle:
        compiled(model, "aot_eager")(q, k, Q.int())
    check(handle.latest[""], sequences(q, k, Q, Q), window=(3, 0))


def test_a_method_in_a_graph(monkeypatch):
    cls = type("DotProductAttention", (standins.DotProductAttention,), {})
    standins.put_in_place(monkeypatch, "transformer_engine.pytorch", DotProductAttention=cls)
    model, tensors = nn.Module(), [draw(2, 9, heads, 8) for heads in (4, 2, 2)]
    model.core_attention = cls(4, 8, "bshd", "causal", (3, 0))
    model.forward = lambda *args: model.core_attention(*args)
    with torch.no_grad():
        plain = model(*tensors)
        with instrument(model) as handle:
            torch.testing.assert_close(compiled(model, "aot_eager")(*tensors), plain)
    (layer,) = handle.coverage.measured
    check(
        handle.latest[layer], [(tensors[0][b], tensors[1][b]) for b in range(2)], causal=True, window=(3, 0)
    )


@pytest.mark.exhaustive
def test_objects_of_xformers_are_listed(monkeypatch):
    function = {"memory_efficient_attention": standins.memory_efficient_attention}
    library = standins.put_in_place(monkeypatch, "xformers.ops", **function)

    class Model(nn.Module):
        def forward(self, q, bias):
            return library.memory_efficient_attention(q, q, q, attn_bias=bias)

    model, q = Model(), draw(2, 9, 4, 8)
    with torch.no_grad(), instrument(model) as handle:
        run = torch.compile(model, backend="aot_eager")
        run(q, standins.LowerTriangularMask())
        assert "arguments that cannot be read there" in handle.coverage.not_measured[""]
    with torch.no_grad(), instrument(model, strict=True) as handle:
        torch.compile(model, backend="aot_eager", fullgraph=True)(q, None)
    check(handle.latest[""], [(q[b], q[b]) for b in range(2)])
