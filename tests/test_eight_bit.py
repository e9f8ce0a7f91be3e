"""8-bit queries and keys with their scales: what `attention_stats` and a monitored FlashAttention 3 make of them."""

import flash_standins
import pytest
import torch
from flash_standins import STATISTICS, scores_of, statistics_of
from test_flash_attn import Caller, first

from hnf_attention import attention, attention_stats, instrument

FORMATS = (torch.float8_e4m3fn, torch.float8_e5m2)
G = torch.Generator().manual_seed(0)


def draw(*shape, dtype=torch.float8_e4m3fn, spread=4.0):
    return (spread * torch.randn(*shape, generator=G)).to(dtype)


def descale(*shape):
    return 0.05 + 0.2 * torch.rand(*shape, generator=G)


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("sample", [None, (2, 1)])
def test_without_scales_they_are_those_of_the_same_numbers(dtype, sample):
    q, k = draw(2, 4, 150, 16, dtype=dtype), draw(2, 2, 150, 16, dtype=dtype)
    got = attention_stats(q, k, is_causal=True, sample=sample)
    wanted = attention_stats(q.bfloat16(), k.bfloat16(), is_causal=True, sample=sample)
    for name in STATISTICS:
        assert torch.equal(getattr(got, name), getattr(wanted, name))


@pytest.mark.parametrize("which", ["both", "query", "key"])
def test_scales_of_heads(which):
    q, k = draw(2, 4, 9, 16), draw(2, 2, 13, 16)
    scales = {f"{x}_descale": descale(2, 2) for x in ("query", "key") if which in (x, "both")}
    got = attention_stats(q, k, scale=0.3, **scales)
    for b in range(2):
        of_query = scales.get("query_descale", torch.ones(2, 2))[b].repeat_interleave(2)
        of_key = scales.get("key_descale", torch.ones(2, 2))[b]
        queries, keys = q[b].double() * of_query[:, None, None], k[b].double() * of_key[:, None, None]
        wanted = statistics_of(*scores_of(queries.transpose(0, 1), keys.transpose(0, 1), 0.3))
        for name in STATISTICS:
            torch.testing.assert_close(getattr(got, name)[b].double(), wanted[name], rtol=1e-5, atol=1e-5)


def test_scales_of_packed_sequences():
    lengths, scales = (5, 0, 8), {"query_descale": descale(3, 2), "key_descale": descale(3, 2)}
    q, k = draw(1, 4, 15, 16), draw(1, 2, 15, 16)
    got = attention_stats(q, k, is_causal=True, seqlens=torch.tensor([0, 5, 5, 13]), **scales)
    start = 0
    for sequence, length in enumerate(lengths):
        part = slice(start, start + length)
        of_one = {name: x[sequence : sequence + 1] for name, x in scales.items()}
        wanted = attention_stats(q[:, :, part], k[:, :, part], is_causal=True, **of_one)
        for name in STATISTICS:
            torch.testing.assert_close(getattr(got, name)[:, :, part], getattr(wanted, name))
        start += length
    assert (got.lse[:, :, 13:] == -torch.inf).all()


def test_refuses():
    q, k = draw(2, 4, 9, 16), draw(2, 2, 13, 16)
    for scales, error, words in (
        (
            {"key_descale": torch.ones(2)},
            ValueError,
            r"key_descale of shape \(batch, key heads\) = \(2, 2\), got \(2,\)",
        ),
        ({"query_descale": torch.ones(2, 4)}, ValueError, r"query_descale of shape .* got \(2, 4\)"),
        ({"key_descale": torch.ones(2, 2, dtype=torch.int32)}, TypeError, "key_descale of a floating dtype"),
        ({"key_descale": 0.5}, TypeError, "key_descale to be a torch.Tensor or None, got float"),
        ({"key_descale": torch.ones(2, 2, device="meta")}, ValueError, "on the key's device cpu, got meta"),
    ):
        with pytest.raises(error, match=words):
            attention_stats(q, k, **scales)
    with pytest.raises(
        TypeError, match="query_descale beside 8-bit queries and keys only, got torch.float32"
    ):
        attention_stats(q.float(), k.float(), query_descale=torch.ones(2, 2))
    with pytest.raises(ValueError, match="heads"):
        attention_stats(q[:, :3], k, key_descale=torch.ones(2, 2))
    with pytest.raises((TypeError, ValueError), match="float8"):
        attention(q, k, k)
    with pytest.raises((TypeError, ValueError), match="float8|dtype"):
        attention_stats(q, k.float())


CALLS = {
    "batch": (
        "flash_attn_func",
        lambda: (draw(2, 9, 4, 8), draw(2, 13, 2, 8), draw(2, 13, 2, 8)),
        {"causal": True},
        2,
    ),
    "pack": (
        "flash_attn_varlen_func",
        lambda: (draw(20, 4, 8), draw(20, 2, 8), draw(20, 2, 8)),
        {
            "cu_seqlens_q": torch.tensor([0, 7, 20]),
            "cu_seqlens_k": torch.tensor([0, 7, 20]),
            "max_seqlen_q": 13,
            "max_seqlen_k": 13,
            "causal": True,
        },
        2,
    ),
    "apart": (
        "flash_attn_varlen_func",
        lambda: (draw(12, 4, 8), draw(20, 2, 8), draw(20, 2, 8)),
        {
            "cu_seqlens_q": torch.tensor([0, 5, 12]),
            "cu_seqlens_k": torch.tensor([0, 7, 20]),
            "max_seqlen_q": 7,
            "max_seqlen_k": 13,
        },
        2,
    ),
}


@pytest.mark.parametrize("scales", [(), ("q",), ("q", "k", "v")], ids=str)
@pytest.mark.parametrize("kind", CALLS)
def test_a_call_of_flash_attention_3(kind, scales, monkeypatch):
    flash_standins.put_in_place(monkeypatch)
    function, make, options, sequences = CALLS[kind]
    tensors = make()
    given = options | {f"{x}_descale": descale(sequences, 2) for x in scales} | {"return_attn_probs": True}
    model = Caller("flash_attn_interface", function)
    plain, lse = model(*tensors, **given)
    with instrument(model, strict=True) as handle:
        assert torch.equal(first(model(*tensors, **given)), plain)
    found = handle.latest[""]
    assert (
        handle.coverage.measured[""].startswith("probe") and "its lse agrees" in handle.coverage.measured[""]
    )
    assert found.dtype is torch.float8_e4m3fn
    rows = found.rows.lse
    if kind == "apart":
        rows = torch.cat([rows[b, :, :n] for b, n in enumerate((5, 7))], 1)
    torch.testing.assert_close(rows.reshape(lse.shape), lse, rtol=1e-5, atol=1e-5)


def test_what_cannot_be_measured_is_listed(monkeypatch):
    flash_standins.put_in_place(monkeypatch)
    model, q, k = Caller("flash_attn_interface", "flash_attn_func"), draw(2, 9, 4, 8), draw(2, 9, 2, 8)
    with instrument(model) as handle:
        monkeypatch.setattr(flash_standins, "compute", lambda given: (q.bfloat16(), torch.zeros(2, 4, 9)))
        model(q, k, k.clone(), qv=torch.ones(2, 9, 4, 8))
        assert "its argument qv comes with 8-bit queries" in handle.coverage.not_measured[""]


def test_scales_beside_other_dtypes_have_no_meaning(monkeypatch):
    """The package does not look at them then."""
    flash_standins.put_in_place(monkeypatch)
    model, q, k = (
        Caller("flash_attn_interface", "flash_attn_func"),
        torch.randn(2, 9, 4, 8),
        torch.randn(2, 9, 2, 8),
    )
    with instrument(model, strict=True) as handle:
        model(q, k, k.clone(), q_descale=torch.full((2, 2), 3.0))
    assert torch.equal(handle.latest[""].rows.lse, attention_stats(q.transpose(1, 2), k.transpose(1, 2)).lse)
