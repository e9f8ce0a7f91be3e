"""FlashAttention 3's calls with 8-bit inputs and their scales, beside a stand-in that has its signatures."""

import flash_standins
import pytest
import torch
from test_eight_bit import descale, draw
from test_flash_attn import Caller, first

from hnf_attention import AttentionStabilityMonitor, attention_stats, instrument
from hnf_attention.instrumentation import positions


@pytest.fixture(autouse=True)
def libraries(monkeypatch):
    return flash_standins.put_in_place(monkeypatch)


def borders(first_length, both):
    return torch.tensor([0, first_length, both])


CALLS = {
    "batch": (
        "flash_attn_func",
        lambda: (draw(2, 9, 4, 8), draw(2, 13, 2, 8), draw(2, 13, 2, 8)),
        {"causal": True, "return_attn_probs": True},
    ),
    "window": (
        "flash_attn_func",
        lambda: (draw(2, 9, 4, 8), draw(2, 9, 2, 8), draw(2, 9, 2, 8)),
        {"window_size": (2, 4), "return_attn_probs": True},
    ),
    "pack": (
        "flash_attn_varlen_func",
        lambda: (draw(20, 4, 8), draw(20, 2, 8), draw(20, 2, 8)),
        {
            "cu_seqlens_q": borders(7, 20),
            "cu_seqlens_k": borders(7, 20),
            "max_seqlen_q": 13,
            "max_seqlen_k": 13,
        }
        | {"causal": True, "return_attn_probs": True},
    ),
    "apart": (
        "flash_attn_varlen_func",
        lambda: (draw(12, 4, 8), draw(20, 2, 8), draw(20, 2, 8)),
        {
            "cu_seqlens_q": borders(5, 12),
            "cu_seqlens_k": borders(7, 20),
            "max_seqlen_q": 7,
            "max_seqlen_k": 13,
        }
        | {"return_attn_probs": True},
    ),
    "packed tensors": (
        "flash_attn_qkvpacked_func",
        lambda: (draw(2, 9, 8, 8),),
        {"num_heads_q": 4, "causal": True, "return_attn_probs": True},
    ),
    "cache": (
        "flash_attn_with_kvcache",
        lambda: (draw(2, 3, 4, 8), draw(2, 13, 2, 8), draw(2, 13, 2, 8)),
        {"causal": True, "return_softmax_lse": True, "cache_seqlens": torch.tensor([13, 6])},
    ),
    "pages and new keys": (
        "flash_attn_with_kvcache",
        lambda: (draw(2, 3, 4, 8), draw(9, 4, 2, 8), draw(9, 4, 2, 8), draw(2, 3, 2, 8), draw(2, 3, 2, 8)),
        {"causal": True, "return_softmax_lse": True, "cache_seqlens": torch.tensor([9, 5], dtype=torch.int32)}
        | {"page_table": torch.tensor([[7, 0, 3, 8], [2, 6, 1, 1]], dtype=torch.int32)},
    ),
}


def made(kind):
    """The model, the tensors and the options of a call."""
    function, make, options = CALLS[kind]
    return Caller("flash_attn_interface", function), make(), options


@pytest.mark.parametrize("scales", [(), ("q",), ("q", "k", "v")], ids=str)
@pytest.mark.parametrize("kind", CALLS)
def test_its_rows_have_the_scales(kind, scales):
    model, tensors, options = made(kind)
    given = options | {f"{x}_descale": descale(2, 2) for x in scales}
    plain, lse = model(*tensors, **given)
    for mode in ("probe", "fused"):
        with instrument(model, mode, strict=True) as handle:
            assert torch.equal(first(model(*tensors, **given)), plain)
        found, how = handle.latest[""], handle.coverage.measured[""]
        assert how.startswith("probe") and "its lse agrees" in how
        assert found.dtype is torch.float8_e4m3fn
        rows = found.rows.lse
        if kind == "apart":
            rows = torch.cat([rows[b, :, :n] for b, n in enumerate((5, 7))], 1)
        torch.testing.assert_close(rows.reshape(lse.shape), lse, rtol=1e-5, atol=1e-5)


def test_what_is_beside_the_rows_has_the_scales():
    """As of the same numbers in fp32: values and outputs count, too."""
    model, tensors, options = made("batch")
    given = options | {f"{x}_descale": descale(2, 2) for x in "qkv"}
    numbers = []
    for name, x in zip("qkv", tensors):
        of_heads = given[f"{name}_descale"].repeat_interleave(x.shape[2] // 2, 1)
        numbers.append(x.float() * of_heads[:, None, :, None])
    contexts = []
    for call in ((tensors, given), (numbers, options)):
        with instrument(model, strict=True) as handle:
            model(*call[0], **call[1])
        contexts.append(handle.latest[""].context)
    compared = 0
    for mine, other in zip(*contexts):
        if isinstance(mine, torch.Tensor) and mine.is_floating_point():
            torch.testing.assert_close(mine.float(), other.float(), rtol=2e-2, atol=1e-2)  # a bf16 output
            compared += 1
    assert compared > 1


def test_a_mask_that_is_not_written_out_keeps_the_dtype(monkeypatch):
    monkeypatch.setattr(positions, "MASK_BYTES", 0)
    model, tensors, options = made("window")
    with instrument(model, strict=True) as handle:
        model(*tensors, **options, q_descale=descale(2, 2))
    assert handle.latest[""].dtype is torch.float8_e4m3fn


def test_a_monitor_keeps_the_dtype_and_takes_extremes_at_measured_steps():
    model, tensors, options = made("pack")
    monitor = AttentionStabilityMonitor(model, log_every=2)
    for _ in range(4):
        model(*tensors, **options)
        monitor.on_step()
    how = monitor.instrumentation.coverage.measured[""]
    monitor.restore()
    assert "extremes at measured steps only: its inputs are of 8 bits" in how
    stats = next(iter(monitor.history[-1].layers.values()))
    assert stats.dtype == "float8_e4m3fn"
    assert (stats.error_bound > 0.03).all() and (stats.error_bound < 0.5).all()  # at most thirteen keys


def test_its_output_is_its_own_where_nothing_is_asked_for_beside():
    model, tensors, _ = made("batch")
    plain = model(*tensors)
    with instrument(model, "fused", strict=True) as handle:
        assert torch.equal(model(*tensors), plain)
        assert handle.coverage.measured[""].startswith("probe")


Q, K = draw(2, 9, 4, 8), draw(2, 9, 2, 8)


@pytest.mark.parametrize(
    "tensors, options, reason",
    [
        ((Q, K, K.clone()), {"qv": torch.ones(2, 9, 4, 8)}, "argument qv comes with 8-bit queries"),
        ((Q.float(), K, K.clone()), {}, "its 8-bit inputs come beside others"),
    ],
)
def test_what_cannot_be_measured_is_listed(tensors, options, reason, monkeypatch):
    monkeypatch.setattr(
        flash_standins, "compute", lambda given: (torch.ones(2, 9, 4, 8), torch.zeros(2, 4, 9))
    )
    model = Caller("flash_attn_interface", "flash_attn_func")
    with instrument(model) as handle:
        model(*tensors, **options)
    assert reason in handle.coverage.not_measured[""]


def test_scales_beside_other_dtypes_have_no_meaning():
    """The package does not look at them then."""
    model, q, k = Caller("flash_attn_interface", "flash_attn_func"), Q.float(), K.float()
    with instrument(model, strict=True) as handle:
        model(q, k, k.clone(), q_descale=torch.full((2, 2), 3.0))
    assert torch.equal(handle.latest[""].rows.lse, attention_stats(q.transpose(1, 2), k.transpose(1, 2)).lse)
