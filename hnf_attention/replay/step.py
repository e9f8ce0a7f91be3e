"""One training step as the user runs it: forward, loss, backward and, with an optimizer, its step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from numbers import Number
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .. import compat

Closure = Callable[[], Any]


class Done(Protocol):
    """What a closure has run by itself: a backward, the step of an optimizer, a scaler."""

    went_back: bool
    stepped: bool
    scaled: bool


@dataclass(frozen=True)
class Step:
    """What is run.

    closure: runs the forward and returns the loss, an output with a `loss`, or outputs. It may run the backward, too.
    inputs: the batch by names, {} if the closure alone knows it.
    scaler: a gradient scaler; each run has a new one in its state.
    """

    model: nn.Module
    closure: Closure
    inputs: Mapping[str, Tensor]
    optimizer: torch.optim.Optimizer | None = None
    scaler: torch.amp.GradScaler | None = None

    def run(self, done: Done, plain: bool = False) -> Outcome:
        """Run the step. done: what the closure has run by itself when it returns.

        plain: without the scaler and the optimizer.
        """
        outcome = Outcome()
        try:
            result = self.closure()
            outcome.scaled = done.scaled
            outcome.outputs = dict(_tensors(result))
            loss = outcome.loss = _loss_of(result)
            if not done.went_back:
                _look_at(result, outcome)
            scaler = None if plain or loss is None else self._scaler(loss.device)
            outcome.scaler = scaler
            if loss is not None and loss.requires_grad and not done.went_back:
                (loss if scaler is None else scaler.scale(loss)).backward()
            if self.optimizer is not None and not plain and not done.stepped:
                self._step(self.optimizer, scaler)
        except Exception as error:  # a check for NaN of the user's own may end the step
            outcome.error = error
        return outcome

    def _scaler(self, device: torch.device) -> torch.amp.GradScaler | None:
        if self.scaler is None or not self.scaler.is_enabled():
            return None
        copy = torch.amp.GradScaler(device.type)
        copy.load_state_dict(self.scaler.state_dict())
        copy.scale(
            torch.ones((), device=device)
        )  # makes its scale, which a closure that scales by itself leaves out
        return copy

    @staticmethod
    def _step(optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler | None) -> None:
        if scaler is None:
            optimizer.step()
        else:
            scaler.unscale_(optimizer)
            scaler.step(optimizer)


@dataclass
class Outcome:
    """What a step gave. scaled: whether the closure used a scaler. error: what ended it, None if nothing did.

    instead: what came where a loss or outputs were expected, None if they came. notes: what was not run, and why.
    """

    outputs: dict[str, Tensor] | None = None
    loss: Tensor | None = None
    scaler: torch.amp.GradScaler | None = None
    scaled: bool = False
    error: Exception | None = None
    instead: str | None = None
    notes: list[str] = field(default_factory=list)

    def check(self) -> None:
        """Raise TypeError if the step gave nothing to look at."""
        if self.instead is not None:
            raise TypeError(f"expected a loss tensor, got {self.instead}")


def make_step(
    model: nn.Module,
    batch: Any,
    loss: Callable[[Any], Tensor] | None,
    optimizer: torch.optim.Optimizer | None,
    scaler: torch.amp.GradScaler | None,
) -> Step:
    """The step of a batch or of a closure; see `trace_non_finite`.

    Raises TypeError for anything else, ValueError for a model on the meta device.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected model to be a torch.nn.Module, got {type(model).__name__}")
    if optimizer is not None and not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"expected optimizer to be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    if scaler is not None and not isinstance(scaler, torch.amp.GradScaler):
        raise TypeError(f"expected scaler to be a torch.amp.GradScaler, got {type(scaler).__name__}")
    if loss is not None and not callable(loss):
        raise TypeError(f"expected loss to be None or a callable that takes the output, got {loss!r}")
    _check_data(model)
    call: Closure
    if isinstance(batch, Tensor):
        inputs, call = {"the input": batch}, lambda: model(batch)
    elif isinstance(batch, Mapping):
        inputs, call = dict(_tensors(batch)), lambda: model(**batch)
    elif isinstance(batch, (tuple, list)):
        inputs, call = dict(_tensors(batch)), lambda: model(*batch)
    elif callable(batch):
        inputs, call = {}, batch
    else:
        raise TypeError(
            "expected a batch (a tensor, or a mapping or sequence of the model's arguments) or a callable without "
            f"arguments that runs the forward and returns the loss, got {type(batch).__name__}"
        )
    closure = call if loss is None else lambda: loss(call())
    return Step(model, closure, inputs, optimizer, scaler)


def _tensors(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Floating-point tensors of a nested structure, by name."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield name or "the result", value
        return
    if isinstance(value, Mapping):
        items = list(value.items())
    elif isinstance(value, (tuple, list)):
        items = list(enumerate(value))
    else:
        return
    for key, inner in items:
        yield from _tensors(inner, f"{name}[{key}]" if name else f"{key}")


def _check_data(model: nn.Module) -> None:
    """Raise ValueError for a model with parameters or buffers that hold no data."""
    for prefix, module in model.named_modules():
        if compat.offloaded(module):
            continue
        for name, x in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            if x.is_meta:
                found = f"{prefix}.{name}" if prefix else name
                raise ValueError(f"expected a model with data, got parameters on the meta device: {found}")


def _place_of_loss(result: Any) -> Any:
    """What stands where a closure returns its loss."""
    if isinstance(result, (tuple, list)) and result:
        return result[0]
    return result.get("loss") if isinstance(result, Mapping) else getattr(result, "loss", result)


def _look_at(result: Any, outcome: Outcome) -> None:
    """Keep what is wrong with what a closure returned that has not run the backward itself."""
    place, loss = _place_of_loss(result), outcome.loss
    if not outcome.outputs and loss is None:
        number = isinstance(place, Number)
        outcome.instead = f"a tensor of {place.dtype}" if isinstance(place, Tensor) else type(result).__name__
        outcome.instead = type(place).__name__ if number else outcome.instead
    elif isinstance(place, Number):
        outcome.notes.append(
            f"the loss is of type {type(place).__name__}, no tensor, so it was not looked at and no backward was run"
        )
    elif loss is not None and not loss.requires_grad:
        outcome.notes.append(
            "the loss requires no gradient (it is detached, or nothing trainable made it), so no backward was run: the "
            "forward alone was traced"
        )


def _loss_of(result: Any) -> Tensor | None:
    """The loss in what a closure returned; None if there is none."""
    loss = _place_of_loss(result)
    return loss if isinstance(loss, Tensor) and loss.numel() == 1 and loss.is_floating_point() else None
