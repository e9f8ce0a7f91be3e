"""QK-clip of a training forward by its own sizes, before its scores are formed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..instrumentation.call import Unmeasurable
from ..instrumentation.interceptors import sdpa
from .sizes import LayerSizes, bounds_of_sizes, exact_sizes


class ClipNow:
    """The change of one module's call. sizes: take in what the forwards would have without it."""

    name, sdpa_only, optional = "QK-clip within the step", True, True

    def __init__(self, sizes: LayerSizes, threshold: float, measure: str):
        self._sizes, self._threshold, self._measure = sizes, threshold, measure

    def __deepcopy__(self, memo: dict[int, Any]) -> ClipNow:
        return self  # a copy of the model that is trained, too, counts as the model

    def run(
        self,
        module: nn.Module,
        attend: Callable[..., Any],
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *rest: Any,
        **named: Any,
    ) -> Any:
        """As `Change.run`: heads over the threshold get shorter queries."""
        if module.training and not torch.compiler.is_compiling():
            factors = self._factors(query, key, value, *rest, **named)
            if factors is not None:
                query = query * factors.view(-1, 1, 1).to(query.dtype)
        return attend(query, key, value, *rest, **named)

    @torch.no_grad()
    def _factors(self, *args: Any, **named: Any) -> Tensor | None:
        """(H,), 1 for heads within the threshold; None for a call that cannot be measured."""
        try:
            call = sdpa.call_of(None, *args, **named)
            call.cast()
            options = call.validated()
        except Unmeasurable:
            return None
        heads = call.query.shape[1]
        if len(self._sizes.largest) != heads or heads % call.key.shape[1]:
            return None
        layer = self._sizes
        (sizes,) = bounds_of_sizes([(call.query, call.key)], [options.scale], self._measure)
        torch.maximum(layer.top, sizes.amax(), out=layer.top)
        # The bound changes between steps alone: the second forward of a checkpoint goes the way of the first.
        if layer.bound >= self._threshold / 2:
            sizes = exact_sizes(call.query, call.key, options, None, self._measure)
        layer.raise_to(sizes)
        over = sizes.isfinite() & (sizes > self._threshold)
        return torch.where(over, self._threshold / sizes, 1.0)
