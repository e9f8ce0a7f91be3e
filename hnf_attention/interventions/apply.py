"""Do what an intervention says, and be able to take it back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from ..names import unwrapped
from . import good_states, holders, qk_clip, temperature
from .action import Action, Reading, Verdict
from .dropout import RaiseDropout
from .epsilon import SetEpsilon
from .intervention import numbers_by_layer, share, shortened
from .items import check_items
from .layer_precision import LayerPrecision
from .learning_rate import ReduceRate
from .optimizers import as_list
from .prune import PruneHeads
from .qk_norm_action import StartQKNorm
from .qk_rate import QKRates
from .rewarm import Rewarm
from .rewind import Rewind
from .scaling import ScaleHeads
from .sigma_reparam import StartSigmaReparam
from .skip_spikes import SkipSpikes
from .softcap import Softcap
from .standing_clip import StandingClip


@dataclass(frozen=True)
class _Run:
    """What an intervention may change."""

    optimizers: list[torch.optim.Optimizer]
    given_model: nn.Module | None
    scheduler: Any
    group: Any = None

    def rates(self, factor: float, action: str) -> ReduceRate:
        """The action on learning rates."""
        if not self.optimizers:
            raise ValueError(f"expected an optimizer for {action} with a learning-rate factor, got None")
        return ReduceRate(self.optimizers, factor, self.scheduler)

    def model(self, intervention: Mapping[str, Any]) -> nn.Module:
        """The model, which a monitor's interventions know."""
        given = self.given_model
        model = getattr(intervention, "model", None) if given is None else given
        if model is None:
            raise ValueError(f"expected a model for {intervention['action']}, got None")
        return model


def _reduce_lr(run: _Run, wanted: Mapping[str, Any]) -> list[Action]:
    return [run.rates(share(wanted, "factor"), "reduce_lr")]


def _qk_clip(run: _Run, wanted: Mapping[str, Any]) -> list[Action]:
    cut: list[Action] = []
    if "lr_factor" in wanted:
        cut = [run.rates(share(wanted, "lr_factor"), "qk_clip")]
    model = run.model(wanted)
    plan = qk_clip.plan(model, wanted)
    scale = ScaleHeads("qk_clip", model, plan, numbers_by_layer(wanted), qk_clip.predicted(wanted))
    scale.refuse_masters(run.optimizers)
    return [scale, *cut]


def _temperature(run: _Run, wanted: Mapping[str, Any]) -> list[Action]:
    model = run.model(wanted)
    scale = ScaleHeads("temperature", model, temperature.plan(model, wanted))
    scale.refuse_masters(run.optimizers)
    return [scale]


#: What makes the actions of an intervention: everything is checked, nothing is changed.
_BUILDERS: dict[str, Callable[[_Run, Mapping[str, Any]], list[Action]]] = {
    "reduce_lr": _reduce_lr,
    "increase_dropout": lambda run, wanted: [RaiseDropout(run.model(wanted), wanted)],
    "qk_clip": _qk_clip,
    "temperature": _temperature,
    "standing_qk_clip": lambda run, wanted: [
        StandingClip(run.model(wanted), run.optimizers, wanted, run.group)
    ],
    "qk_norm": lambda run, wanted: [
        StartQKNorm(unwrapped(run.model(wanted)), run.optimizers, wanted, run.group)
    ],
    "rewind": lambda run, wanted: [Rewind(run.model(wanted), wanted)],
    "rewarm_lr": lambda run, wanted: [Rewarm(run.optimizers, wanted)],
    "qk_rate": lambda run, wanted: [QKRates(run.model(wanted), run.optimizers, wanted)],
    "sigma_reparam": lambda run, wanted: [StartSigmaReparam(run.model(wanted), run.optimizers, wanted)],
    "set_eps": lambda run, wanted: [SetEpsilon(run.optimizers, wanted)],
    "skip_spikes": lambda run, wanted: [SkipSpikes(run.optimizers, wanted)],
    "softcap": lambda run, wanted: [Softcap(run.model(wanted), wanted)],
    "precision": lambda run, wanted: [LayerPrecision(run.model(wanted), wanted)],
    "prune_heads": lambda run, wanted: [PruneHeads(run.model(wanted), wanted)],
}
ACTIONS = tuple(_BUILDERS)


@dataclass(repr=False)
class Applied:
    """An intervention that was carried out: what was done, how to check it, and the way back.

    outcome: what a monitor that carried it out found later: "open" until it is known, "kept", "escalated", "reverted",
        or "repeated" if the same was done again before. account: what was done and found, a sentence for each step.
    """

    intervention: Mapping[str, Any]
    description: str
    actions: list[Action] = field(default_factory=list)
    outcome: str = "open"
    account: list[str] = field(default_factory=list)

    def __repr__(self) -> str:
        outcome = "" if self.outcome == "open" else f", {self.outcome}"
        state = outcome if any(action.applied for action in self.actions) else ", reverted"
        return f"Applied({shortened(self.description)}{state})"

    def verify(self, reading: Reading) -> list[Verdict]:
        """Compare what each action predicted with a later reading: `AttentionDiagnosis.stats`."""
        return [action.verify(reading) for action in self.actions if action.applied]

    def revert(self) -> None:
        """Take it back, the last action first. A second call does nothing.

        Where nothing was learnt since, every weight, rate and dropout is what it was, bit for bit. Where something
        was, weights and rates are divided by what they were multiplied with, and keep what was learnt; a rewind's
        revert gives up what was learnt since; a standing clip ends. Raises ValueError if weights cannot be found any
        more, for example under an adapter.
        """
        for action in reversed(self.actions):
            action.revert()


def _kept_schedulers(model: nn.Module | None) -> list[Any] | None:
    """The schedulers that the model's `GoodStates` know, None for none."""
    states = None if model is None else good_states.of_model(model)
    return (states.schedulers or None) if states is not None else None


def plan_intervention(
    optimizer: torch.optim.Optimizer | Iterable[torch.optim.Optimizer] | None,
    intervention: Mapping[str, Any],
    model: nn.Module | None = None,
    *,
    scheduler: Any = None,
    group: Any = None,
) -> list[Action]:
    """The actions that `apply_intervention` would carry out, checked and not applied: see `Action.preview`.

    Same arguments and errors. It asks this process alone, also where several hold parts of a layer (DTensors). Every
    process that holds a part of it has to call this then, before all of them apply the actions in this order.
    """
    check_items(intervention)
    known = getattr(intervention, "model", None) if model is None else model
    run = _Run(as_list(optimizer), known, _kept_schedulers(known) if scheduler is None else scheduler, group)
    actions = _BUILDERS[intervention["action"]](run, intervention)
    for one in intervention.get("then", ()):
        actions += plan_intervention(optimizer, one, known, scheduler=scheduler, group=group)
    return actions


def _asked(intervention: Any) -> str:
    """All items but the reasons, as a text. Layers count in their order, in which processes meet."""
    if not isinstance(intervention, Mapping):
        return repr(intervention)
    items = {
        name: value
        for name, value in sorted(intervention.items(), key=lambda item: str(item[0]))
        if name not in ("reason", "then")
    }
    then = intervention.get("then")
    more = then if isinstance(then, (list, tuple)) else ()
    return ", then ".join([str(items), *(_asked(one) for one in more)])


def apply_intervention(
    optimizer: torch.optim.Optimizer | Iterable[torch.optim.Optimizer] | None,
    intervention: Mapping[str, Any],
    model: nn.Module | None = None,
    *,
    scheduler: Any = None,
    group: Any = None,
) -> Applied:
    """Carry out an intervention: one of a monitor, or a dict of the same shape (see `Intervention`).

    Call it after `optimizer.step()`, because weights may change. The actions:

    - reduce_lr multiplies the rate of every parameter group.
    - increase_dropout raises one layer's attention dropout.
    - qk_clip (MuonClip, arXiv 2507.20534) scales query and key weights, so that each head's scores come down
      to the threshold. It is exact for plain and rotary attention; if a bias or soft-cap follows, for the q.k part.
    - temperature divides query weights.
    - standing_qk_clip does QK-clip after every optimizer step from now on: see `QKClip`.
    - qk_norm normalises queries and keys from the next forward on: see `start_qk_norm`.
    - rewind restores a state from before the alarm: see `GoodStates`.
    - rewarm_lr warms the learning rate up again, set_eps sets the optimizer's epsilon, qk_rate gives query and key
      weights a rate of their own, skip_spikes leaves out gradients that are far larger than usual.
    - sigma_reparam ties the size of query and key weights to a learned number.
    - softcap caps the scores of layers, precision computes their attention in fp32, prune_heads switches heads off.

    Those that scale change a weight only on proof that the scores of its head, and nothing else, follow it: they take
    the attention of `torch.nn` and of the transformers classes in `known_classes`. A layer of any other class is
    copied, with random weights, and tried on random inputs.

    optimizer: one or several, needed for learning rates and for what joins or follows the optimizer. Given for weights
        too, it must update them itself, in their own dtype.
    model: needed for everything but learning rates, unless the intervention comes from a monitor, which knows its
        model. If the optimizer keeps separate fp32 master weights, hand over the model that holds them: it overwrites
        others.
    scheduler: one, or a list of them, whose base rates are scaled along. None takes those that the model's
        `GoodStates` know.
    group: for qk_norm and standing_qk_clip in several processes, those that hold the same layers, as for
        `start_qk_norm` and `QKClip`.

    Where processes hold parts of the model's weights (DTensors: FSDP2, tensor parallelism), every process that holds a
    part has to call this, with the same intervention: they wait for each other. It is done in all of them or in none.

    Returns an `Applied`, whose `verify()` compares it with a later reading, and whose `revert()` takes it back. Raises
    ValueError, and then has changed nothing, for an unknown action, for missing, wrong or misspelt items, for an
    unknown layer, or one that cannot be treated: its weights are frozen, shared, wrapped, of 8 bits or fewer, or not
    proved to be its queries and keys. So in every process that holds a part if one has a reason to, or if they are
    given different ones. An error of another kind, in one process, is a RuntimeError in the others.
    """
    known = getattr(intervention, "model", None) if model is None else model
    actions = holders.agreed(
        holders.meshes(known, as_list(optimizer) if known is None else ()),
        _asked(intervention),
        partial(plan_intervention, optimizer, intervention, model, scheduler=scheduler, group=group),
    )
    said: list[str] = []
    try:
        for action in actions:
            said.append(action.apply())
    except BaseException:
        for action in reversed(actions):
            action.revert()
        raise
    return Applied(intervention, f"{intervention['action']}: {'; '.join(said)}", actions)
