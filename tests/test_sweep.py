"""Random calls, where PyTorch's SDPA is the measure: ours never raises, and is finite and as exact where SDPA is."""

import math
from contextlib import nullcontext

import pytest
import torch
from random_calls import Arguments, random_call
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from hnf_attention import attention, attention_stats, instrument
from hnf_attention.engine import engines
from hnf_attention.engine.card import NVIDIA, Card

KINDS = 16  # of kernels that the sweep on a card compiles
INTERPRETED = (torch.float16, torch.float32)  # Triton's interpreter multiplies no bf16
CARD_CALLS, MODEL_CALLS = 2000, 1504  # on a card; those from MODEL_CALLS on go through an instrumented model


class Model(nn.Module):
    """SDPA as a model calls it."""

    def forward(self, query, key, value, **keywords):
        return functional.scaled_dot_product_attention(query, key, value, **keywords)


def _results(function, leaves: list[Tensor], d_out: Tensor | None) -> list[Tensor]:
    """The output, and the gradients where a cotangent is given."""
    out = function(*leaves)
    if d_out is None:
        return [out]
    gradients = torch.autograd.grad(out, leaves, d_out.to(out.dtype), allow_unused=True)
    return [out.detach(), *(torch.zeros_like(x) if g is None else g for x, g in zip(leaves, gradients))]


def _theirs(call: Arguments, leaves: list[Tensor], d_out: Tensor | None) -> list[list[Tensor]]:
    """Results of the kernel that PyTorch chooses and of its plain one; none where it raises.

    Only of the plain one where others of PyTorch 2.11 end the process: they divide by a size of 0, and read 16 bytes
    at once from any place (pytorch/pytorch#183484).
    """
    found = []
    for plainly in (False, True) if all(x.numel() and _is_aligned(x) for x in call.tensors()) else (True,):
        try:
            with sdpa_kernel(SDPBackend.MATH) if plainly else nullcontext():
                found.append(_results(call.sdpa, leaves, d_out))
        except RuntimeError:
            return []
    return found


def _is_aligned(x: Tensor) -> bool:
    """Whether x starts, and each of its rows does, at a multiple of 16 bytes; always so on a CPU."""
    places = x.data_ptr(), *(step * x.element_size() for step in x.stride()[:-1])
    return not x.is_cuda or not any(place % 16 for place in places)


def _roundings(call: Arguments, d_out: Tensor | None, name: str, truth: Tensor) -> float:
    """What one rounding of the result, and one of the scores in fp32, change.

    A gradient of the scores is a difference of terms that may cancel: they are rounded at their own size.
    """
    size = float(truth.norm())
    scale = abs(call.scale) if call.scale is not None else max(1, call.query.shape[3]) ** -0.5
    query, key, value = (float(x.double().norm(dim=-1).max()) if x.numel() else 0.0 for x in call.tensors())
    relative = torch.finfo(call.query.dtype).eps + torch.finfo(torch.float32).eps * scale * query * key
    if name in ("dq", "dk") and d_out is not None and d_out.numel() and truth.numel():
        largest = float(d_out.double().norm(dim=-1).max()) * value * scale * (key if name == "dq" else query)
        size = max(size, largest * math.sqrt(truth.numel() / truth.shape[-1]))
    return relative * size


def _error(got: Tensor, exact: Tensor) -> float:
    return float((got.double() - exact).norm())


def compare(call: Arguments, ours, trained: bool) -> list[str]:
    """What is worse about `ours(q, k, v)` than about SDPA; empty if nothing is."""
    leaves = [x.detach().requires_grad_(trained) for x in call.tensors()]
    shape = (*call.query.shape[:3], call.value.shape[3])
    d_out = torch.randn(shape, generator=torch.Generator().manual_seed(1)) if trained else None
    shown = call.shown()
    if d_out is not None:
        d_out = d_out.to(call.query) * shown
    theirs = _theirs(call, leaves, d_out)
    if not theirs:
        return []
    mine = _results(ours, leaves, d_out)
    worse = []
    # fp32 scores of this size have no exact weights: only the size of what comes out is compared.
    vague = call.values in ("huge", "large")
    exact = None
    for number, name in enumerate(("out", "dq", "dk", "dv")[: len(mine)]):
        got, known = mine[number], [result[number] for result in theirs]
        if number == 0 and got.shape == shape:
            got, known = got * shown, [x * shown for x in known]
        if got.shape != known[0].shape or got.dtype != known[0].dtype:
            worse.append(
                f"{name} is {got.dtype} {tuple(got.shape)}, SDPA's {known[0].dtype} {tuple(known[0].shape)}"
            )
        elif number and call.values == "equal" and call.query.dtype == torch.float16:
            continue  # differences of such numbers are rounding alone, and leave the format
        elif all(bool(x.isfinite().all()) for x in known):
            if not got.isfinite().all():
                worse.append(
                    f"{name}: {int((~got.isfinite()).sum())} of {got.numel()} numbers are not finite"
                )
            elif not vague and not (number and call.values == "equal"):
                if exact is None:
                    wide = [x.detach().double().requires_grad_(trained) for x in leaves]
                    exact = _results(call.exact, wide, d_out)
                truth = exact[number] if number else exact[number] * shown
                error, allowed = _error(got, truth), max(_error(x, truth) for x in known)
                if error > 2 * allowed + _roundings(call, d_out, name, truth) + 1e-12:
                    worse.append(
                        f"{name}: error {error:.2e}, SDPA's {allowed:.2e}, size {float(truth.norm()):.2e}"
                    )
    return [f"{call.text}: {line}" for line in worse]


def plain(call: Arguments):
    return lambda q, k, v: attention(q, k, v, **call.shared())[0]


def check_statistics(call: Arguments) -> list[str]:
    """What is wrong with the statistics of a call whose scores are finite."""
    rows = attention_stats(call.query, call.key, **call.shared())
    worse = []
    if any(x.isnan().any() for x in (rows.lse, rows.entropy, rows.max_logit, rows.min_logit)):
        scores = call.query.float() @ call.key.repeat_interleave(call.group, 1).float().transpose(2, 3)
        if scores.isfinite().all() and call.values != "huge":
            worse.append(f"{call.text}: statistics are NaN")
    elif (rows.max_weight > 1.001).any() or (rows.entropy < -1e-3).any() or (rows.logit_range < 0).any():
        worse.append(f"{call.text}: a weight over 1, or an entropy or a range below 0")
    return worse


def sweep(numbers, device: str, **limits) -> list[str]:
    """What is worse than SDPA in the calls of these numbers."""
    worse = []
    for number in numbers:
        call = random_call(number, device, **limits)
        try:
            worse += compare(call, plain(call), trained=number % 2 == 0)
            worse += check_statistics(call)
        except Exception as error:
            worse.append(f"{call.text}: {type(error).__name__}: {error}")
    return worse


def instrumented_sweep(numbers, device: str, **limits) -> list[str]:
    """The same through an instrumented model whose attention is replaced by ours."""
    worse, model = [], Model()
    with instrument(model, "fused"):
        for number in numbers:
            call = random_call(number, device, **limits)
            keywords = call.shared() | {"enable_gqa": call.group > 1}
            try:
                worse += compare(call, lambda q, k, v, kw=keywords: model(q, k, v, **kw), number % 2 == 0)
            except Exception as error:
                worse.append(f"{call.text}: {type(error).__name__}: {error}")
    return worse


@pytest.fixture
def interpreter(monkeypatch):
    """Calls on the CPU go to the kernels, through Triton's interpreter."""
    card = Card("interpreter", NVIDIA, (8, 0), triton="3.9.0")
    monkeypatch.setattr(engines, "card_of", lambda device: card)
    monkeypatch.setattr(engines, "on_device", lambda query: nullcontext())


def report(worse: list[str]) -> str:
    return "\n".join([f"{len(worse)} faults", *worse[:20]])


def test_random_calls_of_the_reference_are_never_worse_than_sdpa():
    worse = sweep(range(46), "cpu", largest=65)
    assert not worse, report(worse)


def test_random_calls_of_the_kernels_are_never_worse_than_sdpa(interpreter):
    small = (1002, 1009, 1011, 1019, 1022, 1038)  # masked, causal, unaligned and overlapping
    worse = sweep(small, "cpu", largest=17, dtypes=INTERPRETED)
    assert not worse, report(worse)


def test_random_calls_of_a_fused_model_are_never_worse_than_sdpa():
    worse = instrumented_sweep(range(2000, 2008), "cpu", largest=65)
    assert not worse, report(worse)


@pytest.mark.exhaustive
@pytest.mark.slow
def test_many_random_calls_are_never_worse_than_sdpa():
    worse = sweep(range(10_000, 10_400), "cpu") + instrumented_sweep(range(20_000, 20_100), "cpu")
    assert not worse, report(worse)


@pytest.mark.exhaustive
@pytest.mark.slow
def test_many_random_calls_of_the_kernels_are_never_worse_than_sdpa(interpreter):
    worse = sweep(range(30_000, 30_100), "cpu", largest=65, dtypes=INTERPRETED)
    assert not worse, report(worse)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("kind", range(KINDS))
def test_random_calls_on_a_card_are_never_worse_than_sdpa(kind):
    """One kind of the sweep: most of the time of a first run is compilation, which workers may share."""
    first, last = range(kind, MODEL_CALLS, KINDS), range(MODEL_CALLS + kind, CARD_CALLS, KINDS)
    worse = sweep(first, "cuda", kinds=KINDS) + instrumented_sweep(last, "cuda", kinds=KINDS)
    assert not worse, report(worse)
