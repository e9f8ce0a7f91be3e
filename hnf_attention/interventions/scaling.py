"""Scaling the query and key weights of heads, in all layers of a plan or in none."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from .. import compat
from ..diagnosis.trends import clip_size
from ..names import display_name
from . import good_states, holders, layout
from .action import Action, Preview, Reading, Verdict
from .projections import Projections
from .shards import own_part

T = TypeVar("T")

#: How far a size may be from the predicted one at the next reading, of it: other batches and some steps lie between.
TOLERANCE = 0.25

#: Scalings whose old weights are kept, by model.
_reversible: weakref.WeakKeyDictionary[nn.Module, list[weakref.ref[ScaleHeads]]] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class LayerScaling:
    """Factors for one layer's weights: query (H,), key (H,), or None to leave the keys alone.

    Of all heads, also where tensor parallelism splits them: each process scales its own.
    """

    layer: str
    query: Tensor
    key: Tensor | None

    def find(self, model: nn.Module) -> Projections:
        """The layer's weights. Raises ValueError if they are not to be scaled."""
        return layout.find(model, self.layer, len(self.query))

    def multiply(self, model: nn.Module) -> None:
        """Scale the weights. Raises ValueError as `find`."""
        found = self.find(model)
        mine = found.part.of(len(self.query))
        found.multiply(self.query[mine], None if self.key is None else self.key[mine])

    def inverse(self) -> LayerScaling:
        """What takes it back, to rounding."""
        return LayerScaling(self.layer, 1 / self.query, None if self.key is None else 1 / self.key)


class _Layer:
    """One layer that was scaled: its weights before, on the host, and how often they had been written to after it."""

    def __init__(self, scaling: LayerScaling, model: nn.Module):
        self._scaling, self._model = scaling, model
        self.parameters = scaling.find(model).parameters
        self.old: list[Tensor] | None = [own_part(p.detach()).to("cpu", copy=True) for p in self.parameters]
        self.versions: list[int] = []

    def multiply(self) -> None:
        self._scaling.multiply(self._model)

    def untouched(self) -> bool:
        """Whether nobody wrote to the weights since, as autograd counts it."""
        return self.versions == [compat.version(p) for p in self.parameters]

    def note(self) -> None:
        self.versions = [compat.version(p) for p in self.parameters]

    def restore(self) -> None:
        """The old weights, whatever there is now."""
        self._write(self.old or ())

    def put_back(self) -> None:
        """The old weights, bit for bit, if the weights are what they were multiplied to. Else divide them."""
        if self.old is not None:
            now = [own_part(p.detach()).clone() for p in self.parameters]
            self.restore()
            self.multiply()
            same = all(torch.equal(own_part(p.detach()), x) for p, x in zip(self.parameters, now))
            self._write(self.old if same else now)
            if same:
                return
        self._scaling.inverse().multiply(self._model)

    def _write(self, values: Sequence[Tensor]) -> None:
        for parameter, value in zip(self.parameters, values):
            own_part(parameter.detach()).copy_(value)


class ScaleHeads(Action):
    """Multiplies the query and key weights of heads, in every layer of a plan or in none.

    sizes, predicted: the size of each head by layer, nats, before and after it; None where it is not known.

    Reverting restores the old weights bit for bit if nothing was learnt since, and no later scaling is in force. Else
    it divides by the factors, and keeps what was learnt. The old weights stay on the host until the next scaling of
    weights that were trained meanwhile.

    Where processes hold parts of a layer (DTensors), each of them applies it, and none does if one refuses.
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        plan: Sequence[LayerScaling],
        sizes: Mapping[str, Sequence[float | None]] | None = None,
        predicted: Mapping[str, Sequence[float | None]] | None = None,
    ):
        super().__init__()
        self.name = name  # type: ignore[misc]
        self._model, self._sizes, self._predicted = model, sizes, predicted
        self._plan = [scaling for scaling in plan if (scaling.query != 1).any()]
        self._layers: list[_Layer] = []

    def preview(self) -> Preview:
        """As `Action.preview`."""
        texts, numbers = [], {}
        for scaling in self._plan:
            heads = torch.nonzero(scaling.query != 1).flatten().tolist()
            texts.append(f"{display_name(scaling.layer)} heads {heads}")
            numbers[scaling.layer] = {
                "query": scaling.query.tolist(),
                "key": None if scaling.key is None else scaling.key.tolist(),
            }
            for what, values in (("size", self._sizes), ("predicted", self._predicted)):
                if values is not None:
                    numbers[scaling.layer][what] = list(values[scaling.layer])
        text = f"scaled the weights of {', '.join(texts)}" if texts else "nothing to scale"
        return Preview(text, numbers)

    def verify(self, reading: Reading) -> Verdict:
        """Compare the predicted size of each head that was scaled with the measured one."""
        if self._predicted is None:
            return Verdict(None, "no size was predicted")
        off = []
        for scaling in self._plan:
            stats = reading.get(scaling.layer)
            if stats is None:
                return Verdict(None, f"layer {display_name(scaling.layer)} was not measured")
            for head, (wanted, found) in enumerate(zip(self._predicted[scaling.layer], clip_size(stats))):
                if wanted is not None and scaling.query[head] != 1:
                    off.append(
                        (found / wanted if np.isfinite(found) else np.inf, scaling.layer, head, wanted, found)
                    )
        if not off:
            return Verdict(True, "nothing was scaled")
        worst = max(off, key=lambda x: abs(np.log(max(x[0], 1e-30))))
        text = f"{display_name(worst[1])} head {worst[2]}: {worst[3]:.1f} nats were predicted, {worst[4]:.1f} measured"
        return Verdict(bool(abs(worst[0] - 1) <= TOLERANCE), text)

    def missed(self, reading: Reading) -> bool:
        """Whether a head that was scaled down to a quarter or less has its old size at the reading of the next step.

        One optimizer step does not double weights, so they are not those that the scores follow.
        """
        for scaling in self._plan if self._sizes and self._predicted else ():
            stats = reading.get(scaling.layer)
            if stats is None:
                continue
            assert self._sizes is not None and self._predicted is not None  # for the type checker
            for was, wanted, found in zip(
                self._sizes[scaling.layer], self._predicted[scaling.layer], clip_size(stats)
            ):
                if was and wanted and wanted <= was / 4 and found > 0.9 * was:
                    return True
        return False

    def refuse_masters(self, optimizers: Iterable[torch.optim.Optimizer]) -> None:
        """Raise ValueError if an optimizer seems to keep copies of these weights."""
        held = list(optimizers)
        for scaling in self._plan:
            parameters = scaling.find(self._model).parameters
            for optimizer in held:
                refuse_masters(scaling.layer, parameters, optimizer)

    def _do(self, undo: list[Callable[[], Any]]) -> str:
        good_states.settle(self._model)
        earlier = self._earlier()
        self._layers = [
            self._together(scaling, partial(_Layer, scaling, self._model)) for scaling in self._plan
        ]
        learnt: list[bool] = []

        def note_earlier() -> None:
            for each in earlier if learnt != [True] else ():
                each.note()

        undo.append(note_earlier)
        try:
            for scaling, layer in zip(self._plan, self._layers):
                self._together(scaling, layer.multiply)
        except BaseException:
            for layer in self._layers:
                layer.restore()
            raise
        undo += [layer.put_back for layer in self._layers]
        undo.append(lambda: learnt.append(not self.untouched()))
        for each in earlier:
            each.note()
        self.note()
        _reversible.setdefault(self._model, []).append(weakref.ref(self))
        return self.preview().text

    def _together(self, scaling: LayerScaling, act: Callable[[], T]) -> T:
        """What it gives, if it raises in none of the processes that hold parts of the layer."""
        return holders.together(self._model, scaling.layer, act)

    def note(self) -> None:
        """The weights are now what this and later scalings made of them."""
        for layer in self._layers:
            layer.note()

    def untouched(self) -> bool:
        """Whether nobody wrote to the weights since `note`."""
        return all(layer.untouched() for layer in self._layers)

    def _earlier(self) -> list[ScaleHeads]:
        """Earlier scalings of this model without any training since. The others lose their old weights."""
        found = []
        for reference in _reversible.pop(self._model, []):
            each = reference()
            if each is None or not each.applied:
                continue
            if each.untouched():
                found.append(each)
            else:
                for layer in each._layers:
                    layer.old = None
        _reversible[self._model] = [weakref.ref(each) for each in found]
        return found


def refuse_masters(layer: str, parameters: Iterable[Tensor], optimizer: torch.optim.Optimizer) -> None:
    """Raise ValueError if the optimizer seems to keep fp32 copies of these 16-bit parameters of a layer.

    Its next step would write the copies over any change of the weights.
    """
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if not any(parameter.dtype == torch.float32 for parameter in held):
        return
    updated = {id(parameter) for parameter in held}
    for parameter in parameters:
        if parameter.element_size() == 2 and id(parameter) not in updated:
            raise ValueError(
                f"expected an optimizer that updates the {parameter.dtype} weights of layer {layer!r} "
                "themselves, got one with other tensors in fp32: its master weights would undo the change "
                "(hand over the model that holds them)"
            )
