"""QK-norm as an intervention: proposed, carried out, and compared with a later reading."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from ..names import display_name
from . import optimizers as optim
from .action import Action, Preview, Reading, Verdict
from .intervention import Intervention
from .normed_call import KEY, QUERY
from .qk_norm import MOST, QKNormStart, check_bounds, is_compiled, known_layers, start_qk_norm
from .shards import own_part

#: By what a key may be longer than its gain says, of it: the gain has learned for a step since the reading's forward.
ONE_STEP = 0.5


def propose(reason: str) -> Intervention:
    """QK-norm in every layer that can have it, from the next forward on."""
    return Intervention({"action": "qk_norm", "reason": reason})


class StartQKNorm(Action):
    """`start_qk_norm` as an action. Reverting takes the norm and its gains away; other weights keep what they learnt.

    Where nothing was learnt since, the model computes bit for bit what it computed before.
    group: as for `start_qk_norm`.
    """

    name = "qk_norm"

    def __init__(
        self,
        model: nn.Module,
        optimizers: list[torch.optim.Optimizer],
        intervention: Mapping[str, Any],
        group: Any = None,
    ):
        super().__init__()
        layers = intervention.get("layers")
        if layers is not None and not isinstance(layers, (list, tuple)):
            raise ValueError(f"expected 'layers' to be a list of names of modules, got {layers!r}")
        self._least, self._most = check_bounds(intervention.get("least", 0.0), intervention.get("most", MOST))
        self._model, self._optimizers, self._group = model, optimizers, group
        self._layers = None if layers is None else known_layers(model, layers)
        optim.vector_group(optimizers)
        if is_compiled(model):
            raise ValueError(
                "expected a model that is not compiled for the action qk_norm, got a compiled one: call "
                "start_qk_norm(model, optimizer, forward=...), which measures the gains without the graphs"
            )
        self.started: QKNormStart | None = None

    def preview(self) -> Preview:
        """As `Action.preview`: gains are measured in the next forward."""
        where = "every layer that can have it" if self._layers is None else ", ".join(sorted(self._layers))
        text = f"QK-norm in {where}, gains to be measured in the next forward, at most {self._most:g}"
        return Preview(
            text, {"layers": None if self._layers is None else sorted(self._layers), "most": self._most}
        )

    def verify(self, reading: Reading) -> Verdict:
        """Whether every key is as short as its gain makes it: gain * sqrt(D)."""
        if self.started is None or not self.started.started:
            waits = self.started is None or self.started.listening
            return Verdict(None, "the gains are not measured yet" if waits else "no layer has the norm")
        said, holds = [], True
        for name, module in self.started.layers.items():
            stats = reading.get(name)
            if stats is None:
                return Verdict(None, f"layer {display_name(name)} was not measured")
            gains, lengths = own_part(module.get_parameter(KEY).detach()), stats.key_length
            every_head = module.get_parameter(QUERY).shape[0]
            if len(lengths) == every_head:  # a reading of several processes
                lengths = lengths[self.started.part(name).of(every_head)]
            if not gains.isfinite().all() or np.isnan(lengths).all():
                return Verdict(None, f"the gains or the keys of {display_name(name)} are not finite numbers")
            most = float(gains.abs().max()) * stats.head_dim**0.5
            found = float(np.fmax.reduce(lengths, initial=0.0))
            holds &= found <= (1 + ONE_STEP) * most
            said.append(f"{display_name(name)}: keys of length {found:.2f}, {most:.2f} by their gain")
        return Verdict(holds, "; ".join(said))

    def _do(self, undo: list[Callable[[], Any]]) -> str:
        self.started = start_qk_norm(
            self._model,
            self._optimizers,
            layers=self._layers,
            most=self._most,
            least=self._least,
            group=self._group,
        )
        undo.append(self.started.revert)
        return self.preview().text
