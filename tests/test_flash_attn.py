"""FlashAttention 2, 3 and 4: each function of theirs is measured, beside stand-ins that have their signatures.

The package itself needs a card. `test_the_package_itself` runs beside it where it is installed.
"""

import importlib.util
import sys

import flash_standins
import pytest
import torch
from flash_standins import STATISTICS, scores_of, statistics_of
from torch import nn

from hnf_attention import instrument
from hnf_attention.instrumentation import positions

slow, exhaustive = pytest.mark.slow, pytest.mark.exhaustive
G = torch.Generator().manual_seed(0)
SLOPES = torch.rand(4, generator=G)
SINKS = torch.randn(4, generator=G)
Q, K = torch.tensor([0, 5, 5, 12, 20]), torch.tensor([0, 7, 9, 13, 29])  # the second sequence has no query


def draw(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=G).to(dtype)


class Caller(nn.Module):
    """Calls a function that it looks up, as a model's file does."""

    def __init__(self, library, function):
        super().__init__()
        self.library, self.function = library, function

    def forward(self, *args, **kwargs):
        return getattr(sys.modules[self.library], self.function)(*args, **kwargs)


@pytest.fixture(autouse=True)
def libraries(monkeypatch):
    return flash_standins.put_in_place(monkeypatch)


def first(result):
    return result[0] if isinstance(result, tuple) else result


def wanted(sequences, sink=None, slopes=None, scale=None, **shape):
    """The statistics (H, all queries) of sequences (q, k), fp64, by name."""
    parts = []
    for q, k in sequences:
        scores, seen = scores_of(q, k, scale or q.shape[-1] ** -0.5, slopes=slopes, **shape)
        parts.append(statistics_of(scores, seen, sink))
    return {name: torch.cat([part[name] for part in parts], 1) for name in STATISTICS}


def check(measurement, sequences, tolerance=1e-5, **shape):
    """Compare the rows of a measurement, by sequence, with `wanted`."""
    lengths = [q.shape[0] for q, _ in sequences]
    for name, expected in wanted(sequences, **shape).items():
        rows = getattr(measurement.rows, name)
        if rows.shape[0] == 1:
            got = rows[0]
        else:
            assert rows.shape[0] == len(lengths)
            got = torch.cat([row[:, :n] for row, n in zip(rows, lengths)], 1)
        torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance, msg=name)


def measured(library, function, args, kwargs, mode="probe", same=torch.equal):
    """The one measurement of a call, which returns what it returns without us."""
    model = Caller(library, function)
    plain = model(*args, **kwargs)
    with instrument(model, mode, strict=True) as handle:
        result = model(*args, **kwargs)
    assert type(result) is type(plain) and same(first(result), first(plain))
    return handle.latest[""], handle.coverage.measured[""]


SHAPES = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"causal": True, "window_size": (3, 0)},
    "two sides": {"window_size": (2, 4)},
    "one side": {"window_size": (3, -1)},
    "soft-cap": {"causal": True, "softcap": 0.7, "softmax_scale": 0.9},
    "ALiBi": {"causal": True, "alibi_slopes": SLOPES},
    "ALiBi of each": {"window_size": (4, 1), "alibi_slopes": torch.rand(2, 4, generator=G)},
}


def words(options):
    """Options of the package as those of `wanted`."""
    names = {
        "window_size": "window",
        "softmax_scale": "scale",
        "alibi_slopes": "slopes",
        "learnable_sink": "sink",
    }
    return {names.get(name, name): value for name, value in options.items()}


@slow
@pytest.mark.parametrize("mode", ["probe", "fused"])
@pytest.mark.parametrize(
    "sizes", [(13, 13), (5, 13), *(pytest.param(x, marks=exhaustive) for x in ((13, 5), (1, 13)))], ids=str
)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_batch(shape, sizes, mode, monkeypatch):
    options, (num_queries, num_keys) = SHAPES[shape], sizes
    q, k, v = draw(2, num_queries, 4, 8), draw(2, num_keys, 2, 8), draw(2, num_keys, 2, 8)
    same = torch.equal if mode == "probe" else lambda a, b: torch.allclose(a, b, rtol=1e-4, atol=1e-5)
    got, how = measured("flash_attn", "flash_attn_func", (q, k, v), options, mode, same)
    assert how == f"{mode} (flash_attn.flash_attn_func)"
    each = options.get("alibi_slopes", SLOPES).expand(2, -1)
    for b in range(2):
        one = words(options) | ({"slopes": each[b]} if "alibi_slopes" in options else {})
        for name, expected in wanted([(q[b], k[b])], **one).items():
            torch.testing.assert_close(getattr(got.rows, name)[b].double(), expected, rtol=1e-5, atol=1e-5)
    if mode == "probe":
        monkeypatch.setattr(positions, "MASK_BYTES", 0)  # larger masks are evaluated by rows
        again, _ = measured("flash_attn", "flash_attn_func", (q, k, v), options)
        for name in STATISTICS:
            torch.testing.assert_close(getattr(again.rows, name), getattr(got.rows, name))


@slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    q, k, v = draw(2, 9, 4, 8, dtype=dtype), draw(2, 9, 2, 8, dtype=dtype), draw(2, 9, 2, 8, dtype=dtype)
    options = {"causal": True, "return_attn_probs": True}
    model = Caller("flash_attn", "flash_attn_func")
    plain = model(q, k, v, **options)[0]
    with instrument(model, "fused") as handle:
        model.register_forward_pre_hook(lambda *_: torch.set_autocast_enabled("cpu", True))
        model.register_forward_hook(lambda *_: torch.set_autocast_enabled("cpu", False))
        assert torch.equal(model(q, k, v, **options)[0], plain)
    got, how = handle.latest[""], handle.coverage.measured[""]
    assert got.dtype is dtype
    assert how == "probe: its lse is asked for (flash_attn.flash_attn_func), its lse agrees"
    check(got, [(q[b], k[b]) for b in range(2)], 1e-3, causal=True)


PACKED = {
    ("flash_attn", "flash_attn_varlen_func"): lambda q, k, v, s, n: ((q, k, v, s, s.clone(), n, n), {}),
    ("flash_attn", "flash_attn_varlen_kvpacked_func"): lambda q, k, v, s, n: (
        (q, torch.stack((k, v), 1), s, s, n, n),
        {},
    ),
    ("flash_attn_interface", "flash_attn_varlen_func"): lambda q, k, v, s, n: ((q, k, v, s, s, n, n), {}),
    ("flash_attn.cute", "flash_attn_varlen_func"): lambda q, k, v, s, n: (
        (q, k, v),
        {"cu_seqlens_q": s, "cu_seqlens_k": s},
    ),
}
REGULAR = ("flash_attn", "flash_attn_varlen_func"), ("flash_attn.cute", "flash_attn_varlen_func")
FUNCTIONS = [pytest.param(x, marks=[exhaustive] * (x not in REGULAR)) for x in PACKED]
PACK_SHAPES = {name: SHAPES[name] for name in ("plain", "causal", "window", "two sides", "soft-cap")}


@slow
@pytest.mark.parametrize("mode", ["probe", "fused"])
@pytest.mark.parametrize("shape", PACK_SHAPES)
@pytest.mark.parametrize("function", FUNCTIONS, ids=str)
def test_a_pack(function, shape, mode):
    q, k, v = draw(20, 4, 8), draw(20, 2, 8), draw(20, 2, 8)
    args, kwargs = PACKED[function](q, k, v, Q.int(), 8)
    same = torch.equal if mode == "probe" else lambda a, b: torch.allclose(a, b, rtol=1e-4, atol=1e-5)
    got, how = measured(*function, args, kwargs | PACK_SHAPES[shape], mode, same)
    assert how.startswith(f"{mode} ({'.'.join(function)})")
    borders = list(zip(Q.tolist(), Q[1:].tolist()))
    check(got, [(q[a:b], k[a:b]) for a, b in borders], **words(PACK_SHAPES[shape]))
    if not {"window_size"} & set(PACK_SHAPES[shape]):  # no key of another sequence
        lengths = torch.cat([torch.full((b - a,), b - a) for a, b in borders])
        place = torch.cat([torch.arange(b - a) + 1 for a, b in borders])
        visible = place if "causal" in PACK_SHAPES[shape] else lengths
        assert torch.equal(got.visible_keys.expand(1, 4, 20)[0, 0], visible)


@slow
@pytest.mark.parametrize("shape", [*PACK_SHAPES, "ALiBi"])
@pytest.mark.parametrize("function", [x for x in FUNCTIONS if "kv" not in x.values[0][1]], ids=str)
def test_sequences_with_more_keys_than_queries(function, shape):
    if shape == "ALiBi" and function[0] != "flash_attn":
        pytest.skip("this version has no ALiBi")
    q, k, v = draw(20, 4, 8), draw(29, 2, 8), draw(29, 2, 8)
    (*_, most), kwargs = PACKED[function](q, k, v, Q.int(), 8)
    args = (q, k, v, Q.int(), K.int(), 8, 16)
    if function[0] == "flash_attn.cute":
        args, kwargs = (q, k, v), {"cu_seqlens_q": Q.int(), "cu_seqlens_k": K.int(), "return_lse": True}
    options = SHAPES[shape]
    got, how = measured(*function, args, kwargs | options, "fused")
    reason = "its lse is asked for" if "return_lse" in kwargs else "its queries and keys lie in sequences"
    assert reason in how and how.endswith("lse agrees") == ("return_lse" in kwargs)
    sequences = zip(*(list(zip(x.tolist(), x[1:].tolist())) for x in (Q, K)))
    check(got, [(q[a:b], k[c:d]) for (a, b), (c, d) in sequences], **words(options))
    borders = list(zip(K.tolist(), K[1:].tolist()))
    borders[1] = (0, 0)  # no query sees its keys
    norms = [k[c:d].square().sum((0, 2)).sqrt() for c, d in borders]
    if "window_size" not in options:
        torch.testing.assert_close(got.key_norm[:, ::2], torch.stack(norms))  # nothing but its own tokens
    assert got.rows.lse.shape == (4, 4, 8)


@slow
def test_packed_tensors_of_a_batch():
    q, k, v = (draw(2, 9, 4, 8) for _ in range(3))
    few, pack, borders = (
        draw(2, 9, 2, 8),
        torch.stack((q, k, v), 2).flatten(0, 1),
        torch.tensor([0, 6, 6, 18]),
    )
    calls = [
        ("flash_attn", "flash_attn_qkvpacked_func", (torch.stack((q, k, v), 2),), {}, k),
        ("flash_attn", "flash_attn_kvpacked_func", (q, torch.stack((few, few), 2)), {}, few),
        ("flash_attn_interface", "flash_attn_qkvpacked_func", (torch.stack((q, k, v), 2),), {}, k),
        ("flash_attn_interface", "flash_attn_qkvpacked_func", (torch.cat((q, few, few), 2),), {"num_heads_q": 4}, few),
        ("flash_attn", "flash_attn_varlen_qkvpacked_func", (pack, borders, 18), {}, None),
    ]  # fmt: skip
    for library, function, args, kwargs, keys in calls:
        got, how = measured(library, function, args, kwargs | {"causal": True})
        assert how == f"probe ({library}.{function})"
        if keys is not None:
            check(got, [(q[b], keys[b]) for b in range(2)], causal=True)
        else:
            flat = q.flatten(0, 1), k.flatten(0, 1)
            edges = borders.tolist()
            check(got, [tuple(x[a:b] for x in flat) for a, b in zip(edges, edges[1:])], causal=True)


@slow
def test_a_cache_with_new_keys_and_lengths():
    q, cache, k = draw(2, 3, 4, 8), draw(3, 16, 2, 8), draw(2, 3, 2, 8)
    values, v = draw(3, 16, 2, 8), draw(2, 3, 2, 8)
    lengths, rows = torch.tensor([4, 9], dtype=torch.int32), torch.tensor([2, 0], dtype=torch.int32)
    for library in ("flash_attn", "flash_attn_interface"):
        mine = cache.clone(), values.clone()
        options = {
            "cache_seqlens": lengths,
            "cache_batch_idx": rows,
            "causal": True,
            "return_softmax_lse": True,
        }
        got, how = measured(library, "flash_attn_with_kvcache", (q, *mine, k, v), options, "fused")
        assert how.endswith("lse agrees") and "its lse is asked for" in how
        filled = [torch.cat((cache[row][:n], k[b])) for b, (row, n) in enumerate(zip(rows, lengths))]
        check(got, [(q[b], filled[b]) for b in range(2)], causal=True)
        assert torch.equal(mine[0][2][4:7], k[0])
        keys = torch.cat((cache[2][:4], k[0])).square().sum((0, 2)).sqrt()
        torch.testing.assert_close(got.key_norm[0, ::2], keys)


@slow
def test_a_cache_in_pages_and_one_with_its_beginning_left_out():
    q, pages, values = draw(2, 1, 4, 8), draw(6, 4, 2, 8), draw(6, 4, 2, 8)
    table, lengths = (
        torch.tensor([[5, 1, 3], [2, 0, -1]], dtype=torch.int32),
        torch.tensor([10, 6], dtype=torch.int32),
    )
    options = {"cache_seqlens": lengths, "block_table": table, "causal": True}
    got, _ = measured("flash_attn", "flash_attn_with_kvcache", (q, pages, values), options)
    check(got, [(q[b], pages[table[b].long()].flatten(0, 1)[: lengths[b]]) for b in range(2)], causal=True)
    cache, left = draw(2, 10, 2, 8), torch.tensor([3, 0], dtype=torch.int32)
    options = {"cache_leftpad": left, "cache_seqlens": 8}
    got, how = measured("flash_attn", "flash_attn_with_kvcache", (q, cache, cache), options, "fused")
    assert "it writes to its cache" in how
    check(got, [(q[b], cache[b][left[b] : 8]) for b in range(2)])


@slow
@pytest.mark.parametrize("shape", ["causal", "window"])
def test_sinks_and_the_lse_that_training_returns(shape):
    q, k, v = draw(2, 9, 4, 8).requires_grad_(), draw(2, 11, 2, 8), draw(2, 11, 2, 8)
    options = SHAPES[shape] | {"learnable_sink": SINKS}
    got, how = measured("flash_attn.cute", "flash_attn_func", (q, k, v), options)
    assert how == "probe (flash_attn.cute.flash_attn_func), its lse agrees"
    check(got, [(q[b].detach(), k[b]) for b in range(2)], **words(options))


@slow
def test_queries_in_two_parts_and_keys_that_do_not_all_count():
    q, k, v, qv = draw(2, 9, 4, 8), draw(2, 9, 4, 8), draw(2, 9, 4, 6), draw(2, 9, 4, 6)
    got, _ = measured("flash_attn_interface", "flash_attn_func", (q, k, v), {"qv": qv, "causal": True})
    both = torch.cat((q, qv), -1), torch.cat((k, v), -1)
    check(got, [tuple(x[b] for x in both) for b in range(2)], causal=True)
    q, k, v, used = draw(20, 4, 8), draw(29, 2, 8), draw(29, 2, 8), torch.tensor([7, 1, 3, 12])
    args = (q, k, v, Q.int(), K.int(), 8, 16, None, used)
    got, _ = measured(
        "flash_attn_interface", "flash_attn_varlen_func", args, {"causal": True, "return_attn_probs": True}
    )
    borders = zip(Q.tolist(), Q[1:].tolist(), K.tolist(), used.tolist())
    check(got, [(q[a:b], k[c : c + n]) for a, b, c, n in borders], causal=True)


@slow
@pytest.mark.parametrize("mode", ["probe", "fused"])
@pytest.mark.parametrize("pack", [False, True])
def test_gradients(pack, mode):
    q, k, v = (
        draw(20, 4, 8).requires_grad_(),
        draw(20, 2, 8).requires_grad_(),
        draw(20, 2, 8).requires_grad_(),
    )
    name, args = "flash_attn_varlen_func", (Q.int(), Q.int(), 8, 8)
    tensors = (q, k, v)
    if not pack:
        name, args, tensors = "flash_attn_func", (), tuple(x[None] for x in (q, k, v))
    model = Caller("flash_attn", name)
    cotangent = draw(*tensors[0].shape)

    def gradients():
        return torch.autograd.grad(model(*tensors, *args, causal=True), (q, k, v), cotangent)

    plain = gradients()
    with instrument(model, mode, strict=True):
        ours = gradients()
    for mine, theirs in zip(ours, plain):
        assert (
            torch.equal(mine, theirs)
            if mode == "probe"
            else torch.allclose(mine, theirs, rtol=1e-4, atol=1e-5)
        )


def test_one_of_each_layout():
    q, k, v = draw(20, 4, 8), draw(20, 2, 8), draw(20, 2, 8)
    options, borders = {"causal": True, "window_size": (3, 0)}, list(zip(Q.tolist(), Q[1:].tolist()))
    got, _ = measured("flash_attn", "flash_attn_varlen_func", (q, k, v, Q.int(), Q.int(), 8, 8), options)
    check(got, [(q[a:b], k[a:b]) for a, b in borders], **words(options))
    args = (q[:12].view(2, 6, 4, 8), k.view(2, 10, 2, 8), v.view(2, 10, 2, 8))
    got, _ = measured("flash_attn_interface", "flash_attn_func", args, options)
    check(got, [(args[0][b], args[1][b]) for b in range(2)], **words(options))


def test_every_step_keeps_packs():
    q, k, starts = draw(20, 4, 8).requires_grad_(), draw(20, 2, 8), Q.int()
    model, kept = Caller("flash_attn", "flash_attn_varlen_func"), []
    with instrument(model) as handle:
        handle.keeping, handle.on_kept = True, kept.append
        model(q, k, k, starts, starts, 8, 8, causal=True)
        ((call,), (tensors,)) = kept[0].calls, kept[0].tensors
        assert call.options.seqlens is starts and call.options.is_causal
        assert [tuple(x.shape) for x in tensors] == [
            (1, 4, 20, 8),
            (1, 2, 20, 8),
            (1, 2, 20, 8),
            (1, 4, 20, 8),
        ]
    assert len(kept) == 1


APART = ("flash_attn_varlen_func", (draw(20, 4, 8), *[draw(29, 2, 8)] * 2, Q.int(), K.int(), 8, 16), {})
COPIES = {
    "its sequences lie apart in memory": APART,
    "its mask is written out for each call": (
        "flash_attn_func",
        [draw(2, 9, 4, 8) for _ in "qkv"],
        {"alibi_slopes": SLOPES},
    ),
    "its argument qv lengthens queries and keys": (
        "flash_attn_func",
        [draw(2, 9, 4, 8), draw(2, 9, 4, 8), draw(2, 9, 4, 6)],
        {"qv": draw(2, 9, 4, 6)},
    ),
}


@pytest.mark.parametrize("reason", COPIES)
def test_every_step_leaves_copies_and_says_why(reason):
    function, args, options = COPIES[reason]
    model = Caller("flash_attn_interface" if "qv" in options else "flash_attn", function)
    with instrument(model) as handle:
        handle.keeping, handle.on_kept = True, pytest.fail
        model(*args, **options)
        assert f"extremes at measured steps only: {reason}" in handle.coverage.measured[""]


@pytest.mark.gpu
@pytest.mark.skipif(
    importlib.util.find_spec("flash_attn") is None, reason="the package flash_attn is not installed"
)
@pytest.mark.parametrize("shape", [x for x in SHAPES if x != "ALiBi of each"])
def test_the_package_itself(shape, monkeypatch):
    for name in ("flash_attn", "flash_attn_interface", "flash_attn.cute"):
        monkeypatch.delitem(sys.modules, name)
    import flash_attn  # noqa: F401

    options = {name: x.cuda() if isinstance(x, torch.Tensor) else x for name, x in SHAPES[shape].items()}
    q, k, v = (draw(2, n, h, 64, dtype=torch.bfloat16).cuda() for n, h in ((77, 4), (133, 2), (133, 2)))
    got, how = measured("flash_attn", "flash_attn_func", (q, k, v), options | {"return_attn_probs": True})
    assert how.endswith("its lse agrees")
    cpu = {name: x.cpu() if isinstance(x, torch.Tensor) else x for name, x in words(options).items()}
    sequences = [(q[b].cpu(), k[b].cpu()) for b in range(2)]
    for name, expected in wanted(sequences[:1], **cpu).items():
        torch.testing.assert_close(getattr(got.rows, name)[0].cpu().double(), expected, rtol=1e-3, atol=1e-3)
