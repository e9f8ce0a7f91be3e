"""Which engine a call takes on which card, and the reasons against the faster ones. No card is needed."""

import pytest
import torch

from hnf_attention.engine import engines
from hnf_attention.engine.call import Call, check
from hnf_attention.engine.card import NO_CARD, NVIDIA, Card
from hnf_attention.engine.library import Choice

H200 = Card("H200", NVIDIA, (9, 0), triton="3.6.0", has_flash=True, has_cudnn=True, cudnn_version=(9, 19))
A100 = Card("A100", NVIDIA, (8, 0), triton="3.6.0", has_flash=True, has_cudnn=True)
T4 = Card("T4", NVIDIA, (7, 5), triton="3.6.0")
MI300 = Card("MI300", "AMD", (9, 4), triton="3.6.0", has_flash=True)
NEXT_TRITON, OTHER_TRITON, NEW_TRITON = (
    Card("H200", NVIDIA, (9, 0), triton=version, has_flash=True, has_cudnn=True)
    for version in ("3.7.1", "3.9.0", "3.10.0")
)
WITHOUT_TRITON = Card("H200", NVIDIA, (9, 0), has_flash=True, has_cudnn=True)
CPU = Card("cpu")
HOPPER, TRITON, REFERENCE = engines.HOPPER, engines.TRITON, engines.REFERENCE
MI250 = Card("MI250", "AMD", (9, 0), triton="3.6.0", has_flash=True, has_cudnn=True)
MASK = torch.ones(1, 1, 1, 256, dtype=torch.bool)
SHAPES = "takes no mask, window, soft-cap, sinks or packed sequences"


def call(
    dtype=torch.bfloat16,
    queries=256,
    keys=256,
    head_dim=64,
    value_dim=64,
    extended=False,
    value=True,
    **options,
):
    q = torch.empty(1, 2, queries, head_dim, dtype=dtype)
    k, v = (torch.empty(1, 2, keys, width, dtype=dtype) for width in (head_dim, value_dim))
    v = v if value else None
    names = ("attn_mask", "scale", "window_size", "softcap", "sinks")
    return Call(q, k, v, check(q, k, v, **dict.fromkeys(names) | {"is_causal": True} | options), extended)


FORWARD = [
    (H200, {}, {HOPPER: None}),
    (H200, {"dtype": torch.float32}, {HOPPER: "needs fp16 or bf16, got float32", TRITON: None}),
    (H200, {"head_dim": 256}, {HOPPER: None}),
    (H200, {"head_dim": 192, "value_dim": 128, "is_causal": False}, {HOPPER: None}),
    (
        H200,
        {"value_dim": 60},
        {HOPPER: "needs values with a head dimension that is a multiple of 8", TRITON: None},
    ),
    (H200, {"queries": 64}, {HOPPER: "needs more than 64 queries", TRITON: None}),
    (H200, {"keys": 0}, {HOPPER: "the call is empty", TRITON: "there is no key", REFERENCE: None}),
    (H200, {"window_size": 9}, {HOPPER: None}),
    (H200, {"sinks": torch.zeros(2)}, {HOPPER: None}),
    (H200, {"seqlens": torch.tensor([0, 100, 256])}, {HOPPER: None}),
    (H200, {"attn_mask": MASK}, {HOPPER: None}),
    (H200, {"attn_mask": MASK.float()}, {HOPPER: "takes no additive mask", TRITON: None}),
    (
        H200,
        {"attn_mask": MASK, "seqlens": torch.tensor([0, 256])},
        {HOPPER: "takes no mask beside packed sequences", TRITON: None},
    ),
    (H200, {"softcap": 5.0, "window_size": 9}, {HOPPER: "takes no soft-cap", TRITON: None}),
    (
        H200,
        {"scale": 1e7, "window_size": 9},
        {
            HOPPER: engines.ODD_SCALE,
            TRITON: None,
        },
    ),
    (H200, {"scale": 1e7}, {HOPPER: None}),
    (H200, {"scale": 1e-7, "head_dim": 192}, {HOPPER: engines.ODD_SCALE, TRITON: None}),
    (H200, {"scale": -1.0}, {HOPPER: "needs a positive scale", TRITON: None}),
    (H200, {"extended": True}, {HOPPER: "does not compute the extended statistics", TRITON: None}),
    (H200, {"value": False}, {HOPPER: "needs values: this call asks for statistics alone", TRITON: None}),
    (
        H200,
        {"head_dim": 320},
        {
            HOPPER: "head dimension 320 exceeds 256",
            TRITON: "head dimension 320 exceeds 256",
            REFERENCE: None,
        },
    ),
    (
        H200,
        {"dtype": torch.float64},
        {
            HOPPER: "needs fp16 or bf16, got float64",
            TRITON: "needs fp16, bf16 or fp32, got float64",
            REFERENCE: None,
        },
    ),
    (A100, {}, {HOPPER: "needs compute capability 9.0, this card has 8.0", TRITON: None}),
    (MI300, {}, {HOPPER: "needs an NVIDIA card", TRITON: None}),
    (NEXT_TRITON, {}, {HOPPER: None}),
    (
        OTHER_TRITON,
        {},
        {HOPPER: "Triton 3.9.0 compiles it with spilled registers: needs 3.6 or 3.7", TRITON: None},
    ),
    (NEW_TRITON, {}, {HOPPER: "Triton 3.10.0 is untested: needs 3.6 or 3.7", TRITON: None}),
    (
        T4,
        {},
        {
            HOPPER: "needs compute capability 9.0, this card has 7.5",
            TRITON: "needs compute capability 8.0, this card has 7.5",
            REFERENCE: None,
        },
    ),
    (MI250, {}, {HOPPER: "needs an NVIDIA card", TRITON: None}),
    (
        WITHOUT_TRITON,
        {},
        {HOPPER: "Triton is not installed", TRITON: "Triton is not installed", REFERENCE: None},
    ),
    (CPU, {}, {HOPPER: NO_CARD, TRITON: NO_CARD, REFERENCE: None}),
]
CUDNN, FLASH = engines.CUDNN, engines.FLASH
BACKWARD = [
    (H200, {}, {CUDNN: None}),
    (
        H200,
        {"head_dim": 256},
        {CUDNN: "head dimension 256 exceeds 128", FLASH: "q has head dimension 256, v has 64", TRITON: None},
    ),
    (H200, {"head_dim": 256, "value_dim": 256}, {CUDNN: "head dimension 256 exceeds 128", FLASH: None}),
    (
        H200,
        {"softcap": 5.0},
        {CUDNN: "takes no window, soft-cap, sinks or packed sequences", FLASH: SHAPES, TRITON: None},
    ),
    (
        H200,
        {"dtype": torch.float32},
        {CUDNN: "needs fp16 or bf16, got float32", FLASH: "needs fp16 or bf16, got float32", TRITON: None},
    ),
    (
        H200,
        {"keys": 255},
        dict.fromkeys((CUDNN, FLASH), "needs as many queries as keys under a causal mask") | {TRITON: None},
    ),
    (
        H200,
        {"value_dim": 60},
        dict.fromkeys((CUDNN, FLASH), "needs head dimensions that are multiples of 8") | {TRITON: None},
    ),
    (A100, {}, {CUDNN: "needs compute capability 9.x, this card has 8.0", FLASH: None}),
    (
        T4,
        {},
        {
            CUDNN: "needs compute capability 9.x, this card has 7.5",
            FLASH: "needs compute capability 8.0, this card has 7.5",
            TRITON: "needs compute capability 8.0, this card has 7.5",
            REFERENCE: None,
        },
    ),
    (MI300, {}, dict.fromkeys((CUDNN, FLASH), "needs an NVIDIA card") | {TRITON: None}),
    (CPU, {}, dict.fromkeys((CUDNN, FLASH, TRITON), NO_CARD) | {REFERENCE: None}),
]
CASES = [
    pytest.param(engines_, *case, id=f"{name} {case[0].name} {case[1]}")
    for name, engines_, cases in (
        ("forward", engines.FORWARD, FORWARD),
        ("backward", engines.output_backward(Choice()), BACKWARD),
    )
    for case in cases
]


@pytest.mark.parametrize("engines_, card, options, expected", CASES)
def test_the_first_engine_that_supports_a_call_takes_it(engines_, card, options, expected, monkeypatch):
    monkeypatch.setattr(engines, "card_of", lambda device: card)
    made = call(**options)
    assert dict(engines.explain(engines_, made)) == expected
    assert engines.choose(engines_, made).name == list(expected)[-1]


H100, B200 = (Card(name, NVIDIA, (n, 0), triton="3.6.0") for name, n in (("H100", 9), ("B200", 10)))


@pytest.mark.parametrize(
    ("card", "options", "reason"),
    [
        (H200, {}, None),
        (H100, {"dtype": torch.float16, "head_dim": 128, "value_dim": 128}, None),
        (OTHER_TRITON, {"head_dim": 256, "value_dim": 256, "is_causal": False}, None),
        *((card, {}, f"not measured on this card ({card.name})") for card in (A100, T4, B200, MI300, MI250)),
        (H200, {"dtype": torch.float32}, "needs fp16 or bf16, got float32"),
        (H200, {"queries": 64}, "needs more than 64 queries"),
        (H200, {"head_dim": 80, "value_dim": 80}, "not measured with head dimension 80"),
        (H200, {"head_dim": 128}, "not measured with head dimension 128 and 64"),
    ],
)
def test_auto_fuses_where_fused_was_measured(card, options, reason, monkeypatch):
    monkeypatch.setattr(engines, "card_of", lambda device: card)
    made = call(**options)
    assert engines.fused_is_unmeasured(made.query, made.value) == reason


def test_the_constants_of_the_hopper_kernel_are_its_own():
    plan = pytest.importorskip("hnf_attention.kernels.hopper.plan")
    assert plan.HALF_M == engines.HOPPER_ROWS
