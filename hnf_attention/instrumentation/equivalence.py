"""Whether the model's attention computes what its description says.

An eager function runs on a few rows beside ours. A library may return its lse or its largest
scores, which are compared as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..engine import api
from ..reference.masks import take_rows
from ..statistics.rows import RowStats
from ..tracing import captured
from .call import AttentionCall, Unmeasurable

CHECKED_ROWS = 64
#: How far the lse or the largest score of a library may lie from ours: nats, and a share of its size. Kernels compute
#: the tanh of a soft-cap in half precision, which moves a score by 5e-4 of the cap.
RETURNED_TOLERANCE = 1e-2, 1e-3


@torch.no_grad()
def check_equivalence(
    original: Callable[..., Any],
    module: nn.Module,
    mask: Tensor | None,
    options: Mapping[str, Any],
    call: AttentionCall,
) -> bool:
    """Compare what `original` computes with what `call` says, on the last CHECKED_ROWS rows of the first sequence.

    original: called as transformers calls it, (module, query, key, value, mask, **options), each tensor as in `call`.
    Both compute in double precision (single on MPS), so that no rounding counts as a difference.

    True if they agree, False if there is nothing finite to compare. Raises Unmeasurable if they differ.
    """
    wide = torch.float32 if call.query.device.type == "mps" else torch.float64

    def last_rows(x: Tensor) -> Tensor:
        x = x[:1, :, -CHECKED_ROWS:] if x.shape[2] > 1 else x[:1]
        return x.to(wide) if x.is_floating_point() else x

    query, key, value = last_rows(call.query), call.key[:1].to(wide), call.value[:1].to(wide)
    options = dict(options)
    if "dropout" in options:
        options["dropout"] = 0.0
    if options.get("position_bias") is not None:
        options["position_bias"] = last_rows(options["position_bias"])
    its_mask, our_mask = (None if x is None else last_rows(x) for x in (mask, call.attn_mask))
    with torch.autocast(query.device.type, enabled=False), _evaluating(module):
        theirs = original(module, query, key, value, its_mask, **options)[0].transpose(1, 2)
        ours, stats = api.attention(query, key, value, **call.keywords() | {"attn_mask": our_mask})
    occupied = stats.max_logit != -torch.inf
    if not occupied.any():
        return False
    difference = (theirs - ours).abs().amax(-1)[occupied].max()
    # A softmax in single precision moves a weight by the rounding of its score.
    scores = torch.maximum(stats.max_logit.abs(), stats.min_logit.abs())[occupied].max()
    tolerance = 1e-5 * value.abs().max() * (1 + scores)
    if not (difference - tolerance).isfinite():
        return False
    if difference > tolerance:
        raise Unmeasurable(
            f"its eager attention function computes something else (outputs differ by {difference:.1e})",
            lasting=True,
        )
    return True


@torch.no_grad()
def check_returned(call: AttentionCall, rows: RowStats, result: Any) -> str | None:
    """Compare the lse and the largest scores in what the model's own attention returned with ours.

    Which of them agree, in words; None if it returned neither, or nothing finite. Raises Unmeasurable if one differs.
    The host waits for the device.
    """
    if result is None or captured():
        return None
    occupied = (rows.max_logit != -torch.inf) & rows.lse.isfinite()
    agreed = []
    lse = None if call.lse_of is None else call.lse_of(result)
    if lse is not None and lse.shape == call.query.shape[:3]:
        if rows.row_index is not None:
            lse, occupied = take_rows(lse, rows.row_index), occupied & (rows.row_index >= 0)
        if occupied.any():
            _require_close("lse", rows.lse[occupied], lse[occupied])
            agreed.append("lse")
    largest = None if call.max_logit_of is None else call.max_logit_of(result)
    if largest is not None and rows.row_index is None and largest.shape == call.query.shape[1:2]:
        ours = rows.max_logit.amax((0, 2))
        if ours.isfinite().all():
            _require_close("largest score", ours, largest)
            agreed.append("largest score")
    return " and ".join(agreed) or None


def _require_close(what: str, ours: Tensor, theirs: Tensor) -> None:
    absolute, relative = RETURNED_TOLERANCE
    difference = (ours - theirs.to(ours.dtype)).abs()
    if not (difference <= absolute + relative * ours.abs()).all():
        raise Unmeasurable(
            f"the {what} that it returns is not that of its description (they differ by up to {difference.max():.1e})",
            lasting=True,
        )


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Without the module's own dropout, which would also draw from the model's random numbers."""
    modes = {child: child.training for child in module.modules()}
    try:
        for child in modes:
            child.training = False
        yield
    finally:
        for child, training in modes.items():
            child.training = training
