"""Training beside and without a monitor: losses, weights, time, and the statistics of its readings."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from timing import timed
from torch import Tensor, nn

from hnf_attention import AttentionStabilityMonitor

from . import exact
from .recipes import OURS, Recipe, batches, make, window_of

STEPS, CADENCE = 6, 2  # of the runs that are compared
TURNS = 3  # timed turns of each kind; the first one is left out


class Trained(NamedTuple):
    """A run: its losses, its model, how many of its layers were read, and why others were not."""

    losses: list[float]
    model: nn.Module
    layers: int = 0
    not_measured: dict[str, str] = {}
    readings: int = 0


@contextmanager
def deterministic(strict: bool) -> Iterator[None]:
    """Kernels that give the same bits each time; what has none raises RuntimeError if `strict`, and else warns.

    PyTorch's attention with a mask, and cuDNN's, have one only if it is strict.
    """
    torch.use_deterministic_algorithms(True, warn_only=not strict)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=3e-4, fused=next(model.parameters()).is_cuda)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: dict[str, Tensor]) -> Tensor:
    loss = model(**batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def train(model: nn.Module, given: Sequence[dict[str, Tensor]], watched: bool) -> Trained:
    """One step for each batch, with a monitor's reading every CADENCE steps if it is watched."""
    optimizer, losses = optimizer_of(model), []
    if not watched:
        return Trained([step(model, optimizer, batch).item() for batch in given], model)
    monitor = AttentionStabilityMonitor(model, log_every=CADENCE)
    try:
        for batch in given:
            losses.append(step(model, optimizer, batch).item())
            diagnosis = monitor.on_step(loss=losses[-1])
        return Trained(losses, model, *judged(monitor, diagnosis))
    finally:
        monitor.restore()


def judged(monitor: AttentionStabilityMonitor, diagnosis: Any) -> tuple[int, dict[str, str], int]:
    """(layers that were judged, the reasons of others, readings) of a monitor whose last step was a log step."""
    gaps = {**diagnosis.not_measured, **monitor.instrumentation.coverage.not_measured}
    gaps |= {name: str(reason) for name, reason in monitor.status.off.items()}
    return len(diagnosis.stats), gaps, len(monitor.history)


def same(one: Trained, other: Trained) -> bool:
    """Whether losses and all weights are equal bit for bit."""
    weights = zip(one.model.parameters(), other.model.parameters(), strict=True)
    return one.losses == other.losses and all(torch.equal(a, b) for a, b in weights)


def reading(model: nn.Module, batch: dict[str, Tensor], layers: set[int]) -> dict[str, Any]:
    """How far a monitor's rows and head statistics of one training forward are from fp64, over these layers."""
    monitor = AttentionStabilityMonitor(model, log_every=1)
    measured: dict[str, Any] = {}
    record = monitor.instrumentation.on_measure

    def both(measurement: Any) -> None:
        measured[measurement.layer] = measurement.rows
        record(measurement)

    monitor.instrumentation.on_measure = both
    try:
        with exact.spied(layers) as spied:
            model(**batch).loss.backward()
        model.zero_grad()
        diagnosis = monitor.on_step()
    finally:
        monitor.restore()
    length = batch["input_ids"].shape[1]
    positions = batch.get("position_ids")
    if positions is None:
        positions = torch.arange(length, device=batch["input_ids"].device).expand(batch["input_ids"].shape)
    of_rows, of_heads = dict.fromkeys(exact.FIELDS, 0.0), {}
    for layer in sorted(layers):
        name = f"model.layers.{layer}.self_attn"
        truth = exact.rows(spied[layer], positions, window_of(model, layer))
        for field in exact.FIELDS:
            error = exact.difference(getattr(measured[name], field), truth[field])
            of_rows[field] = max(of_rows[field], error)
        for field, wanted in exact.of_heads(truth).items():
            got = torch.from_numpy(getattr(diagnosis.stats[name], field)).to(wanted)
            of_heads[field] = max(of_heads.get(field, 0.0), exact.difference(got, wanted))
    return {"rows": of_rows, "heads": of_heads, "worst": max(*of_rows.values(), *of_heads.values())}


def overhead(model: nn.Module, batch: dict[str, Tensor], steps: int) -> dict[str, float]:
    """Milliseconds a step, plain and with a monitor whose reading is the last of `steps` steps, in turns."""
    optimizer = optimizer_of(model)
    plain: list[float] = []
    watched: list[float] = []
    monitor: AttentionStabilityMonitor | None = None

    def once() -> None:
        step(model, optimizer, batch)
        if monitor is not None:
            monitor.on_step()

    for number in range(TURNS):
        for kept in (plain, watched)[:: 1 if number % 2 == 0 else -1]:
            if kept is watched:
                monitor = AttentionStabilityMonitor(model, log_every=steps)
            try:
                kept.append(timed(once, steps)["ms"])
            finally:
                if monitor is not None:
                    monitor.restore()
                monitor = None
    ratios = [b / a for a, b in zip(plain[1:], watched[1:])]
    return {
        "ms": statistics.median(plain[1:]),
        "watched_ms": statistics.median(watched[1:]),
        "overhead": statistics.median(ratios) - 1,
        "log_every": steps,
    }


def sampled(model: nn.Module) -> set[int]:
    """The first two layers, whose windows differ where windows alternate, and the last one."""
    return {0, 1, len(model.model.layers) - 1}


def run(recipe: Recipe, device: torch.device, steps: int) -> dict[str, Any]:
    """One family: as its models are trained, and with our attention in place of transformers'."""
    given = batches(recipe, device, STEPS)
    return compare(
        lambda implementation: make(recipe, device, implementation),
        lambda model, watched: train(model, given, watched),
        recipe.implementation,
        given[-1],
        steps,
    )


def three(train_one: Callable[[bool], Trained]) -> list[Trained]:
    """A run, the same again, and the same watched, by deterministic kernels as far as there are any."""
    for strict in (True, False):
        try:
            with deterministic(strict):
                return [train_one(watched) for watched in (False, False, True)]
        except RuntimeError as error:  # experts are counted by an operation without such a kernel
            if not strict or "deterministic" not in str(error):
                raise
    raise AssertionError


def compare(
    make_one: Callable[[str], nn.Module],
    train_one: Callable[[nn.Module, bool], Trained],
    implementation: str,
    batch: dict[str, Tensor],
    steps: int,
) -> dict[str, Any]:
    """Three runs from one seed (plain, plain again, watched), a reading against fp64, and times; then ours."""
    found: dict[str, Any] = {}
    plain, again, watched = three(lambda watched: train_one(make_one(implementation), watched))
    model = watched.model
    found["layers"], found["of"] = watched.layers, len(model.model.layers)
    found["not_measured"], found["readings"] = watched.not_measured, watched.readings
    found["repeatable"], found["bit_equal"] = same(plain, again), same(plain, watched)
    found["losses"] = watched.losses
    del plain, again, watched
    found["fp64"] = reading(model, batch, sampled(model))
    found["time"] = overhead(model, batch, steps)
    del model
    ours = train_one(make_one(OURS), True)
    found["ours"] = {
        "implementation": OURS,
        "layers": ours.layers,
        "not_measured": ours.not_measured,
        "losses": ours.losses,
        "loss_difference": max(abs(a - b) for a, b in zip(found["losses"], ours.losses)),
        "fp64": reading(ours.model, batch, sampled(ours.model)),
        "time": overhead(ours.model, batch, steps),
    }
    return found
