"""A captured operation in double precision: is its NaN one of the number format, of the kernel, or a true one?"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..diagnosis.triage.case import FITS, NOT_FINITE, TOO_LARGE, UNKNOWN, Numbers
from ..diagnosis.triage.records import OPTIMIZER, Operation
from .recorder import Captured, map_tensors, named_arguments, named_results


def evaluate(operation: Operation, captured: Captured) -> Numbers:
    """The numbers of a captured operation."""
    broken = {name: x for name, x in captured.results.items() if not _finite(x)}
    if not broken:
        return Numbers()
    name, result = next(iter(broken.items()))
    index = first_index(result)
    given = dict(named_arguments(captured.operator, captured.args, captured.kwargs))
    head = head_in_double(captured, given, result, index)
    if head is not None:
        doubles = {name: head.results[int(name)]} if int(name) < len(head.results) else {}
        shown = {name: _of_head(result, index)}
    else:  # a kernel of another library may be at fault in double precision, too
        doubles, shown = in_double(captured) if operation.library == "aten" else {}, {name: result}
    double, size = _verdict(shown[name], doubles.get(name))
    return Numbers(
        double=double,
        double_size=size,
        kind=_kind(result),
        result=name,
        index=index,
        shape=tuple(result.shape),
        scores=None if head is None else head.scores,
        least_lse=None if head is None else head.least_lse,
        zero_denominator=operation.phase == OPTIMIZER and _divides_by_zero(operation, given),
        no_targets=_without_targets(operation, captured),
        overflowed=tuple(broken),
        first=_along(result, 0),
        second=_along(result, 1),
    )


def locate(captured: Captured, given: Tensor | None) -> Numbers:
    """Where the first result of an operation that read a broken tensor is not finite. given: that tensor, if known."""
    for name, result in captured.results.items():
        if not _finite(result):
            element = () if given is None or _finite(given) else first_index(given)
            broken = 0 if given is None else int((~given.isfinite()).sum())
            return Numbers(
                kind=_kind(result),
                result=name,
                index=first_index(result),
                shape=tuple(result.shape),
                element=element,
                broken=broken,
            )
    return Numbers()


def in_double(captured: Captured) -> dict[str, Tensor]:
    """The results of the operation on double-precision copies of its tensors; {} where it cannot be computed so."""
    args, kwargs = (map_tensors(x, _double) for x in (captured.args, captured.kwargs))
    args, kwargs = (_with_double_dtypes(x) for x in (args, kwargs))
    try:
        with torch.no_grad():
            result = captured.operator(*args, **kwargs)
    except (RuntimeError, NotImplementedError, TypeError, ValueError):  # no such kernel, or no such memory
        return {}
    return dict(named_results(captured.operator, args, kwargs, result))


def _double(x: Tensor) -> Tensor:
    if not x.is_floating_point():
        return x.clone()
    return x.detach().cpu().double() if x.device.type == "mps" else x.detach().to(torch.float64, copy=True)


def _with_double_dtypes(value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return torch.float64 if value.is_floating_point else value
    if isinstance(value, dict):
        return {name: _with_double_dtypes(x) for name, x in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_with_double_dtypes(x) for x in value)
    return value


def _verdict(result: Tensor, double: Tensor | None) -> tuple[str, float | None]:
    """(what double precision gives where the result is not finite, the largest |number| there)."""
    if double is None or double.shape != result.shape or not double.is_floating_point():
        return UNKNOWN, None
    there = double[~torch.isfinite(result.to(double.device))]
    if not bool(there.isfinite().all()):
        return NOT_FINITE, None
    size = float(there.abs().max())
    return (FITS if bool(there.to(result.dtype).isfinite().all()) else TOO_LARGE), size


def first_index(result: Tensor) -> tuple[int, ...]:
    """Where the first number that is not finite stands."""
    flat = (~torch.isfinite(result)).flatten().to(torch.uint8).argmax()
    return tuple(int(x) for x in torch.unravel_index(flat, result.shape))


def _along(result: Tensor, dim: int) -> tuple[int, ...]:
    """Where along a dimension there are numbers that are not finite."""
    if result.dim() <= dim:
        return ()
    broken = (~torch.isfinite(result)).movedim(dim, 0).flatten(1).any(1)
    return tuple(broken.nonzero().flatten().tolist())


def _kind(result: Tensor) -> str:
    return "NaN" if bool(torch.isnan(result).any()) else "inf"


def _finite(x: Tensor) -> bool:
    return not x.is_floating_point() or bool(torch.isfinite(x).all())


class Head(NamedTuple):
    """One attention head in double precision.

    results: the output, or the gradients of query, key and value. scores: largest |score|. least_lse: smallest lse.
    """

    results: list[Tensor]
    scores: float
    least_lse: float


def head_in_double(
    captured: Captured, given: dict[str, Any], result: Tensor, index: tuple[int, ...]
) -> Head | None:
    """The head of a fused attention that the index points to; None if the operation is none or has another layout."""
    name = str(captured.operator)
    plain = _as_sdpa(name, given)
    if plain is None or len(index) != 4:
        return None
    query, key, value = (plain[x] for x in ("query", "key", "value"))
    batch, number = index[:2]
    backward = "backward" in name
    if result.shape[1] != query.shape[1]:  # a key head, by the first query head that reads it
        number *= query.shape[1] // max(1, result.shape[1])
    group = max(1, query.shape[1] // max(1, key.shape[1]))
    q = _double(query[batch, number]).requires_grad_(backward)
    k, v = (_double(x[batch, number // group]).requires_grad_(backward) for x in (key, value))
    with torch.enable_grad() if backward else torch.no_grad():
        scores = _scores(q, k, plain, (batch, number))
        out = scores.softmax(-1) @ v
    hidden = scores.detach() == -torch.inf
    seen = scores.detach().masked_fill(hidden, 0.0)
    least_lse = float(scores.detach().logsumexp(-1).masked_fill(hidden.all(-1), torch.inf).min())
    results = [out.detach()]
    if backward:
        gradient = plain.get("grad_out", plain.get("grad_out_"))
        if not isinstance(gradient, Tensor):
            return None
        results = list(torch.autograd.grad(out, (q, k, v), _double(gradient[batch, number])))
    return Head(results, float(seen.abs().max()), least_lse)


def _as_sdpa(name: str, given: dict[str, Any]) -> dict[str, Any] | None:
    """The arguments by the names of scaled_dot_product_attention; None for another layout or other options."""
    if not all(isinstance(x, Tensor) and x.dim() == 4 for x in map(given.get, ("query", "key", "value"))):
        return None
    if "scaled_dot_product" in name:
        return given
    if not name.startswith("hnf_attention."):
        return None
    numbers = given.get("numbers", ())
    if len(numbers) != 1 or any(given.get(x) is not None for x in ("sinks", "seqlens", "window_size")):
        return None
    return given | {"scale": numbers[0], "grad_out": given.get("d_out")}


def _scores(q: Tensor, k: Tensor, given: dict[str, Any], place: tuple[int, int]) -> Tensor:
    scale = given.get("scale")
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    mask = given.get("attn_mask", given.get("attn_bias"))
    if isinstance(mask, Tensor) and mask.numel():
        mask = mask[(None,) * (4 - mask.dim())]
        mask = mask[tuple(min(at, size - 1) for at, size in zip(place, mask.shape))]
        hidden = torch.zeros(mask.shape, dtype=torch.float64, device=mask.device)
        mask = hidden.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else _double(mask)
        scores = scores + mask.to(scores.device)
    if given.get("is_causal"):
        future = torch.ones(scores.shape, dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(future, -torch.inf)
    return scores


def _of_head(result: Tensor, index: tuple[int, ...]) -> Tensor:
    return result[index[0], index[1]]


def _divides_by_zero(operation: Operation, given: dict[str, Any]) -> bool:
    """Whether an optimizer's update divides by 0: its denominator is 0, or its second moment and epsilon are."""
    name = operation.packet.rstrip("_")
    if name in ("addcdiv", "_foreach_addcdiv"):
        denominators = given.get("tensor2", given.get("tensors2"))
    elif name in ("div", "_foreach_div"):
        denominators = given.get("other")
    elif "_fused_" in name and "exp_avg_sqs" in given and "eps" in given:
        small = given["eps"] == 0 or given["eps"] < 1e-38
        denominators = given["exp_avg_sqs"] if small else None
    else:
        denominators = None
    tensors = [denominators] if isinstance(denominators, Tensor) else denominators
    return isinstance(tensors, (list, tuple)) and any(
        isinstance(x, Tensor) and bool((x == 0).any()) for x in tensors
    )


def _without_targets(operation: Operation, captured: Captured) -> bool:
    """Whether a mean over targets has none: all of them are ignored."""
    weight = captured.results.get("1")
    return "nll_loss" in operation.packet and weight is not None and bool((weight == 0).all())
