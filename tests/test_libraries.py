"""PyTorch's varlen_attn, and stand-ins of xformers, Transformer Engine and Megatron-Core, are measured."""

import sys
from inspect import signature

import library_standins as standins
import pytest
import torch
from flash_standins import STATISTICS, packed
from test_flash_attn import K, Q, check, draw
from torch import nn
from torch.nn.attention import varlen

from hnf_attention import AttentionStabilityMonitor, instrument

slow = pytest.mark.slow


class Call(nn.Module):
    """Calls what it finds under a name of a module, as a model's file does."""

    def __init__(self, library, name):
        super().__init__()
        self.library, self.name = library, name

    def forward(self, *args, **kwargs):
        return getattr(sys.modules[self.library], self.name)(*args, **kwargs)


def run(model, *args, mode="probe", **kwargs):
    """(the one measurement, what the coverage says) of a model's call, which returns what it returns without us."""
    plain = model(*args, **kwargs)
    with instrument(model, mode, strict=True) as handle:
        result = model(*args, **kwargs)
    for mine, theirs in zip(*((x if isinstance(x, tuple) else (x,)) for x in (result, plain))):
        assert (
            torch.equal(mine, theirs)
            if mode == "probe"
            else torch.allclose(mine, theirs, rtol=1e-4, atol=1e-5)
        )
    ((name, how),) = handle.coverage.measured.items()
    return handle.latest[name], how


def sequences(q, k, starts_q, starts_k):
    borders = zip(starts_q.tolist(), starts_q[1:].tolist(), starts_k.tolist(), starts_k[1:].tolist())
    return [(q[a:b], k[c:d]) for a, b, c, d in borders]


@pytest.fixture
def on_cpu(monkeypatch):
    """PyTorch's own function, with a kernel for the CPU, which has none."""

    def kernel(q, k, v, starts_q, starts_k, most_q, most_k, causal, scale, window, *_):
        out, lse = packed(q, k, v, starts_q, starts_k, scale=scale, window=tuple(window))
        return out, lse, torch.zeros(2)

    class Operator:
        _varlen_attn = staticmethod(kernel)

    monkeypatch.setattr(varlen.torch.ops, "torch_attn", Operator, raising=False)


@pytest.mark.parametrize("mode", ["probe", pytest.param("fused", marks=slow)])
@pytest.mark.parametrize(
    "window", [(-1, 0), *(pytest.param(x, marks=slow) for x in ((-1, -1), (3, 0), (2, 2)))], ids=str
)
def test_varlen_attn(on_cpu, window, mode):
    grouped = {"enable_gqa": True} if "enable_gqa" in signature(varlen.varlen_attn).parameters else {}
    kv_heads = 2 if grouped else 4  # torch 2.11 takes no groups
    q, k, v, starts = draw(20, 4, 8), draw(20, kv_heads, 8), draw(20, kv_heads, 8), Q.int()
    model = Call("torch.nn.attention.varlen", "varlen_attn")
    got, how = run(model, q, k, v, starts, starts, 8, 8, window_size=window, mode=mode, **grouped)
    assert how == f"{mode} (varlen_attn)"
    check(got, sequences(q, k, Q, Q), window=window)
    more = draw(29, 4, 8), draw(29, 4, 8)
    request = varlen.AuxRequest(lse=True)
    got, how = run(model, q, *more, starts, K.int(), 8, 16, window_size=window, scale=0.5, return_aux=request)
    assert how == "probe (varlen_attn), its lse agrees"
    check(got, sequences(q, more[0], Q, K), window=window, scale=0.5)


@pytest.mark.gpu
@pytest.mark.parametrize("window", [(-1, -1), (-1, 0), (30, 0)], ids=str)
def test_varlen_attn_on_a_card(window):
    starts = torch.tensor([0, 70, 70, 199, 400], dtype=torch.int32)
    q, k = (draw(400, 4, 64, dtype=torch.bfloat16) for _ in range(2))
    of_card = [x.cuda() for x in (q, k, k, starts, starts.clone())]
    model = Call("torch.nn.attention.varlen", "varlen_attn")
    got, how = run(model, *of_card, 201, 201, window_size=window, return_aux=varlen.AuxRequest(lse=True))
    assert how == "probe (varlen_attn), its lse agrees"
    got.rows = type(got.rows)(**{name: getattr(got.rows, name).cpu() for name in STATISTICS})
    check(got, sequences(q, k, starts, starts), 1e-3, window=window)


@slow
def test_torchtitans_attention(on_cpu):
    """Its wrappers hold the functions as torchtitan's do: globals of a file, a compiled one in the class."""

    class VarlenAttention(nn.Module):
        def forward(self, q, k, v, *, attention_masks):
            starts, longest = attention_masks
            return varlen.varlen_attn(
                q, k, v, starts, starts, longest, longest, scale=None, window_size=(-1, 0)
            )

    class ScaledDotProductAttention(nn.Module):
        def forward(self, q, k, v):
            q, k, v = (x[None].transpose(1, 2) for x in (q, k, v))
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = nn.Linear(16, 96)
            self.packed, self.plain = VarlenAttention(), ScaledDotProductAttention()

        def forward(self, x, masks):
            q, k, v = self.qkv(x).view(len(x), 3, 4, 8).unbind(1)
            return self.packed(q, k, v, attention_masks=masks).sum() + self.plain(q, k, v).sum()

    model, x, masks = Block(), draw(20, 16), (Q.int(), 8)
    monitor = AttentionStabilityMonitor(model, log_every=1)
    model(x, masks).backward()
    diagnosis = monitor.on_step()
    assert set(diagnosis.stats) == {"packed", "plain"} and not diagnosis.not_measured
    monitor.restore()


BIASES = {
    "none": lambda m, n: (None, {}),
    "LowerTriangularMask": lambda m, n: (standins.LowerTriangularMask(), {"window": (-1, m - n)}),
    "bottom right": lambda m, n: (standins.LowerTriangularFromBottomRightMask(), {"causal": True}),
    "local": lambda m, n: (standins.LocalAttentionFromBottomRightMask(2, 1), {"window": (2, 1)}),
}


@slow
@pytest.mark.parametrize("sizes", [(9, 9), (9, 13)], ids=str)
@pytest.mark.parametrize("bias", BIASES)
def test_xformers(monkeypatch, bias, sizes):
    name = "memory_efficient_attention_forward_requires_grad"
    functions = {x: getattr(standins, x) for x in (name, "memory_efficient_attention")}
    standins.put_in_place(monkeypatch, "xformers.ops", **functions)
    q, k, v = draw(2, sizes[0], 4, 8), draw(2, sizes[1], 4, 8), draw(2, sizes[1], 4, 8)
    attn_bias, shape = BIASES[bias](*sizes)
    if bias == "LowerTriangularMask" and sizes[0] != sizes[1]:
        shape = {"window": (-1, None)}  # top left, which the helper cannot say
    model = Call("xformers.ops", "memory_efficient_attention")
    got, how = run(model, q, k, v, attn_bias=attn_bias, mode="fused")
    assert how == "probe: xformers keeps its own output (xformers memory_efficient_attention)"
    if None not in shape.get("window", ()):
        check(got, [(q[b], k[b]) for b in range(2)], **shape)
    else:
        seen = (torch.arange(sizes[0]) + 1).expand(2, 4, -1)
        assert torch.equal(got.visible_keys.expand(2, 4, -1), seen)
    again, how = run(Call("xformers.ops", name), q, k, v, attn_bias)
    assert how == f"probe (xformers {name}), its lse agrees"
    torch.testing.assert_close(again.rows.lse, got.rows.lse)


@slow
@pytest.mark.parametrize("kind", ["", "Causal", "CausalFromBottomRight", "CausalLocalAttention"])
def test_packs_of_xformers(monkeypatch, kind):
    standins.put_in_place(
        monkeypatch, "xformers.ops", memory_efficient_attention=standins.memory_efficient_attention
    )
    of_q, of_k = standins.SeqLenInfo.from_starts(Q), standins.SeqLenInfo.from_starts(K)
    cls, local = getattr(standins, f"BlockDiagonal{kind}Mask"), {"_window_size": 3} if "Local" in kind else {}
    shape = {"causal": "Causal" in kind} | ({"window": (2, 0)} if local else {})
    model = Call("xformers.ops", "memory_efficient_attention")
    q, k = draw(1, 20, 4, 8), draw(1, 20, 4, 8)
    got, _ = run(model, q, k, k, cls(of_q, of_q, **local))
    check(got, sequences(q[0], k[0], Q, Q), **shape)
    if kind in ("", "CausalFromBottomRight"):
        k = draw(1, 29, 4, 8)
        got, _ = run(model, q, k, k, cls(of_q, of_k))
        check(got, sequences(q[0], k[0], Q, K), **shape)


@slow
def test_layouts_of_xformers_and_what_it_cannot_describe(monkeypatch):
    standins.put_in_place(
        monkeypatch, "mslk.attention.fmha", memory_efficient_attention=standins.memory_efficient_attention
    )
    model = Call("mslk.attention.fmha", "memory_efficient_attention")
    q, k = draw(2, 9, 2, 3, 8), draw(2, 9, 2, 1, 8).expand(2, 9, 2, 3, 8)
    got, _ = run(model, q, k, k)
    check(got, [(q[b].flatten(1, 2), k[b, :, :, 0]) for b in range(2)])
    q, bias = draw(2, 9, 8), draw(2, 9, 9)
    got, _ = run(model, q, q, q, bias)
    scores = q.double() @ q.double().transpose(1, 2) * 8**-0.5 + bias
    torch.testing.assert_close(got.rows.lse[:, 0].double(), scores.logsumexp(-1), rtol=1e-5, atol=1e-5)
    with instrument(model) as handle:
        model(q, q, q, standins.PagedBlockDiagonalPaddedKeysMask())
    assert "keys in pages" in handle.coverage.not_measured[""]


@pytest.fixture
def engine(monkeypatch):
    standins.put_in_place(
        monkeypatch, "transformer_engine.pytorch", DotProductAttention=standins.DotProductAttention
    )
    return standins.DotProductAttention


class Layer(nn.Module):
    def __init__(self, core):
        super().__init__()
        self.core_attention = core

    def forward(self, *args, **kwargs):
        return self.core_attention(*args, **kwargs)


ENGINE_CASES = [
    ("causal", (3, 0), 9),
    *(
        pytest.param(*case, marks=slow)
        for case in (
            ("causal", None, 9),
            ("no_mask", None, 13),
            ("causal_bottom_right", None, 13),
            ("causal", None, 13),
        )
    ),
]


@pytest.mark.parametrize("layout", [pytest.param("sbhd", marks=slow), "bshd"])
@pytest.mark.parametrize("kind, window, num_keys", ENGINE_CASES)
def test_transformer_engine(engine, kind, window, num_keys, layout):
    forward = engine.forward
    q, k, v = draw(2, 9, 4, 8), draw(2, num_keys, 2, 8), draw(2, num_keys, 2, 8)
    model = Layer(engine(4, 8, layout, kind, window, return_max_logit=True))
    tensors = [x.transpose(0, 1) if layout == "sbhd" else x for x in (q, k, v)]
    got, how = run(model, *tensors)
    assert how == "probe (Transformer Engine), its largest score agrees" and engine.forward is forward
    if kind == "causal" and num_keys > 9:  # top left
        assert torch.equal(got.visible_keys.expand(2, 4, 9)[1, 3], torch.arange(9) + 1)
    else:
        check(got, [(q[b], k[b]) for b in range(2)], causal="causal" in kind, window=window or (-1, -1))


@slow
def test_packs_and_masks_of_transformer_engine(engine):
    q, k = draw(20, 4, 8), draw(20, 2, 8)
    model = Layer(engine(4, 8, "thd", "padding_causal"))
    got, _ = run(model, q, k, k, cu_seqlens_q=Q.int(), cu_seqlens_kv=Q.int(), max_seqlen_q=8, max_seqlen_kv=8)
    check(got, sequences(q, k, Q, Q), causal=True)
    q, k, hidden = draw(2, 9, 4, 8), draw(2, 9, 2, 8), torch.arange(9) >= torch.tensor([[9], [6]])
    model = Layer(engine(4, 8, "bshd", "padding_causal"))
    got, _ = run(model, q, k, k, attention_mask=hidden[:, None, None])
    causal, keys = torch.ones(9, 9, dtype=torch.bool).triu(1), k.repeat_interleave(2, 2).double()
    scores = torch.einsum("bmhd,bnhd->bhmn", q.double(), keys) * 8**-0.5
    lse = scores.masked_fill(causal | hidden[:, None, None], -torch.inf).logsumexp(-1)
    for b, n in enumerate((9, 6)):
        torch.testing.assert_close(got.rows.lse[b, :, :n].double(), lse[b, :, :n], rtol=1e-5, atol=1e-5)
        assert (got.rows.lse[b, :, n:] == -torch.inf).all()  # padding is no row
    mask, bias = torch.rand(2, 1, 9, 9) > 0.7, draw(1, 4, 9, 9)
    mask[..., 0] = False
    for kind, options in (
        ("arbitrary", {"attention_mask": mask}),
        ("no_mask", {"core_attention_bias": bias}),
    ):
        given = options | (
            {"core_attention_bias_type": "post_scale_bias"} if "core_attention_bias" in options else {}
        )
        got, _ = run(Layer(engine(4, 8, "bshd", kind)), q, k, k, **given)
        scores = torch.einsum("bmhd,bnhd->bhmn", q.double(), k.repeat_interleave(2, 2).double()) * 8**-0.5
        scores = scores.masked_fill(mask, -torch.inf) if kind == "arbitrary" else scores + bias
        torch.testing.assert_close(got.rows.lse.double(), scores.logsumexp(-1), rtol=1e-5, atol=1e-5)


def test_another_largest_score_than_that_of_the_description(engine):
    core = engine(4, 8, "bshd", "causal", return_max_logit=True)
    core.error, model = 0.3, Layer(core)
    with instrument(model) as handle:
        model(*(draw(2, 9, 4, 8) for _ in range(3)))
    assert "the largest score that it returns is not that" in handle.coverage.not_measured["core_attention"]


@slow
def test_what_is_not_described_is_listed(engine):
    core, tensors = engine(4, 8, "bshd", "causal"), [draw(2, 9, 4, 8) for _ in range(3)]
    model = Layer(core)
    with instrument(model) as handle:
        model(*tensors, inference_params=object())
        assert "its argument inference_params is not" in handle.coverage.not_measured["core_attention"]
        core.cp_group = [None, None]
        model(*tensors)
        assert "context parallelism" in handle.coverage.not_measured["core_attention"]
    core.cp_group, core.unfused_attention = None, None
    with instrument(model) as handle:
        model.core_attention.forward = lambda *x: x[0]  # a kernel past its forward
        model(*tensors)
    assert "core_attention" in handle.coverage.not_measured


MEGATRON_CASES = [
    ("causal", None, None),
    pytest.param("causal", (3, 0), 2, marks=slow),
    pytest.param("padding", None, None, marks=slow),
]


@pytest.mark.parametrize("kind, window, scaling", MEGATRON_CASES)
def test_megatron(monkeypatch, kind, window, scaling):
    cls = type("DotProductAttention", (standins.MegatronAttention,), {})
    standins.put_in_place(
        monkeypatch, "megatron.core.transformer.dot_product_attention", DotProductAttention=cls
    )
    q, k, v = draw(9, 2, 4, 8), draw(9, 2, 2, 8), draw(9, 2, 2, 8)
    hidden = (torch.arange(9) >= 6).expand(2, 1, 9, 9) if kind == "padding" else None
    got, how = run(Layer(cls(8, kind, window, scaling)), q, k, v, hidden)
    assert how == "probe (Megatron-Core)" and "forward" not in vars(cls)
    count = 9 if hidden is None else 6
    check(
        got, [(q[:, b], k[:count, b]) for b in range(2)], causal=kind == "causal", window=window or (-1, -1)
    )
