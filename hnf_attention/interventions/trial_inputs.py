"""What a trial of a layer runs on: random sequences, and whatever else the layer is given in its model."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..instrumentation import witness
from .projections import Projections

BATCH, LENGTH = 2, 6


def of(
    place: nn.Module, tried: nn.Module, projections: Projections
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments by place and by name for the copy `tried` of a module of a model.

    If the forward needs more than one sequence, they are made like those of the call in which the module was first
    measured: short, with random numbers in place of activations. Raises ValueError if no such call is known.
    """
    given = witness.of(place)
    required = [
        parameter
        for parameter in inspect.signature(tried.forward).parameters.values()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]
    if given is not None and (len(required) != 1 or len(given.args) + len(given.kwargs) > 1):
        return _like(given, projections)
    if not required or any(parameter.kind is parameter.KEYWORD_ONLY for parameter in required):
        raise ValueError(
            f"expected a forward with inputs by position, got {inspect.signature(tried.forward)}"
        )
    widths = [projections.width or side[0].shape[-1] for side in (projections.query, projections.key)]
    weight = projections.query[0]
    made = [
        normal((BATCH, LENGTH, widths[0 if number == 0 else 1]), weight, seed=number)
        for number in range(len(required))
    ]
    return tuple(made), {}


class _Shorter:
    """Makes arguments like given ones, of BATCH sequences of LENGTH tokens."""

    def __init__(self, batch: int, length: int, width: int, weight: Tensor):
        self._batch, self._length, self._width, self._weight = batch, length, width, weight
        self._seed = 0

    def make(self, value: Any) -> Any:
        """The same for whatever is no tensor."""
        if isinstance(value, Mapping):
            return {key: self.make(one) for key, one in value.items()}
        if isinstance(value, tuple):
            return tuple(self.make(one) for one in value)
        if isinstance(value, witness.Spec):
            return self._random(value)
        return self._cut(value) if isinstance(value, Tensor) else value

    def _sizes(self, shape: tuple[int, ...]) -> list[int]:
        sizes = list(shape)
        # A sequence (B, N, width) keeps its width, even if it is as large as the length.
        last = len(sizes) - (1 if len(sizes) == 3 and sizes[-1] == self._width else 0)
        for dim in range(last):
            if sizes[dim] == self._length:
                sizes[dim] = min(LENGTH, self._length)
        if sizes and shape[0] == self._batch and len(shape) > 2:
            sizes[0] = min(BATCH, self._batch)
        return sizes

    def _random(self, spec: witness.Spec) -> Tensor:
        sizes, device = self._sizes(spec.shape), self._weight.device
        if not spec.dtype.is_floating_point:
            return torch.ones(sizes, dtype=spec.dtype, device=device)
        self._seed += 1
        return normal(tuple(sizes), self._weight, self._seed)

    def _cut(self, value: Tensor) -> Tensor:
        if value.dim() == 3 and value.shape[-1] == self._width and value.is_floating_point():
            return self._random(witness.Spec(tuple(value.shape), value.dtype))
        for dim, size in enumerate(self._sizes(tuple(value.shape))):
            value = value.narrow(dim, 0, size)
        return value


def _like(given: witness.Given, projections: Projections) -> tuple[tuple[Any, ...], dict[str, Any]]:
    width = projections.width or projections.query[0].shape[-1]
    weight = projections.query[0]
    everything = (*given.args, *given.kwargs.values())
    sequences = [x for x in everything if len(getattr(x, "shape", ())) == 3 and x.shape[-1] == width]
    if not sequences:
        raise ValueError(f"expected a sequence (B, N, {width}) among what the layer is given, got none")
    batch, length, _ = sequences[0].shape
    shorter = _Shorter(batch, length, width, weight)
    return shorter.make(given.args), shorter.make(dict(given.kwargs))


def normal(shape: tuple[int, ...], like: Tensor, seed: int) -> Tensor:
    """Random numbers of the device and dtype of a tensor."""
    generator = torch.Generator(like.device).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=like.device).to(like.dtype)
