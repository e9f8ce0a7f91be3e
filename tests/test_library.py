"""Which calls get PyTorch's own backward kernels: where they are right and the user lets them run. Needs no card."""

import subprocess
import sys

import pytest
import torch
from compat_helpers import Operators, qkv
from test_engines import A100, CUDNN, FLASH, H200, OTHER_TRITON, TRITON, call
from torch.nn.attention import SDPBackend, sdpa_kernel

from hnf_attention import attention
from hnf_attention.engine import card as cards
from hnf_attention.engine import engines, library
from hnf_attention.engine.card import NVIDIA, Card
from hnf_attention.engine.library import LOW_SCORES, Choice

OTHER_CUDNN = Card(
    "H200", NVIDIA, (9, 0), triton="3.6.0", has_flash=True, has_cudnn=True, cudnn_version=(9, 10)
)
RTX4090 = Card("4090", NVIDIA, (8, 9), triton="3.6.0", has_flash=True, has_cudnn=True)
# bench/cudnn_low_lse.py, cuDNN 9.19 on an H200: what gave NaN for scores of -122, and what did not.
WRONG = [(n, n) for n in (64, 192, 320, 448, 576, 1088, 1216, 4160)]
WRONG += [(1, 64), (1, 128), (1, 192), (1, 256), (97, 64), (128, 192), (64, 1216)]
RIGHT = [(n, n) for n in (2, 8, 33, 63, 65, 96, 97, 127, 128, 129, 160, 193, 200, 224, 256, 640, 1000, 4096)]
RIGHT += [(2, 128), (64, 128), (97, 128), (128, 1280), (128, 97), (65, 256)]


def reasons(made, card=H200, chosen=Choice()):  # noqa: B008
    return library.cudnn_supports(made, card, chosen), library.flash_supports(made, card, chosen)


def taken(made, monkeypatch, card=H200, chosen=Choice()):  # noqa: B008
    monkeypatch.setattr(engines, "card_of", lambda device: card)
    return engines.choose(engines.output_backward(chosen), made).name


@pytest.mark.parametrize("dtype, head_dim", [(torch.bfloat16, 64), (torch.float16, 128)])
def test_cudnn_gets_no_shape_for_which_low_scores_give_nan(dtype, head_dim):
    for shapes, wrong in ((WRONG, True), (RIGHT, False)):
        for queries, keys in shapes:
            shape = dict(dtype=dtype, head_dim=head_dim, value_dim=head_dim, queries=queries, keys=keys)
            assert (reasons(call(**shape, is_causal=False))[0] is not None) == wrong, (queries, keys)
            if queries == keys:  # a causal mask hides the keys that are too many
                assert reasons(call(**shape))[0] is None
            full = queries % 128 == keys % 128 == 0
            for causal in {False, queries == keys}:
                # An untested version gets nothing but full tiles.
                made = call(**shape, is_causal=causal)
                assert (reasons(made, OTHER_CUDNN)[0] is None) == full, (queries, keys)
    assert reasons(call(is_causal=False, keys=192))[0] == LOW_SCORES


@pytest.mark.parametrize(
    "shape, cudnn, flash",
    [
        ((1, 1, 1, 1), "needs more than one query and more than one key", None),
        ((2, 3, 70, 1), "needs more than one query and more than one key", None),
        ((2, 3, 1, 70), "needs more than one query and more than one key", None),
        ((65535, 1, 2, 2), None, None),
        ((1, 65535, 2, 2), None, None),
        (
            (65536, 1, 2, 2),
            "takes a batch and heads of at most 65535",
            "takes a batch and heads of at most 65535",
        ),
        (
            (1, 65536, 2, 2),
            "takes a batch and heads of at most 65535",
            "takes a batch and heads of at most 65535",
        ),
    ],
)
def test_sizes_that_pytorchs_kernels_refuse(shape, cudnn, flash, monkeypatch):
    batch, heads, queries, keys = shape
    q, k = (
        torch.empty(1, 1, n, 64, dtype=torch.bfloat16).expand(batch, heads, -1, -1) for n in (queries, keys)
    )
    monkeypatch.setattr(library, "_repeated", lambda tensor: False)  # whole tensors would take 16 MB each
    made = call(is_causal=False)._replace(query=q, key=k, value=k)
    assert reasons(made) == (cudnn, flash)


def test_tensors_that_pytorchs_kernels_cannot_load():
    made = call()
    rows = "needs q, k and v whose rows start at multiples of 16 bytes"
    shifted = torch.empty(made.query.numel() + 1, dtype=torch.bfloat16)[1:].view(made.query.shape)
    wider = torch.empty(1, 2, 256, 68, dtype=torch.bfloat16)[..., :64]
    repeated = made.key[:, :1].expand(-1, 2, -1, -1)
    for name in ("query", "key", "value"):
        assert reasons(made._replace(**{name: shifted})) == (rows, rows)
        assert reasons(made._replace(**{name: wider})) == (rows, rows)
        repeats = reasons(made._replace(**{name: repeated}))
        assert repeats == ("needs q, k and v that no stride of 0 repeats", None)
        assert reasons(made._replace(**{name: made.query.transpose(1, 2).contiguous().transpose(1, 2)})) == (
            None,
            None,
        )


def test_an_unaligned_cotangent_is_copied():
    out = torch.randn(1, 2, 8, 16).bfloat16()
    shifted = torch.randn(out.numel() + 1).bfloat16()[1:].view(out.shape)
    for d_out in (shifted, torch.ones(()).bfloat16().expand(out.shape), out.mT.contiguous().mT):
        given = library._cotangent(engines.BackwardInputs(out, None, None, d_out, None, None))
        assert torch.equal(given, d_out) and given.is_contiguous() and library._aligned(given)
    same = torch.randn(1, 8, 2, 16).bfloat16().transpose(1, 2)
    assert library._cotangent(engines.BackwardInputs(same, None, None, same, None, None)) is same


def test_flash_on_consumer_cards_takes_no_wide_head(monkeypatch):
    wide = call(head_dim=256, value_dim=256)
    assert taken(wide, monkeypatch) == taken(wide, monkeypatch, A100) == FLASH
    assert taken(wide, monkeypatch, RTX4090) == TRITON
    assert taken(call(head_dim=192, value_dim=192), monkeypatch, RTX4090) == FLASH


def test_large_calls_on_hopper_take_our_kernel_before_flash(monkeypatch):
    off = Choice(cudnn=False)
    small, large = call(queries=512, keys=512), call(queries=8192, keys=8192)
    assert taken(small, monkeypatch, chosen=off) == FLASH and taken(large, monkeypatch, chosen=off) == TRITON
    assert taken(large, monkeypatch, A100) == FLASH and taken(large, monkeypatch) == CUDNN
    wide = call(queries=8192, keys=8192, head_dim=256, value_dim=256)
    assert taken(wide, monkeypatch) == FLASH


# What the user lets run


def test_a_kernel_that_is_turned_off_gives_no_gradient(monkeypatch):
    made = call()
    assert taken(made, monkeypatch) == CUDNN
    assert taken(made, monkeypatch, chosen=Choice(cudnn=False)) == FLASH
    assert taken(made, monkeypatch, chosen=Choice(flash=False)) == CUDNN
    assert taken(made, monkeypatch, chosen=Choice(cudnn=False, flash=False)) == TRITON
    assert taken(made, monkeypatch, chosen=Choice(deterministic=True)) == TRITON
    assert reasons(made, chosen=Choice(False, False)) == (
        "cuDNN's attention is turned off",
        "PyTorch's FlashAttention is turned off",
    )


@pytest.mark.parametrize("warn_only", [False, True])
def test_deterministic_algorithms_take_no_kernel_that_adds_in_any_order(warn_only, monkeypatch):
    torch.use_deterministic_algorithms(True, warn_only=warn_only)
    try:
        assert library.choice().deterministic
        assert taken(call(), monkeypatch) == TRITON  # turned on after the forward
    finally:
        torch.use_deterministic_algorithms(False)
    assert not library.choice().deterministic


def test_the_choice_is_what_pytorchs_switches_say(monkeypatch):
    assert library.choice() == Choice()
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        assert library.choice() == Choice(cudnn=False)
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH]):
        assert library.choice() == Choice(flash=False)
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        assert library.choice() == Choice(cudnn=False)
    finally:
        torch.backends.cuda.enable_cudnn_sdp(True)
    with torch.backends.cudnn.flags(enabled=False):
        assert library.choice() == Choice(cudnn=False)
    monkeypatch.setattr(library.compat, "other_flash", lambda: "FA4")
    assert library.choice() == Choice(flash=False)


@pytest.mark.parametrize("operators", [False, True])
def test_the_choice_at_the_forward_decides_about_the_backward(operators, monkeypatch):
    chosen = []

    def record(choice):
        chosen.append(choice)
        return engines.STATISTICS_BACKWARD

    monkeypatch.setattr(engines, "output_backward", record)

    def forward():
        leaves = qkv(requires_grad=True)
        if not operators:
            return attention(*leaves)[0].sum()
        with Operators() as mode:
            out = attention(*leaves)[0]
        assert "hnf_attention.forward.default" in mode.seen
        return out.sum()

    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        inside = forward()
        outside_of_math = forward()
    plain = forward()
    inside.backward()
    with sdpa_kernel(SDPBackend.MATH):
        plain.backward()
        outside_of_math.backward()
    assert chosen == [Choice(cudnn=False), Choice(), Choice(cudnn=False)]


# Masks


def masked(mask, **options):
    return call(is_causal=False, attn_mask=mask, **options)


@pytest.mark.parametrize("shape", [(1, 2, 256, 256), (1, 1, 256, 256), (1, 1, 1, 256), (1, 2, 256, 1)])
def test_boolean_masks_take_cudnns_backward_and_others_do_not(shape, monkeypatch):
    visible = torch.ones(shape, dtype=torch.bool)
    assert taken(masked(visible), monkeypatch) == CUDNN
    assert reasons(masked(visible), OTHER_CUDNN)[0] == "its masks are tested with cuDNN 9.19 alone"
    assert taken(masked(visible), monkeypatch, OTHER_CUDNN) == TRITON
    for dtype in (torch.bfloat16, torch.float32):
        made = masked(torch.zeros(shape, dtype=dtype))
        assert reasons(made)[0] == "takes no additive mask" and taken(made, monkeypatch) == TRITON
    window = masked(visible, window_size=9)
    assert reasons(window)[0] == "takes no window, soft-cap, sinks or packed sequences"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_boolean_mask_goes_to_cudnn_as_a_bias(dtype, monkeypatch):
    given = {}

    def backward(*arguments, scale):
        given["bias"] = arguments[8]
        return arguments[1:4]

    monkeypatch.setattr(library.compat, "cudnn_backward", backward)
    visible = torch.rand(1, 1, 256, 256) < 0.5
    made = masked(visible, dtype=dtype)
    out = torch.empty_like(made.query)
    library.cudnn_backward(made, engines.BackwardInputs(out, out[..., 0], None, out, None, None))
    assert given["bias"].dtype == dtype and given["bias"].shape == visible.shape
    assert torch.equal(given["bias"] == 0, visible) and torch.equal(given["bias"] == -torch.inf, ~visible)
    library.cudnn_backward(call(), engines.BackwardInputs(out, out[..., 0], None, out, None, None))
    assert given["bias"] is None


def test_a_mask_that_learns_takes_our_backward(monkeypatch):
    asked = []
    monkeypatch.setattr(
        engines, "output_backward", lambda chosen: asked.append(chosen) or engines.STATISTICS_BACKWARD
    )
    for learns in (False, True):
        mask = torch.randn(7, 7, requires_grad=learns)
        attention(*qkv(requires_grad=True), attn_mask=mask)[0].sum().backward()
    assert len(asked) == 1


# Refusals that nobody foresaw


def refusing(error):
    def run(*_):
        raise error

    return lambda chosen: (engines.Engine(CUDNN, lambda *_: None, run), *engines.STATISTICS_BACKWARD)


def test_a_kernel_that_refuses_when_it_runs_does_not_end_the_step(monkeypatch, caplog):
    leaves = qkv(requires_grad=True)
    expected = torch.autograd.grad(attention(*leaves)[0].sum(), leaves)
    monkeypatch.setattr(engines, "output_backward", refusing(RuntimeError("No valid plan\nand more")))
    for _ in range(2):
        found = torch.autograd.grad(attention(*leaves)[0].sum(), leaves)
        assert all(map(torch.equal, found, expected))
    (record,) = caplog.records  # once
    assert "PyTorch's cudnn backward refused a query of shape (2, 3, 7, 4)" in record.message
    assert record.message.endswith("No valid plan")


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("full"), TypeError("wrong argument")])
def test_other_errors_of_a_backward_come_out(error, monkeypatch):
    leaves = qkv(requires_grad=True)
    monkeypatch.setattr(engines, "output_backward", refusing(error))
    with pytest.raises(type(error)):
        attention(*leaves)[0].sum().backward()


def test_errors_of_our_own_backward_come_out(monkeypatch):
    def run(*_):
        raise RuntimeError("ours")

    ours = (engines.Engine(TRITON, lambda *_: None, run),)
    monkeypatch.setattr(engines, "STATISTICS_BACKWARD", ours)
    monkeypatch.setattr(engines, "output_backward", lambda chosen: ours)
    with pytest.raises(RuntimeError, match="ours"):
        attention(*qkv(requires_grad=True))[0].sum().backward()


# Cards


@pytest.mark.parametrize(
    "number, version", [(91900, (9, 19)), (90100, (9, 1)), (8907, (8, 9)), (None, (0, 0))]
)
def test_the_version_of_cudnn(number, version, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: number)
    assert cards._cudnn_version() == version


@pytest.mark.parametrize("hip, expected", [("6.4", ("AMD", False, (0, 0))), (None, (NVIDIA, True, (9, 19)))])
def test_rocm_has_no_cudnn_although_pytorch_says_so(hip, expected, monkeypatch):
    class Properties:
        name, major, minor, total_memory = "card", 9, 0, 2**30

    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91900)
    found = cards.card_of.__wrapped__(torch.device("cuda", 0))
    assert (found.vendor, found.has_cudnn, found.cudnn_version) == expected
    assert ("NVIDIA" in (engines.hopper_runs_on(found) or "")) == (hip is not None)
    assert (library.cudnn_supports(call(), found, Choice()) is None) == (hip is None)


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None  # importing it fails
import torch
from hnf_attention import AttentionStabilityMonitor, attention
from hnf_attention.engine import card, engines, fold
windows = card.Card("4090", card.NVIDIA, (8, 9), triton=card._triton_version())
assert windows.triton is None
engines.card_of = fold.card_of = lambda device: windows
x = torch.randn(1, 2, 70, 16, requires_grad=True)
attention(x, x, x, is_causal=True)[0].sum().backward()
model = torch.nn.MultiheadAttention(16, 2, batch_first=True)
for mode in ("probe", "fused", "auto"):
    with AttentionStabilityMonitor(model, log_every=1, mode=mode) as monitor:
        y = torch.randn(2, 9, 16)
        model(y, y, y, need_weights=False)[0].sum().backward()
        assert len(monitor.on_step().stats) == 1 and str(monitor.status) == "all parts work", monitor.status
"""


@pytest.mark.slow
def test_a_card_without_triton_measures_and_trains():
    subprocess.run([sys.executable, "-c", WITHOUT_TRITON], check=True, timeout=300)


def test_other_versions_of_triton_keep_pytorchs_backward(monkeypatch):
    card = Card(**vars(OTHER_TRITON) | {"cudnn_version": (9, 19)})
    assert taken(call(), monkeypatch, card) == CUDNN
