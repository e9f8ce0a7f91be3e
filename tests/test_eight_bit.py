"""8-bit queries and keys with their scales: what `attention_stats` makes of them."""

import re

import pytest
import torch
from flash_standins import STATISTICS, scores_of, statistics_of

from hnf_attention import attention, attention_stats

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
@pytest.mark.parametrize("precision", [torch.float32, torch.float64, torch.bfloat16])
def test_scales_of_heads(which, precision):
    q, k = draw(2, 4, 9, 16), draw(2, 2, 13, 16)
    scales = {f"{x}_descale": descale(2, 2).to(precision) for x in ("query", "key") if which in (x, "both")}
    with torch.autocast("cpu", torch.bfloat16):
        got = attention_stats(q, k, scale=0.3, **scales)
    for b in range(2):
        of_query = scales.get("query_descale", torch.ones(2, 2))[b].double().repeat_interleave(2)
        of_key = scales.get("key_descale", torch.ones(2, 2))[b].double()
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


def test_no_sequence_and_no_head():
    q, k, none = draw(1, 4, 9, 16), draw(1, 2, 9, 16), torch.tensor([0])
    assert (attention_stats(q, k, seqlens=none, key_descale=torch.ones(0, 2)).lse == -torch.inf).all()
    q, k = draw(1, 0, 9, 16), draw(1, 0, 9, 16)
    assert attention_stats(q, k, key_descale=torch.ones(1, 0)).lse.shape == (1, 0, 9)


def test_an_additive_mask_of_another_dtype():
    q, k, mask = draw(1, 2, 9, 16), draw(1, 2, 9, 16), torch.randn(9, 9, generator=G).bfloat16()
    got = attention_stats(q, k, attn_mask=mask, query_descale=torch.full((1, 2), 0.25))
    wanted = attention_stats(q.float() * 0.25, k.float(), attn_mask=mask.float())
    torch.testing.assert_close(got.lse, wanted.lse)


SHAPE = r"of shape \(batch, key heads\) = \(2, 2\), got "
REFUSED = [
    ({"key_descale": torch.ones(2)}, ValueError, "key_descale " + SHAPE + r"\(2,\)"),
    ({"query_descale": torch.ones(2, 4)}, ValueError, "query_descale " + SHAPE + r"\(2, 4\)"),
    ({"key_descale": torch.ones(2, 2, dtype=torch.int32)}, TypeError, "key_descale of a floating dtype"),
    ({"key_descale": 0.5}, TypeError, "key_descale to be a torch.Tensor or None, got float"),
    ({"key_descale": torch.ones(2, 2, device="meta")}, ValueError, "on the key's device cpu, got meta"),
]


@pytest.mark.parametrize("scales, error, words", REFUSED)
def test_refuses_scales_that_do_not_fit(scales, error, words):
    with pytest.raises(error, match=words):
        attention_stats(draw(2, 4, 9, 16), draw(2, 2, 13, 16), **scales)


def test_refuses_other_dtypes():
    q, k = draw(2, 4, 9, 16), draw(2, 2, 13, 16)
    both = "query and key both of 8 bits, or neither, got torch.float8_e4m3fn and torch.float32"
    with pytest.raises(
        TypeError, match="query_descale beside 8-bit queries and keys only, got torch.float32"
    ):
        attention_stats(q.float(), k.float(), query_descale=torch.ones(2, 2))
    with pytest.raises(TypeError, match=both):
        attention_stats(q, k.float())
    with pytest.raises(TypeError, match="floating dtype of 16 to 64 bits, got torch.float8_e4m3fn"):
        attention(q, k, k)


WRONG = {
    "heads": lambda q, k: ((q[:, :3], k), {}),
    "batch": lambda q, k: ((q[:1], k), {}),
    "dimensions": lambda q, k: ((q[0], k), {}),
    "a list of lengths": lambda q, k: ((q[:1], k[:1, :, :9]), {"seqlens": [0, 9]}),
    "no edges": lambda q, k: ((q[:1], k[:1, :, :9]), {"seqlens": torch.tensor(9)}),
    "edges of two": lambda q, k: ((q[:1], k[:1, :, :9]), {"seqlens": torch.tensor([[0, 9]])}),
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_other_faults_are_told_as_without_scales(wrong):
    tensors, options = wrong(draw(2, 4, 9, 16), draw(2, 2, 13, 16))
    with pytest.raises((TypeError, ValueError)) as plain:
        attention_stats(*tensors, **options)
    with pytest.raises(plain.type, match=re.escape(str(plain.value))):
        attention_stats(*tensors, **options, key_descale=torch.ones(2, 2))
