"""QK-clip as a standing policy: after every optimizer step, each head over its limit is brought back to it.

The rule of MuonClip (Kimi K2, arXiv 2507.20534, section 2.1): if the largest score S of a head passes the threshold t,
the query and key weights of the head are each multiplied by sqrt(t / S).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..instrumentation.treated import Treated
from ..names import display_name, named_modules, unwrapped
from . import good_states, layout
from .action import Action, Preview, Reading, Verdict
from .clip_now import ClipNow, ModelForward
from .clip_peers import ClipPeers
from .intervention import check_positive
from .projections import Projections
from .scaling import refuse_masters
from .shards import own_part
from .sizes import MEASURES, ScoreSizes

THRESHOLD = 100.0  # nats; of Kimi K2
#: By what a head may be over the threshold at a reading, of it: one optimizer step lies between a clip and a forward.
ONE_STEP = 0.5

_log = logging.getLogger("hnf_attention")


class QKClip:
    """Keeps the scores of every head within a threshold, beside any optimizer.

        clip = QKClip(model, threshold=100).attach(optimizer)
        for batch in loader:
            train_step(model, batch, optimizer)        # clips in optimizer.step()

    Or call `clip.step()` after each `optimizer.step()`. Each training forward since the last step counts; forwards
    without grad do not. Only heads over the threshold change: all others keep their weights bit for bit.

    threshold: nats. measure: what has to stay within it.
        "range": the largest score of a row minus its smallest one, over visible keys. A key bias adds one number to a
            whole row. The softmax does not see it, and it clips nothing.
        "max_logit": the largest score, as Kimi K2 has it.
        Either is measured on scale * q.k, which follows the weights. An additive bias and a soft-cap are left out.
    within_step: from the second step on, the factors of a training forward are applied to its own queries too, before
        their scores are formed: no softmax of the training sees a head over the threshold, however much one step of the
        optimizer adds to it. The gradient takes the factors for constants. It takes layers that call
        scaled_dot_product_attention, not in a compiled graph; others are clipped after the step alone. So are calm
        layers, which saves time: those whose sizes would stay below half of the threshold if they grew twice more by
        what they grew by at most of late. False clips after the step alone, and leaves layers that are far below the
        threshold alone at seven steps of eight.
    group: the processes that hold the same layers, whole, in shards, or split by heads (DTensors); None for all of
        torch.distributed. In a pipeline, those of one stage. All of them step equally often. The largest size of a
        head over all of them counts, and a layer that one of them has to refuse is clipped in none. At steps 1, 2, 4,
        8, ... they say which layers they saw and refuse; a layer whose first forward comes between is clipped from the
        next of these on. A process without a forward takes part, and clips by what the others saw.

    Factors are computed and multiplied in on the device. The host does not wait, unless FSDP2 shards the weights;
    with other processes it waits at steps 1, 2, 4, 8, ...
    Sizes are those of the step's own forward. They are exact for every head that may be over the threshold, in layers
    that may be over half of it: see `ScoreSizes` for the others.
    Where several query heads share a key head, the queries take the whole factor.

    A layer is clipped only on proof that its scores, and nothing else, follow the weights: see `apply_intervention`.
    Others are listed in `refused`, and a warning says so once. If no layer can be clipped, or the processes of the
    group hold different layers, the first `step()` raises ValueError in all of them. If none has run a forward, it
    raises RuntimeError.

    Raises ValueError or TypeError for wrong arguments.
    """

    def __init__(
        self,
        model: nn.Module,
        threshold: float = THRESHOLD,
        measure: str = "range",
        *,
        within_step: bool = True,
        group: Any = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"expected model to be a torch.nn.Module, got {type(model).__name__}")
        self.threshold = check_positive("threshold", threshold)
        if measure not in MEASURES:
            raise ValueError(f"expected measure in {MEASURES}, got {measure!r}")
        self.measure = measure
        #: Layers that cannot be clipped, and why.
        self.refused: dict[str, str] = {}
        #: How many steps were ended.
        self.steps = 0
        self._model = unwrapped(model)
        self._peers = ClipPeers(self._model, group)
        self._optimizers: list[torch.optim.Optimizer] = []
        self._hooks: list[Any] = []
        self._found: dict[str, tuple[tuple[int, ...], Projections]] = {}
        self._last: dict[str, Tensor] = {}
        self._within: list[tuple[nn.Module, ClipNow]] | None = [] if within_step else None
        self._forward, self._forward_hooks = ModelForward(), list[Any]()
        self._sizes = ScoreSizes(model, self.threshold, measure, self)

    def __repr__(self) -> str:
        state = f"{len(self._found)} layers, {len(self.refused)} refused, {self.steps} steps"
        return f"QKClip(threshold={self.threshold:g}, measure={self.measure!r}, {state})"

    def attach(self, *optimizers: torch.optim.Optimizer) -> QKClip:
        """Step after each step of these optimizers: those that update query and key weights. Returns this object."""
        for optimizer in optimizers:
            if not isinstance(optimizer, torch.optim.Optimizer):
                raise TypeError(f"expected a torch.optim.Optimizer, got {type(optimizer).__name__}")
            self._optimizers.append(optimizer)
            self._hooks.append(optimizer.register_step_post_hook(lambda *_: self.step()))
        return self

    @property
    def sizes(self) -> Mapping[str, list[float]]:
        """The size of each head by layer, in nats, when it was last looked at; waits for the device.

        An upper bound for heads within the threshold: see `ScoreSizes`.
        """
        return {layer: sizes.tolist() for layer, sizes in self._last.items()}

    @torch.no_grad()
    def step(self) -> None:
        """Clip by what the training forwards since the last step showed. Call it after `optimizer.step()`."""
        self.steps += 1
        good_states.settle(self._model)
        # Whether a layer can be clipped is known here, or by all processes together: at steps 1, 2, 4, 8, ...
        settled = self._peers.alone or self.steps & (self.steps - 1) == 0
        if settled:
            for name, reason in self._peers.meet(self._sizes, self._why_not).items():
                self._refuse(name, reason)
        # Another process may have seen what this one has left alone.
        self._clip([x for x in self._peers.held if self._sizes.layers[x].seen or not self._peers.alone])
        self._sizes.restart()
        if self._within is not None:
            self._clip_within(self._within)
        if settled and not self._found:
            reasons = "; ".join(f"{display_name(name)}: {why}" for name, why in self.refused.items())
            raise ValueError(f"expected a model with a layer that QK-clip can treat, got none ({reasons})")

    def remove(self) -> None:
        """End the policy. The weights stay as they are."""
        while self._hooks:
            self._hooks.pop().remove()
        self._optimizers.clear()
        self._sizes.restore()
        while self._within:
            Treated.remove(*self._within.pop())
        while self._forward_hooks:
            self._forward_hooks.pop().remove()

    def restore(self) -> None:
        """The same as `remove`: `hnf_attention.restore(model)` and a later `QKClip` of the model end this one."""
        self.remove()

    def _clip_within(self, attached: list[tuple[nn.Module, ClipNow]]) -> None:
        """Have the layers that were found clip their own forwards, those that do not yet."""
        if not self._forward_hooks:
            self._forward_hooks += [
                self._model.register_forward_pre_hook(self._forward.begin),
                self._model.register_forward_hook(self._forward.end, always_call=True),
            ]
        known = {id(module) for module, _ in attached}
        modules = dict(named_modules(self._model))
        for name in self._found:
            module = modules[name]
            if id(module) not in known:
                change = ClipNow(self._sizes.layers[name], self.threshold, self.measure, self._forward)
                Treated.add(module, change)
                attached.append((module, change))
                self._sizes.within.add(name)

    def _clip(self, names: list[str]) -> None:
        """Bring the heads of these layers back to the threshold."""
        layers = self._sizes.layers
        by_device: dict[torch.device, list[str]] = {}
        for name in names:
            by_device.setdefault(layers[name].largest.device, []).append(name)
        for together in by_device.values():
            found = {name: self._projections(name, self._peers.held[name].own_heads) for name in together}
            sizes = self._peers.largest(together, self._sizes, set(self.refused))
            largest = torch.cat(sizes)
            over = largest.isfinite() & (largest > self.threshold)
            whole = torch.where(over, self.threshold / largest, 1.0)
            lengths = list(map(len, sizes))
            for name, mine, factor, root in zip(
                together, largest.split(lengths), whole.split(lengths), whole.sqrt().split(lengths)
            ):
                if layers[name].seen:
                    self._last[name] = mine
                weights = found[name]
                if weights is not None:
                    shared = weights.keys_shared
                    weights.multiply(factor if shared else root, None if shared else root)

    def _projections(self, layer: str, heads: int) -> Projections | None:
        """The layer's weights; None if it cannot be clipped."""
        reason = self._why_not(layer, heads)
        if reason is None:
            return self._found[layer][1]
        self._refuse(layer, reason)
        return None

    def _why_not(self, layer: str, heads: int) -> str | None:
        """Why this process cannot clip a layer. Its weights are found once, and again when
        their memory has moved or the number of heads is another."""
        if layer in self.refused:
            return self.refused[layer]
        known = self._found.get(layer)
        if known is not None and known[0] == _places(known[1]) and known[1].num_heads == heads:
            return None
        try:
            found = layout.find(self._model, layer, heads, own=True)
            for optimizer in self._optimizers:
                refuse_masters(layer, found.parameters, optimizer)
        except ValueError as reason:
            return str(reason)
        self._found[layer] = _places(found), found
        return None

    def _refuse(self, layer: str, reason: str) -> None:
        """Leave a layer alone from now on."""
        self._found.pop(layer, None)
        if layer not in self.refused:
            _log.warning("QK-clip leaves layer %s alone: %s", display_name(layer), reason)
        self.refused[layer] = reason


def _places(found: Projections) -> tuple[int, ...]:
    if found.shards is not None:
        return tuple(map(id, found.parameters))
    return tuple([own_part(x.detach()).data_ptr() for x in found.parameters])


class StandingClip(Action):
    """`QKClip` as an action. Reverting ends it; the weights stay as they were trained under it. group: of `QKClip`."""

    name = "standing_qk_clip"

    def __init__(
        self,
        model: nn.Module,
        optimizers: list[torch.optim.Optimizer],
        intervention: Mapping[str, Any],
        group: Any = None,
    ):
        super().__init__()
        if not optimizers:
            raise ValueError("expected an optimizer for standing_qk_clip, got None")
        self._threshold = check_positive("'threshold'", intervention.get("threshold", THRESHOLD))
        self._measure = intervention.get("measure", "range")
        if self._measure not in MEASURES:
            raise ValueError(f"expected 'measure' in {MEASURES}, got {self._measure!r}")
        self._model, self._optimizers, self._group = model, optimizers, group
        self.clip: QKClip | None = None

    def preview(self) -> Preview:
        """As `Action.preview`."""
        what = "range of a row's scores" if self._measure == "range" else "largest score"
        text = (
            f"from now on, QK-clip after every step: the {what} of each head at most {self._threshold:g} nats"
        )
        return Preview(text, {"threshold": self._threshold, "measure": self._measure})

    def verify(self, reading: Reading) -> Verdict:
        """Whether every head that is clipped was measured within the threshold, and what one step adds."""
        if self.clip is None or not self.clip.steps:
            return Verdict(None, "no step has ended yet")
        found = {
            layer: stats.logit_range_max if self._measure == "range" else stats.max_logit
            for layer, stats in reading.items()
            if layer not in self.clip.refused
        }
        if not found:
            return Verdict(None, "no layer that is clipped was measured")
        layer, largest = max(
            ((name, float(sizes.max())) for name, sizes in found.items()), key=lambda x: x[1]
        )
        text = f"up to {largest:.1f} nats in {display_name(layer)}, threshold {self._threshold:g}"
        return Verdict(largest <= self._threshold * (1 + ONE_STEP), text)

    def _do(self, undo: list[Callable[[], Any]]) -> str:
        last = self._optimizers[-1:] if len(self._optimizers) == 1 else self._holders()
        self.clip = QKClip(self._model, self._threshold, self._measure, group=self._group)
        undo.append(self.clip.remove)
        self.clip.attach(*last)
        return self.preview().text

    def _holders(self) -> list[torch.optim.Optimizer]:
        """The optimizers that hold matrices, where query and key weights are."""
        held = [any(p.dim() > 1 for g in one.param_groups for p in g["params"]) for one in self._optimizers]
        return [one for one, holds in zip(self._optimizers, held) if holds]
