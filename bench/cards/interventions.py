"""Interventions over processes against one process: the same weights, optimizer states and exact reverts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hnf_attention import apply_intervention
from hnf_attention.interventions import GoodStates, QKClip, start_qk_norm

from .model import WAYS, Setting, Spread, alone, difference, gathered, net, train, weights, whole


def _optimizer(spread: Spread) -> torch.optim.Optimizer:
    return torch.optim.SGD(spread.model.parameters(), lr=1e-2, momentum=0.9)


def _states(spread: Spread, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Weights and momenta, whole."""
    momenta = [
        whole(state["momentum_buffer"])
        for p in spread.model.parameters()
        if (state := optimizer.state.get(p)) and state.get("momentum_buffer") is not None
    ]
    return weights(spread.model) + momenta


def _joined(states: list[Tensor], expected: list[Tensor]) -> list[Tensor]:
    """With the parts of all processes joined, where a tensor is of this process's heads alone, as a gain of QK-norm."""
    return [
        x if x.shape == whole.shape else torch.cat([y.to(x.device) for y in gathered(x.cpu())])
        for x, whole in zip(states, expected, strict=True)
    ]


def standing_clip(spread: Spread) -> tuple[list[Tensor], bool]:
    optimizer = _optimizer(spread)
    QKClip(spread.model, 30.0).attach(optimizer)
    train(spread, optimizer, 4)
    return _states(spread, optimizer), True


def qk_norm(spread: Spread) -> tuple[list[Tensor], bool]:
    optimizer = _optimizer(spread)
    start = start_qk_norm(spread.model, optimizer)
    train(spread, optimizer, 4)
    if not start.started:
        raise ValueError("; ".join(f"{name}: {why}" for name, why in start.refused.items()))
    return _states(spread, optimizer), True


def rewind(spread: Spread) -> tuple[list[Tensor], bool]:
    """Back to step 2 of 6, then two more steps. Second: whether it was the state of step 2, bit for bit."""
    optimizer = _optimizer(spread)
    kept = GoodStates(spread.model, optimizer, every=2, keep=3, margin=3)
    seen: list[list[Tensor]] = []

    def after() -> None:
        seen.append(_states(spread, optimizer))
        kept.on_step(len(seen))

    train(spread, optimizer, 6, after)
    step = kept.rewind(before=6)
    back = _states(spread, optimizer)
    exact = step == 2 and len(back) == len(seen[1]) and all(map(torch.equal, back, seen[1]))
    train(spread, optimizer, 2)
    return _states(spread, optimizer), exact


def clip_and_revert(spread: Spread) -> tuple[list[Tensor], bool]:
    """The weights that one clip gives. Second: whether its revert gave the weights before it, bit for bit."""
    model = getattr(spread.model, "module", spread.model)
    heads = model.layers[0].q_proj.out_features // model.layers[0].head_dim
    wanted = {
        "action": "qk_clip",
        "threshold": 30.0,
        "layers": {"layers.0": [120.0 if head % 2 else 10.0 for head in range(heads)]},
    }
    before = weights(model)
    applied = apply_intervention(None, wanted, model)
    clipped = weights(model)
    applied.revert()
    return clipped, all(map(torch.equal, weights(model), before))


SCENARIOS: dict[str, Callable[[Spread], tuple[list[Tensor], bool]]] = {
    "QKClip, 4 steps": standing_clip,
    "QK-norm, 4 steps": qk_norm,
    "rewind, 2 steps": rewind,
    "one clip, reverted": clip_and_revert,
}


def run(setting: Setting) -> dict[str, Any]:
    """By scenario and way: the largest difference of a weight or momentum from one process, or why it was refused."""
    found: dict[str, Any] = {}
    for scenario, act in SCENARIOS.items():
        expected, _ = act(alone(setting, net(setting)))
        for name, way in WAYS.items():
            try:
                states, exact = act(way(setting, net(setting)))
                mine: Any = (difference(_joined(states, expected), expected), exact)
            except ValueError as error:  # a refusal; every process raises the same one
                mine = str(error)
            everyone = gathered(mine)
            if any(isinstance(x, str) for x in everyone):
                found[f"{scenario}, {name}"] = {"refused": next(x for x in everyone if isinstance(x, str))}
                continue
            found[f"{scenario}, {name}"] = {
                "difference": max(x[0] for x in everyone),
                "exact": all(x[1] for x in everyone),
            }
    return found
