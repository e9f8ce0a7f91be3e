"""Attention dropout of a layer: where modules keep it, and raising it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from ..instrumentation.treated import Treated
from ..names import display_name, named_modules
from .action import Action, Preview, Reading, Verdict
from .intervention import Intervention, positive

# Names of the probability of *attention* dropout (residual and output dropouts have other names).
NAMES = ("attn_dropout", "attention_dropout", "attn_drop", "attn_pdrop", "dropout_p", "dropout")
MAXIMUM = 0.5  # more than this hides the layer rather than regularising it
AMOUNT = 0.1  # added where the intervention names no amount


def propose(layer: str, reason: str) -> Intervention:
    """More attention dropout in one layer."""
    return Intervention({"action": "increase_dropout", "layer": layer, "reason": reason})


def raisable(model: nn.Module, layer: str) -> bool:
    """Whether the layer has an attention dropout below the maximum."""
    module = dict(named_modules(model)).get(layer)
    if module is None or _shared(model, module) or _refused_by(module):
        return False
    return any(getattr(holder, name) < MAXIMUM for holder, name in places(module))


class RaiseDropout(Action):
    """Adds the amount to a layer's attention dropout, up to MAXIMUM. Reverting sets the old number.

    Raises ValueError for an unknown layer, one without an attention dropout, one that shares it with others, or one
    whose attention is changed in a way that knows no dropout (a soft-cap).
    """

    name = "increase_dropout"

    def __init__(self, model: nn.Module, intervention: Mapping[str, Any]):
        super().__init__()
        amount, layer = positive(intervention, "amount", AMOUNT), intervention.get("layer")
        modules = dict(named_modules(model))
        if not isinstance(layer, str) or layer not in modules:
            raise ValueError(f"expected 'layer' to name a module of the model, got {layer!r}")
        self._layer, module = layer, modules[layer]
        self._held = places(module)
        if not self._held:
            raise ValueError(
                f"expected layer {self._layer!r} to have an attention dropout (one of {', '.join(NAMES)}), "
                f"got {type(module).__name__} with none of them"
            )
        shared = _shared(model, module)
        if shared:
            raise ValueError(
                f"expected layer {self._layer!r} to have an attention dropout of its own, got {shared} other modules "
                "that use it"
            )
        self._module = module
        self._check()
        self._before = [getattr(holder, name) for holder, name in self._held]
        self._after = [max(p, min(MAXIMUM, p + amount)) for p in self._before]

    def preview(self) -> Preview:
        """As `Action.preview`."""
        first = self._before[0], self._after[0]
        text = f"attention dropout of {display_name(self._layer)}: {first[0]:g} -> {first[1]:g}"
        return Preview(text, {"layer": self._layer, "before": first[0], "after": first[1]})

    def verify(self, reading: Reading) -> Verdict:
        """Whether the number is still there: a reading does not show dropout."""
        now = [getattr(holder, name) for holder, name in self._held]
        return Verdict(now == self._after, f"attention dropout is {now[0]:g}, set to {self._after[0]:g}")

    def _do(self, undo: list[Callable[[], Any]]) -> str:
        self._check()  # an action that was planned with this one may be in force now
        undo.append(lambda: self._put(self._before))
        self._put(self._after)
        return self.preview().text

    def _check(self) -> None:
        changed = _refused_by(self._module)
        if changed:
            raise ValueError(
                f"expected layer {self._layer!r} to be free of {changed[0]}, which knows no dropout, got one in force"
            )

    def _put(self, values: Sequence[float]) -> None:
        for (holder, name), value in zip(self._held, values):
            setattr(holder, name, value)


def places(module: nn.Module) -> list[tuple[nn.Module, str]]:
    """(holder, attribute) of each probability: models keep it as a module, as a number, or as both."""
    found: list[tuple[nn.Module, str]] = []
    for name in NAMES:
        if isinstance(getattr(type(module), name, None), property):  # computed from something else
            continue
        value = getattr(module, name, None)
        if isinstance(value, nn.Dropout):
            found.append((value, "p"))
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            found.append((module, name))
    return found


def _refused_by(module: nn.Module) -> list[str]:
    """The changes of the module's attention that know no dropout."""
    return [change.name for change in Treated.of(module) if not change.dropout]


def _shared(model: nn.Module, module: nn.Module) -> int:
    """How many modules beside this one hold its attention dropout."""
    own = {id(holder) for holder, _ in places(module) if holder is not module}
    others = (other for other in model.modules() if other is not module)
    return sum(any(id(child) in own for child in other.children()) for other in others)
