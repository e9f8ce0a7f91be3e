"""Interventions over processes against one process: the same weights, optimizer states and exact reverts."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hnf_attention import apply_intervention
from hnf_attention.interventions import GoodStates, QKClip, start_qk_norm

from .model import (
    WAYS,
    Net,
    Setting,
    Spread,
    alone,
    bf16_alone,
    bf16_over_fp32,
    difference,
    gathered,
    net,
    train,
    weights,
    whole,
)

#: Of FSDP2 that computes in bf16: half of the batch is rounded otherwise than the whole one. Without its reduction of
#: gradients, or without the rewind, the runs below differ by 1.3e-3 to 5.8e-2.
BF16 = 5e-4

#: What a scenario gives: weights and momenta, and whether what it took back equals what was, None for nothing.
States = tuple[list[Tensor], "bool | None"]


def _optimizer(spread: Spread) -> torch.optim.Optimizer:
    return torch.optim.SGD(spread.model.parameters(), lr=1e-2, momentum=0.9)


def _states(spread: Spread, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Weights and momenta, whole."""
    momenta = [
        whole(state[name])
        for p in spread.model.parameters()
        for name in ("momentum_buffer", "exp_avg")
        if (state := optimizer.state.get(p)) and state.get(name) is not None
    ]
    return weights(spread.model) + momenta


def standing_clip(spread: Spread) -> States:
    """Second: nothing is taken back."""
    optimizer = _optimizer(spread)
    QKClip(spread.model, 30.0).attach(optimizer)
    train(spread, optimizer, 4)
    return _states(spread, optimizer), None


def qk_norm(spread: Spread) -> States:
    return _normed(spread, _optimizer(spread))


def qk_norm_adam(spread: Spread) -> States:
    """By AdamW over all tensors at once, where they are of one kind."""
    alike = len({hasattr(p, "placements") for p in spread.model.parameters()}) == 1
    return _normed(spread, torch.optim.AdamW(spread.model.parameters(), lr=1e-3, eps=1e-4, foreach=alike))


def _normed(spread: Spread, optimizer: torch.optim.Optimizer) -> States:
    """The states of 4 steps with QK-norm. Second: whether a step after its revert has the parameters of before."""
    names = [name for name, _ in spread.model.named_parameters()]
    start = start_qk_norm(spread.model, optimizer)
    train(spread, optimizer, 4)
    if start.refused or not start.started:
        raise ValueError("; ".join(f"{name}: {why}" for name, why in start.refused.items()))
    states = _states(spread, optimizer)
    start.revert()
    train(spread, optimizer, 1)
    return states, names == [name for name, _ in spread.model.named_parameters()]


def rewind(spread: Spread) -> States:
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


def clip_and_revert(spread: Spread) -> States:
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


Scenario = Callable[[Spread], States]
Way = Callable[[Setting, Net], Spread]
SCENARIOS: dict[str, Scenario] = {
    "QKClip, 4 steps": standing_clip,
    "QK-norm, 4 steps": qk_norm,
    "QK-norm with AdamW, 4 steps": qk_norm_adam,
    "rewind, 2 steps": rewind,
    "one clip, reverted": clip_and_revert,
}


def run(setting: Setting) -> dict[str, Any]:
    """By scenario and way: the largest difference of a weight or momentum from one process, or why it was refused."""
    found: dict[str, Any] = {}
    for scenario, act in SCENARIOS.items():
        expected, _ = act(alone(setting, net(setting)))
        for name, way in WAYS.items():
            found[f"{scenario}, {name}"] = _compared(setting, act, way, expected)
        in_bf16 = _compared(setting, act, bf16_over_fp32, act(bf16_alone(setting, net(setting)))[0])
        found[f"{scenario}, FSDP2 in bf16"] = in_bf16 | {"limit": BF16}
    found["QKClip and QK-norm, a LLaMA by its own plan"] = llama(setting)
    return found


def _compared(setting: Setting, act: Scenario, way: Way, expected: list[Tensor]) -> dict[str, Any]:
    try:
        states, exact = act(way(setting, net(setting)))
    except ValueError as error:  # a refusal; every process raises the same one
        return _of_all(gathered(str(error)))
    return _of_all(gathered((difference(states, expected), exact)))


def _of_all(everyone: list[Any]) -> dict[str, Any]:
    refusals = [x for x in everyone if isinstance(x, str)]
    if refusals:
        return {"refused": refusals[0]}
    found = {"difference": max(x[0] for x in everyone)}
    if any(x[1] is None for x in everyone):
        return found
    return found | {"exact": all(x[1] for x in everyone)}


def llama(setting: Setting) -> dict[str, Any]:
    """A LLaMA that transformers splits, against a whole one: 2 steps with QKClip, then 2 with QK-norm."""
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
        from transformers.distributed import DistributedConfig
    except ImportError as error:
        return {"missing": f"no transformers that splits models: {error}"}
    heads = 2 * setting.size
    with tempfile.TemporaryDirectory() as own:
        folder = gathered(own)[0]
        if setting.rank == 0:
            torch.manual_seed(0)
            sizes = {"hidden_size": 8 * heads, "intermediate_size": 8 * heads, "vocab_size": 64}
            config = LlamaConfig(num_hidden_layers=2, num_attention_heads=heads, **sizes)
            LlamaForCausalLM(config).save_pretrained(folder)
        gathered(None)  # all wait for the file
        expected = _clipped_and_normed(LlamaForCausalLM.from_pretrained(folder).to(setting.device))
        plan = DistributedConfig(tp_size=setting.size)
        model = LlamaForCausalLM.from_pretrained(folder, distributed_config=plan)
        try:
            found = _clipped_and_normed(model)
        except ValueError as error:
            return _of_all(gathered(str(error)))
        return _of_all(gathered((difference(found, expected), None)))


def _clipped_and_normed(model: torch.nn.Module) -> list[Tensor]:
    # Some weights are DTensors, others are not.
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, foreach=False)
    tokens = torch.randint(0, 64, (2, 24), generator=torch.Generator().manual_seed(2))
    tokens = tokens.to(next(model.parameters()).device)

    def steps() -> None:
        for _ in range(2):
            optimizer.zero_grad()
            model(tokens, labels=tokens).loss.backward()
            optimizer.step()

    clip = QKClip(model.train(), 0.05).attach(optimizer)
    steps()
    clip.remove()
    start = start_qk_norm(model, optimizer)
    steps()
    refused = {**clip.refused, **start.refused}
    if refused:
        raise ValueError("; ".join(f"{name}: {why}" for name, why in refused.items()))
    return weights(model)
