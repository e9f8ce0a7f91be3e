"""One clear error per kind of bad input, before anything runs; zero lengths are good input."""

import numpy as np
import pytest
import torch

from hnf_attention import attention, attention_stats


def _qkv(**shapes):
    default = {"q": (2, 4, 5, 8), "k": (2, 2, 6, 8), "v": (2, 2, 6, 8)}
    return [torch.randn(shapes.get(name, default[name])) for name in "qkv"]


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        ({"q": (4, 5, 8)}, r"query of shape .* got \(4, 5, 8\)"),
        ({"k": (2, 6, 8)}, "key of shape"),
        ({"k": (3, 2, 6, 8)}, "batch size 2, got 3"),
        ({"k": (2, 2, 6, 7)}, "head dimension 8, got 7"),
        ({"k": (2, 3, 6, 8), "v": (2, 3, 6, 8)}, "multiple of the 3 key heads, got 4"),
        ({"v": (2, 2, 7, 8)}, "value of shape"),
        ({"v": (2, 4, 6, 8)}, "value of shape"),
    ],
)
def test_shapes(shapes, words):
    with pytest.raises(ValueError, match=words):
        attention(*_qkv(**shapes))


@pytest.mark.parametrize(
    ("keywords", "error", "words"),
    [
        ({"window_size": -1}, ValueError, "window_size >= 1"),
        ({"window_size": 0}, ValueError, "window_size >= 1"),
        ({"window_size": 2.5}, TypeError, "window_size to be an int"),
        ({"softcap": 0.0}, ValueError, "softcap > 0"),
        ({"softcap": -3}, ValueError, "softcap > 0, got -3"),
        ({"softcap": float("nan")}, ValueError, "softcap"),
        ({"softcap": "50"}, TypeError, "softcap to be a number"),
        ({"scale": float("inf")}, ValueError, "scale finite"),
        ({"is_causal": 1}, TypeError, "is_causal to be a bool"),
        ({"attn_mask": torch.ones(5, 7, dtype=torch.bool)}, ValueError, "broadcasts to"),
        ({"attn_mask": torch.ones(1, 1, 1, 5, 6, dtype=torch.bool)}, ValueError, "broadcasts to"),
        (
            {"attn_mask": torch.ones(5, 6, dtype=torch.int64)},
            TypeError,
            r"attn_mask of dtype in \[torch.bool, torch.float32\], got torch.int64",
        ),
        ({"attn_mask": torch.ones(5, 6).to_sparse()}, TypeError, "attn_mask to be a dense tensor"),
        ({"attn_mask": [[True]]}, TypeError, "attn_mask to be a torch.Tensor"),
        ({"attn_mask": torch.ones(5, 6, device="meta")}, ValueError, "device cpu, got meta"),
        ({"sinks": torch.zeros(3)}, ValueError, r"sinks of shape \(heads,\) = \(4,\)"),
        ({"sinks": torch.zeros(4, dtype=torch.int32)}, TypeError, "sinks of a floating dtype"),
        ({"sinks": torch.zeros(4).to_sparse()}, TypeError, "sinks to be a dense tensor"),
        ({"sinks": 0.0}, TypeError, "sinks to be a torch.Tensor"),
    ],
)
def test_options(keywords, error, words):
    q, k, v = _qkv()
    with pytest.raises(error, match=words):
        attention(q, k, v, **keywords)
    with pytest.raises(error, match=words):
        attention_stats(q, k, **keywords)


@pytest.mark.parametrize(
    ("seqlens", "error", "words"),
    [
        ([0, 3, 6], TypeError, "seqlens to be a torch.Tensor or None"),
        (torch.tensor([0.0, 6.0]), TypeError, "seqlens of dtype .* got torch.float32"),
        (torch.tensor([[0, 6]]), ValueError, r"shape \(sequences \+ 1,\), got \(1, 2\)"),
        (torch.tensor(0), ValueError, r"shape \(sequences \+ 1,\), got \(\)"),
        (torch.zeros(0, dtype=torch.int32), ValueError, r"got \(0,\)"),
        (torch.tensor([1, 6]), ValueError, "start at 0, got 1"),
        (torch.tensor([0, 4, 2, 6]), ValueError, "never decrease, got 2 after 4"),
        (torch.tensor([0, 7]), ValueError, "within the 6 keys, got 7"),
        (torch.zeros(2, dtype=torch.int32, device="meta"), ValueError, "query's device cpu .* got meta"),
    ],
)
def test_sequence_lengths(seqlens, error, words):
    q, k, v = _qkv(q=(1, 4, 6, 8), k=(1, 2, 6, 8), v=(1, 2, 6, 8))
    with pytest.raises(error, match=words):
        attention(q, k, v, seqlens=seqlens)
    with pytest.raises(error, match=words):
        attention_stats(q, k, seqlens=seqlens)


def test_sequence_lengths_need_one_row_of_as_many_keys_as_queries():
    seqlens = torch.tensor([0, 3, 5])
    with pytest.raises(ValueError, match="batch of 1 .* got a batch of 2"):
        attention(*_qkv(k=(2, 2, 5, 8), v=(2, 2, 5, 8)), seqlens=seqlens)
    with pytest.raises(ValueError, match="as many keys as queries .* got 6 keys and 5 queries"):
        attention(*_qkv(q=(1, 4, 5, 8), k=(1, 2, 6, 8), v=(1, 2, 6, 8)), seqlens=seqlens)


@pytest.mark.parametrize("length", [0, 6])
def test_no_sequences_make_every_row_empty(length):
    q, k, v = _qkv(q=(1, 4, length, 8), k=(1, 2, length, 8), v=(1, 2, length, 8))
    out, rows = attention(q, k, v, seqlens=torch.tensor([0]))
    assert out.shape == q.shape and not out.any() and (rows.lse == -torch.inf).all()


@pytest.mark.parametrize(
    ("sample", "error", "words"),
    [
        (16, TypeError, r"tuple of two ints \(period, phase\), got 16"),
        ([16, 0], TypeError, "tuple of two ints"),
        ((16, 0, 0), TypeError, "tuple of two ints"),
        ((16, 0.5), TypeError, "tuple of two ints"),
        ((True, 0), TypeError, "tuple of two ints"),
        ((0, 0), ValueError, r"period >= 1 and phase >= 0, got \(0, 0\)"),
        ((4, -1), ValueError, "phase >= 0"),
    ],
)
def test_samples(sample, error, words):
    q, k, _ = _qkv()
    with pytest.raises(error, match=words):
        attention_stats(q, k, sample=sample)


def test_dtypes_and_devices():
    q, k, v = _qkv()
    with pytest.raises(TypeError, match="query's dtype torch.float32, got torch.float16"):
        attention(q, k.half(), v)
    with pytest.raises(TypeError, match="floating dtype of 16 to 64 bits, got torch.int64"):
        attention(q.long(), k.long(), v.long())
    with pytest.raises(TypeError, match="value to be a torch.Tensor, got list"):
        attention(q, k, [1.0])
    with pytest.raises(ValueError, match="query's device cpu, got meta"):
        attention(q, k.to("meta"), v)


@pytest.mark.parametrize("name", ["query", "key", "value"])
@pytest.mark.parametrize(
    ("build", "got"),
    [
        (torch.Tensor.to_sparse, "layout torch.sparse_coo"),
        (lambda x: torch.nested.nested_tensor(list(x)), "nested tensor"),
        (lambda x: torch.nested.nested_tensor(list(x), layout=torch.jagged), "nested tensor"),
    ],
    ids=["sparse", "nested", "jagged"],
)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_tensors_that_are_not_dense(name, build, got):
    tensors = dict(zip(("query", "key", "value"), _qkv()))
    tensors[name] = build(tensors[name])
    with pytest.raises(TypeError, match=f"{name} to be a dense tensor, got .*{got}"):
        attention(**tensors)


def test_a_window_may_be_an_integer_of_numpy():
    q, k, v = _qkv()
    out, rows = attention(q, k, v, window_size=np.int64(3))
    expected, expected_rows = attention(q, k, v, window_size=3)
    assert torch.equal(out, expected) and torch.equal(rows.entropy, expected_rows.entropy)


@pytest.mark.gpu
def test_cpu_and_cuda_do_not_mix():
    q, k, v = _qkv()
    with pytest.raises(ValueError, match="query's device cuda:0, got cpu"):
        attention(q.cuda(), k, v)


@pytest.mark.parametrize(("num_queries", "num_keys"), [(0, 6), (5, 0), (0, 0)])
def test_zero_lengths_give_empty_results(num_queries, num_keys):
    q, k, v = _qkv(q=(2, 4, num_queries, 8), k=(2, 2, num_keys, 8), v=(2, 2, num_keys, 8))
    out, rows = attention(q.requires_grad_(), k, v, is_causal=True)
    out.sum().backward()
    assert out.shape == (2, 4, num_queries, 8) and not out.any()
    assert (rows.lse == -torch.inf).all() and (rows.entropy == 0).all() and (rows.max_weight == 0).all()
