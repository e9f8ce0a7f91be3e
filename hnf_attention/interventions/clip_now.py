"""QK-clip of a training forward by its own sizes, before its scores are formed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..engine.scaled import scaled_queries
from ..instrumentation.call import Unmeasurable
from ..instrumentation.interceptors import sdpa
from .sizes import LayerSizes


class ModelForward:
    """Whether the forward of the model that runs was begun under grad.

    A checkpoint runs its layers without grad first, and they have to compute then what they compute in the backward.
    """

    def __init__(self) -> None:
        self._trains = False

    def begin(self, *_: Any) -> None:
        """Hook before a forward of the model."""
        self._trains = torch.is_grad_enabled()

    def end(self, *_: Any) -> None:
        """Hook after it, also after one that raised."""
        self._trains = False

    @property
    def trains(self) -> bool:
        """Whether a call that is made now is part of a training step."""
        return self._trains or torch.is_grad_enabled()


class ClipNow:
    """The change of one module's call. sizes: take in what the forwards would have without it."""

    name, sdpa_only, optional, dropout = "QK-clip within the step", True, True, True

    def __init__(self, sizes: LayerSizes, threshold: float, measure: str, forward: ModelForward):
        self._sizes, self._threshold, self._measure, self._forward = sizes, threshold, measure, forward

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
        if module.training and self._forward.trains and self._looks(query):
            factors = self._factors(query, key, value, *rest, **named)
            if factors is not None:
                query = scaled_queries(query, factors)
        return attend(query, key, value, *rest, **named)

    def _looks(self, query: Tensor) -> bool:
        """Whether this call looks at its sizes. One that is captured in a CUDA graph stands for later steps, too."""
        if torch.compiler.is_compiling():
            return False
        captured = query.is_cuda and torch.cuda.is_current_stream_capturing()
        return captured or not self._sizes.calm(self._threshold)

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
        given = call.query, call.key, options, None
        factors = self._sizes.take_in(*given, self._measure, self._threshold)
        self._sizes.clipped += 1
        return factors
