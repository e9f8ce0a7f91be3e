"""What computes a call: ordered lists of engines, the fastest first, and why each one does not take it."""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import let_out
from ..reference import attention as reference
from ..reference import sampling
from ..reference.options import Options
from . import library
from .call import BackwardInputs, Call, not_half, too_wide
from .card import NO_CARD, NVIDIA, Card, card_of, on_device

HOPPER, TRITON, REFERENCE = "Hopper kernel", "Triton kernel", "PyTorch reference"
CUDNN, FLASH = "PyTorch's cudnn backward", "PyTorch's flash backward"
KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
TRITON_CAPABILITY = (8, 0)  # the least that Triton supports on NVIDIA's cards
KERNEL_HEAD_DIM, HOPPER_HEAD_DIM = 256, 256  # the largest
HOPPER_ROWS = 64  # with so few queries, one of two groups of warps has none
NO_HEAD_DIM = "a head dimension is 0"
# Versions of Triton by how they compile the Hopper forward (bench/offline.py). GPU tests ran with 3.6, and 3.7 makes
# the same inner loop. That of 3.8 and 3.9 is 7 to 10% longer and spills at D = 128.
HOPPER_TRITON, SPILLING_TRITON = ("3.6", "3.7"), ("3.8", "3.9")
# Between them, the number in place of a hidden score stays finite and far from all others (kernels/hopper/assembly.py).
LEAST_SCALE, LARGEST_SCALE = 1e-6, 1e6
HOPPER_BARE_HEAD_DIM = 128  # up to it, plain calls hide no score behind that number
ODD_SCALE = (
    f"needs a scale from {LEAST_SCALE:g} to {LARGEST_SCALE:g} beside a mask, a window, packed sequences or a head "
    f"dimension above {HOPPER_BARE_HEAD_DIM}"
)
FEW_QUERIES = f"needs more than {HOPPER_ROWS} queries"
# Where fused attention was timed and found to be cheaper than PyTorch's beside a probe: docs/performance.md has the
# figures, taken on an H100 and an H200.
MEASURED_CAPABILITY, MEASURED_HEAD_DIMS = (9, 0), (64, 128, 256)
_log = logging.getLogger("hnf_attention")

Results = tuple[Any, ...]  # of Tensor or None, see `forward` and `sample`


class Engine(NamedTuple):
    """One way to compute a call.

    supports: (call, card) -> None if this engine computes the call, else the reason, one clause to be printed.
    run: computes it; `forward`, `sample` and `backward` say from what.
    """

    name: str
    supports: Callable[[Call, Card], str | None]
    run: Callable[..., Any]


def forward(call: Call) -> Results:
    """(out, lse, entropy, max_logit, min_logit, more) of a checked call, by the first engine that supports it.

    out: None without a value, else (B, H, M, D_v) in the query's layout. The statistics are (B, H, M).
    more: None, or the EXTENDED_FIELDS, (7, B, H, M).
    """
    engine = choose(FORWARD, call)
    _say_once(engine.name, call.query.dtype, call.query.shape[3], call.query.device.type)
    return engine.run(call)


def sample(call: Call, period: int, phase: int) -> Results:
    """(lse, entropy, max_logit, min_logit, more, row_index) of the sample (period, phase) of a call's rows.

    period: an effective one, of `sampling.effective_period`.
    """
    return choose(SAMPLE, call).run(call, period, phase)


def backward(
    call: Call, inputs: BackwardInputs, mask_gradient: bool, chosen: library.Choice
) -> reference.Gradients:
    """The gradients of a call, as `reference.backward` gives them.

    chosen: `library.choice()` at the time of the forward.
    """
    if call.value is None:
        inputs = inputs._replace(d_out=None)
    # PyTorch's kernels know of no statistics, and give a mask no gradient.
    theirs = inputs.d_out is not None and inputs.d_lse is inputs.d_entropy is None and not mask_gradient
    if not theirs:
        return choose(STATISTICS_BACKWARD, call).run(call, inputs, mask_gradient)
    engine = choose(output_backward(chosen), call)
    try:
        return engine.run(call, inputs, mask_gradient)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        let_out(error)
        # cuDNN and FlashAttention refuse some calls when they run. The forward has been ours: the step must go on.
        instead = choose(STATISTICS_BACKWARD, call)
        if instead.name == engine.name:
            raise
        _warn_once(engine.name, tuple(call.query.shape), tuple(call.key.shape), str(error).partition("\n")[0])
        return instead.run(call, inputs, mask_gradient)


def choose(engines: Sequence[Engine], call: Call) -> Engine:
    """The first engine that supports the call; the reference, the last one of each list, supports all."""
    card = card_of(call.query.device)
    for engine in engines:
        if engine.supports(call, card) is None:
            return engine
    raise ValueError(f"expected an engine that supports every call, got {[e.name for e in engines]}")


def explain(engines: Sequence[Engine], call: Call) -> list[tuple[str, str | None]]:
    """(engine, why it does not take the call), fastest first, up to the engine that takes it: its reason is None."""
    card = card_of(call.query.device)
    reasons: list[tuple[str, str | None]] = []
    for engine in engines:
        reason = engine.supports(call, card)
        reasons.append((engine.name, reason))
        if reason is None:
            break
    return reasons


def why_slower(call: Call) -> str | None:
    """Why the fastest forward of a card does not take a call, "not by the Hopper kernel: ..."; None if it does."""
    if not call.query.is_cuda:
        return None
    fastest = FORWARD[0]
    reason = fastest.supports(call, card_of(call.query.device))
    return None if reason is None else f"not by the {fastest.name}: {reason}"


def kernels_cover(query: Tensor, value: Tensor | None) -> bool:
    """Whether the portable Triton kernels take these tensors."""
    return kernels_refuse(query, value) is None


def kernels_refuse(query: Tensor, value: Tensor | None) -> str | None:
    """Why the portable Triton kernels do not take these tensors; None if they do."""
    return _kernels_refuse(query, value, card_of(query.device))


def triton_supports(call: Call, card: Card) -> str | None:
    """Why the portable Triton kernels do not compute a call on that card; None if they do."""
    return _kernels_refuse(call.query, call.value, card) or (
        "there is no key" if call.key.shape[2] == 0 else None
    )


def fused_is_unmeasured(query: Tensor, value: Tensor) -> str | None:
    """Why mode="auto" probes a call that fused attention could compute; None where fused was measured to be cheaper.

    The kernels must cover the call, see `kernels_cover`.
    """
    reason = unmeasured_on(card_of(query.device)) or not_half(query.dtype)
    if reason is None and query.shape[2] <= HOPPER_ROWS:
        reason = FEW_QUERIES
    return reason or _unmeasured_width(query.shape[3], value.shape[3])


@functools.cache
def unmeasured_on(card: Card) -> str | None:
    """Why mode="auto" fuses nothing on a CUDA card; None on cards where fused attention was timed."""
    if card.vendor == NVIDIA and card.capability == MEASURED_CAPABILITY:
        return None
    return f"not measured on this card ({card.name})"


@functools.cache
def _unmeasured_width(head_dim: int, value_dim: int) -> str | None:
    if head_dim == value_dim and head_dim in MEASURED_HEAD_DIMS:
        return None
    widths = str(head_dim) if head_dim == value_dim else f"{head_dim} and {value_dim}"
    return f"not measured with head dimension {widths}"


def _kernels_refuse(query: Tensor, value: Tensor | None, card: Card) -> str | None:
    if card.vendor is None:
        return NO_CARD
    if card.triton is None:
        return "Triton is not installed"
    if card.vendor == NVIDIA and card.capability < TRITON_CAPABILITY:
        return f"needs compute capability 8.0, this card has {card.compute}"
    if query.dtype not in KERNEL_DTYPES:
        return f"needs fp16, bf16 or fp32, got {str(query.dtype).removeprefix('torch.')}"
    head_dims = (query.shape[3],) if value is None else (query.shape[3], value.shape[3])
    return NO_HEAD_DIM if 0 in head_dims else too_wide(max(head_dims), KERNEL_HEAD_DIM)


@functools.cache
def hopper_runs_on(card: Card) -> str | None:
    """Why the Hopper forward does not run on a card; None if it does."""
    if card.vendor != NVIDIA:
        return NO_CARD if card.vendor is None else "needs an NVIDIA card"
    if card.capability != (9, 0):
        return f"needs compute capability 9.0, this card has {card.compute}"
    if card.triton is None:
        return "Triton is not installed"
    version, good = ".".join(card.triton.split(".")[:2]), " or ".join(HOPPER_TRITON)
    if version in HOPPER_TRITON:
        return None
    if version in SPILLING_TRITON:
        return f"Triton {card.triton} compiles it with spilled registers: needs {good}"
    return f"Triton {card.triton} is untested: needs {good}"


def hopper_supports(call: Call, card: Card) -> str | None:
    """Why the Hopper forward does not compute a call on that card; None if it does."""
    reason = hopper_runs_on(card)
    if reason is not None:
        return reason
    query, key, value, options, extended = call
    if value is None:
        return "needs values: this call asks for statistics alone"
    if extended:
        return "does not compute the extended statistics"
    reason = _shapes_no_hopper(options, call.largest_head_dim)
    if reason is not None:
        return reason
    reason = not_half(query.dtype) or too_wide(call.largest_head_dim, HOPPER_HEAD_DIM)
    if reason is not None:
        return reason
    if value.shape[3] % 8:  # rows of the output are written 16 bytes at a time
        return "needs values with a head dimension that is a multiple of 8"
    if query.shape[2] <= HOPPER_ROWS:
        return FEW_QUERIES
    if value.numel() == 0 or query.numel() == 0:
        return "the call is empty"
    return None if options.scale > 0 else "needs a positive scale"


def _shapes_no_hopper(options: Options, head_dim: int) -> str | None:
    """What the Hopper forward cannot compute of what shapes the scores; None if it computes everything.

    The visible keys of each row must form one interval. Whether those of a boolean mask do is known on the device only:
    rows of another mask are computed by the portable kernel, behind the Hopper forward.
    """
    mask, _, scale, window_size, softcap, _, seqlens = options
    if softcap is not None:
        return "takes no soft-cap"
    if mask is not None:
        if mask.dtype != torch.bool:
            return "takes no additive mask"
        if seqlens is not None:
            return "takes no mask beside packed sequences"
    unmasked = mask is window_size is seqlens is None and head_dim <= HOPPER_BARE_HEAD_DIM
    if unmasked or scale <= 0 or LEAST_SCALE <= scale <= LARGEST_SCALE:
        return None
    return ODD_SCALE


def reference_supports(call: Call, card: Card) -> None:
    """The reference computes every call, on any device."""


@functools.cache
def kernel(name: str) -> Any:
    """A module of `kernels`, which import Triton. An import statement would cost each call several microseconds."""
    return importlib.import_module(f"..kernels.{name}", __package__)


def _hopper_forward(call: Call) -> Results:
    with on_device(call.query):
        return kernel("hopper.host").forward(*call[:4])


def _triton_forward(call: Call) -> Results:
    query, key, value, options, extended = call
    with on_device(query):
        if value is None:
            return None, *kernel("portable.probe").probe(query, key, options, extended=extended)[:-1]
        return kernel("portable.forward").forward(query, key, value, options, extended=extended)


def _triton_sample(call: Call, period: int, phase: int) -> Results:
    query, key, _, options, extended = call
    with on_device(query):
        return kernel("portable.probe").probe(query, key, options, extended=extended, sample=(period, phase))


def _triton_backward(call: Call, inputs: BackwardInputs, mask_gradient: bool) -> reference.Gradients:
    with on_device(call.query):
        return kernel("portable.backward").backward(*call[:4], *inputs, mask_gradient=mask_gradient)


def _reference_forward(call: Call) -> Results:
    with no_autocast(call.query):
        out, rows = reference.attention(*call[:4], extended=call.extended)
    return out, *rows.pack(call.extended)


def _reference_sample(call: Call, period: int, phase: int) -> Results:
    query, key, _, options, extended = call
    batch, heads, num_queries, _ = query.shape
    index = sampling.row_index(batch, heads, num_queries, period, phase, query.device)
    with no_autocast(query):
        rows = reference.attention(query, key, None, options, extended=extended, index=index)[1]
    return *rows.pack(extended), index


def _reference_backward(call: Call, inputs: BackwardInputs, mask_gradient: bool) -> reference.Gradients:
    with no_autocast(call.query):
        return reference.backward(*call[:4], *inputs, mask_gradient=mask_gradient)  # type: ignore[arg-type]


def no_autocast(query: Tensor) -> AbstractContextManager[Any]:
    """The reference chooses its own precision: autocast must not round its products again."""
    device = query.device.type
    return nullcontext() if device == "meta" else torch.autocast(device, enabled=False)


@functools.lru_cache(maxsize=256)
def _warn_once(engine: str, query: tuple[int, ...], key: tuple[int, ...], error: str) -> None:
    _log.warning(
        "%s refused a query of shape %s and a key of shape %s, the gradient is computed by this project's own: %s",
        engine,
        query,
        key,
        error,
    )


@functools.cache
def _say_once(engine: str, dtype: torch.dtype, head_dim: int, device: str) -> None:
    _log.debug(
        "attention of head dimension %d in %s on %s is computed by: %s", head_dim, dtype, device, engine
    )


FORWARD = (
    Engine(HOPPER, hopper_supports, _hopper_forward),
    Engine(TRITON, triton_supports, _triton_forward),
    Engine(REFERENCE, reference_supports, _reference_forward),
)
SAMPLE = (
    Engine(TRITON, triton_supports, _triton_sample),
    Engine(REFERENCE, reference_supports, _reference_sample),
)
# For cotangents of lse or entropy.
STATISTICS_BACKWARD = (
    Engine(TRITON, triton_supports, _triton_backward),
    Engine(REFERENCE, reference_supports, _reference_backward),
)


@functools.cache
def output_backward(chosen: library.Choice) -> tuple[Engine, ...]:
    """Engines for a cotangent of the output alone, with PyTorch's own kernels as far as the user lets them run."""
    return (
        Engine(CUDNN, functools.partial(library.cudnn_supports, chosen=chosen), library.cudnn_backward),
        Engine(FLASH, functools.partial(library.flash_supports, chosen=chosen), library.flash_backward),
        *STATISTICS_BACKWARD,
    )
