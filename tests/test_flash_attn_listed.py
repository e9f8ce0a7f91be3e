"""FlashAttention's functions: what is listed, what is found by the lse, and what is put back."""

import flash_standins
import pytest
import torch
from test_flash_attn import Caller, draw, first

from hnf_attention import instrument


@pytest.fixture(autouse=True)
def libraries(monkeypatch):
    return flash_standins.put_in_place(monkeypatch)


@pytest.mark.parametrize(
    "library, function, options, reason",
    [
        (
            "flash_attn_interface",
            "flash_attn_func",
            {"attention_chunk": 4},
            "its argument attention_chunk is not",
        ),
        (
            "flash_attn_interface",
            "flash_attn_func",
            {"qv": torch.ones(2, 9, 4, 8), "attention_chunk": 3},
            "its argument attention_chunk is not",
        ),
        (
            "flash_attn.cute",
            "flash_attn_func",
            {"score_mod": lambda *x: x[0]},
            "its argument score_mod is not",
        ),
        ("flash_attn.cute", "flash_attn_func", {"mask_mod": lambda *x: x[0]}, "its argument mask_mod is not"),
        (
            "flash_attn",
            "flash_attn_with_kvcache",
            {"rotary_cos": torch.ones(9, 4)},
            "argument rotary_cos is not",
        ),
    ],
)
def test_what_is_not_described_is_listed(library, function, options, reason):
    model, tensors = Caller(library, function), (draw(2, 9, 4, 8), draw(2, 9, 2, 8), draw(2, 9, 2, 8))
    plain = first(model(*tensors, **options))
    with instrument(model) as handle:
        assert torch.equal(first(model(*tensors, **options)), plain)
        assert reason in handle.coverage.not_measured[""] and not handle.coverage.measured
        model(*tensors, causal=True)  # not a lasting reason
        assert handle.coverage.measured


def test_another_lse_than_that_of_the_description_is_found(libraries):
    class Shifted(Caller):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    original = libraries["flash_attn"].flash_attn_func

    def flash_attn_func(q, k, v, causal=False, return_attn_probs=False):
        return original(q * 1.5, k, v, causal=causal, return_attn_probs=return_attn_probs)

    libraries["flash_attn"].flash_attn_func = flash_attn_func
    model, tensors = (
        Shifted("flash_attn", "flash_attn_func"),
        (draw(2, 9, 4, 8), draw(2, 9, 2, 8), draw(2, 9, 2, 8)),
    )
    with instrument(model) as handle:
        model(*tensors, causal=True, return_attn_probs=True)
    assert "the lse that it returns is not that of its description" in handle.coverage.not_measured[""]


def test_everything_is_put_back(libraries):
    held = {(x.__name__, name): function for x in libraries.values() for name, function in vars(x).items()}
    model = Caller("flash_attn", "flash_attn_func")
    model.mine = libraries["flash_attn"].flash_attn_func
    with instrument(model):
        assert libraries["flash_attn"].flash_attn_func is not held["flash_attn", "flash_attn_func"]
    assert {(x.__name__, name): f for x in libraries.values() for name, f in vars(x).items()} == held
    assert model.mine is held["flash_attn", "flash_attn_func"]
