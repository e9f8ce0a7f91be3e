"""Which engine each kind of call takes on this machine, and why not a faster one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...engine import engines, library
from ...engine.call import Call, prepare
from ...engine.card import current_device

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HEAD_DIMS = (16, 32, 64, 80, 96, 112, 128, 192, 256)
_LENGTH, _HEADS, _HEAD_DIM, _DTYPE = 256, 8, 128, torch.bfloat16  # of the calls of `kinds`
_USUAL: dict[str, Any] = {
    "attn_mask": None,
    "is_causal": True,
    "scale": None,
    "window_size": None,
    "softcap": None,
    "sinks": None,
    "extended": False,
}


@dataclass(frozen=True)
class Kind:
    """A kind of call: the engine of its forward and of its backward, and why each faster engine does not take it."""

    kind: str
    forward: str
    backward: str
    reasons: dict[str, str]


def by_head_dim() -> dict[str, list[tuple[torch.dtype, int]]]:
    """Which (dtype, head dimension) takes which "forward / backward", for plain causal training calls."""
    found: dict[str, list[tuple[torch.dtype, int]]] = {}
    for dtype, head_dim, call in _plain_calls():
        taken = _kind("", call)
        found.setdefault(f"{taken.forward} / {taken.backward}", []).append((dtype, head_dim))
    return found


def reasons() -> dict[str, str]:
    """Why a faster engine was not taken, "engine: reason", and in which of the calls of `by_head_dim`."""
    found: dict[str, list[tuple[torch.dtype, int]]] = {}
    for dtype, head_dim, call in _plain_calls():
        for engine, reason in _kind("", call).reasons.items():
            found.setdefault(f"{engine}: {reason}", []).append((dtype, head_dim))
    all_calls = len(DTYPES) * len(HEAD_DIMS)
    return {text: "all" if len(calls) == all_calls else by_dtype(calls) for text, calls in found.items()}


def by_dtype(taken: list[tuple[torch.dtype, int]]) -> str:
    """The head dimensions of each dtype, a dtype a line."""
    dims: dict[torch.dtype, list[str]] = {}
    for dtype, head_dim in taken:
        dims.setdefault(dtype, []).append(str(head_dim))
    return "\n".join(f"{_name(dtype)}: {', '.join(each)}" for dtype, each in dims.items())


def kinds() -> list[Kind]:
    """Kinds of calls that differ in what an engine has to compute; all else is as in `kinds_text`."""
    return [_kind(name, call) for name, call in _kinds_of_calls().items()]


def kinds_text() -> str:
    """What the calls of `kinds` have in common."""
    return f"{_name(_DTYPE)}, {_HEADS} heads of {_HEAD_DIM}, {_LENGTH} tokens"


def _kinds_of_calls() -> dict[str, Call]:
    q = _tensor(_HEADS, _LENGTH)
    few_keys, one = _tensor(2, _LENGTH), _tensor(_HEADS, 1)
    visible = torch.ones(_LENGTH, _LENGTH, dtype=torch.bool, device=q.device)
    edges = torch.tensor([0, _LENGTH // 2, _LENGTH])
    return {
        "causal": _call(q, q, q),
        "full": _call(q, q, q, is_causal=False),
        "grouped queries": _call(q, few_keys, few_keys),
        "one query (decoding)": _call(one, q, q, is_causal=False),
        "sliding window": _call(q, q, q, window_size=_LENGTH // 2),
        "boolean mask": _call(q, q, q, is_causal=False, attn_mask=visible),
        "bias (additive mask)": _call(q, q, q, is_causal=False, attn_mask=visible.to(q.dtype)),
        "soft-cap": _call(q, q, q, softcap=30.0),
        "sinks": _call(q, q, q, sinks=torch.zeros(_HEADS, device=q.device)),
        "packed sequences": _call(q, q, q, seqlens=edges),
        "extended statistics": _call(q, q, q, extended=True),
        "statistics alone (probe)": _call(q, q, None),
    }


def _kind(name: str, call: Call) -> Kind:
    # Without a value there is no output: its gradients are those of the statistics.
    statistics = call.value is None
    gradients = engines.STATISTICS_BACKWARD if statistics else engines.output_backward(library.choice())
    lists = (engines.FORWARD, gradients)
    explained = [engines.explain(each, call) for each in lists]
    forward, backward = (each[-1][0] for each in explained)
    refused = {engine: reason for each in explained for engine, reason in each if reason is not None}
    return Kind(name, forward, backward, refused)


def _plain_calls() -> Iterator[tuple[torch.dtype, int, Call]]:
    for dtype in DTYPES:
        for head_dim in HEAD_DIMS:
            q = _tensor(1, _LENGTH, head_dim, dtype)
            yield dtype, head_dim, _call(q, q, q)


def _call(query: Tensor, key: Tensor, value: Tensor | None, **options: Any) -> Call:
    return prepare(query, key, value, **(_USUAL | options))


def _tensor(heads: int, length: int, head_dim: int = _HEAD_DIM, dtype: torch.dtype = _DTYPE) -> Tensor:
    return torch.empty(1, heads, length, head_dim, dtype=dtype, device=current_device())


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
