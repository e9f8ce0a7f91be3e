"""A soft-cap on the scores of a layer: cap * tanh(scores / cap), as in Gemma 2 (arXiv 2408.00118)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from ..engine import api
from ..instrumentation import observer
from ..instrumentation.call import AttentionCall
from ..instrumentation.interceptors import sdpa
from ..names import display_name
from . import dropout
from .action import Preview, Reading, Verdict
from .intervention import positive
from .on_calls import OnCalls, layers_of


class _Capped:
    """The change of one module's call: our attention, which knows soft-caps, takes the place of PyTorch's."""

    name, sdpa_only, optional, dropout = "a soft-cap", True, False, False

    def __init__(self, cap: float):
        self._cap = cap

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
        """As `Change.run`."""

        def describe(*args: Any, **kwargs: Any) -> AttentionCall:
            call = sdpa.call_of(None, *args, **kwargs)
            call.softcap, call.not_fused = self._cap, "a soft-cap is in force"
            return call

        def capped(*args: Any, **kwargs: Any) -> Any:
            call = describe(*args, **kwargs)
            if (args[4] if len(args) > 4 else kwargs.get("dropout_p", 0.0)) > 0:
                raise RuntimeError(
                    "expected attention without dropout for a soft-cap, got some: set it to 0 first"
                )
            call.cast()
            out: Any = api.attend(call.query, call.key, call.value, call.validated())[0]
            return call.from_output(out)

        return observer.run(capped, (query, key, value, *rest), named, describe)


class Softcap(OnCalls):
    """Caps the scores of layers that call scaled_dot_product_attention, without attention dropout.

    intervention: 'layers' (a list of names) and optionally 'cap' (50 nats, Gemma 2's). No score is larger than the cap
    from then on. Raises ValueError for wrong items, and for a layer that has an attention dropout, in evaluation too.
    """

    name = "softcap"

    def __init__(self, model: nn.Module, intervention: Mapping[str, Any]):
        self._cap, self._names = positive(intervention, "cap", 50.0), layers_of(model, intervention)
        self._check()
        super().__init__(model, {name: _Capped(self._cap) for name in self._names})

    def preview(self) -> Preview:
        """As `Action.preview`."""
        names = list(self._names)
        text = f"scores of {', '.join(map(display_name, names))} soft-capped at {self._cap:g} nats"
        return Preview(text, {"layers": names, "cap": self._cap})

    def _do(self, undo: list[Callable[[], Any]]) -> str:
        self._check()  # an action that was planned with this one may have raised a dropout
        return super()._do(undo)

    def _check(self) -> None:
        for layer, module in self._names.items():
            for holder, name in dropout.places(module):
                if getattr(holder, name) > 0:
                    raise ValueError(
                        f"expected layer {layer!r} to have no attention dropout for a soft-cap, got "
                        f"{name} {getattr(holder, name):g} of its {type(holder).__name__}: set it to 0 first"
                    )

    def verify(self, reading: Reading) -> Verdict:
        """Whether every score lies within the cap."""
        found = {name: float(reading[name].max_abs_logit.max()) for name in self._names if name in reading}
        if len(found) < len(self._names):
            return Verdict(None, "not every capped layer was measured")
        worst = max(found, key=lambda name: found[name])
        text = f"scores of {display_name(worst)} reach {found[worst]:.1f} nats, the cap is {self._cap:g}"
        return Verdict(found[worst] <= self._cap * (1 + 1e-3), text)
