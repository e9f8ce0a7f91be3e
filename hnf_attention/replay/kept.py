"""What a run may change, kept and put back: weights, buffers, gradients, random numbers, states of an optimizer."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


class Kept:
    """Copies of all that a step changes. `rewind()` puts it back, as often as it is called.

    optimizer: its states and its groups are kept, too; None for none. scaler: so is its scale, once `scaler_ran` says
    that the step itself uses it.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        scaler: torch.amp.GradScaler | None = None,
    ):
        self._optimizer, self._scaler = optimizer, scaler
        self._scale = {} if scaler is None else scaler.state_dict()
        self.scaler_ran = False
        self._weights = list(model.parameters())
        if optimizer is not None:
            mine = {id(x) for x in self._weights}
            self._weights += [x for g in optimizer.param_groups for x in g["params"] if id(x) not in mine]
        self._tensors = [_Copy(x) for x in (*self._weights, *model.buffers())]
        self._gradients = [x.grad for x in self._weights]
        self._written = [None if x is None else _Copy(x) for x in self._gradients]
        self._states: list[tuple[Any, dict[str, Any], list[_Copy]]] = []
        self._groups: list[dict[str, Any]] = []
        if optimizer is not None:
            for parameter, state in optimizer.state.items():
                copies = [_Copy(x) for x in state.values() if isinstance(x, Tensor)]
                self._states.append((parameter, dict(state), copies))
            self._groups = [dict(group) for group in optimizer.param_groups]
        self._random = _RandomState()

    def rewind(self) -> None:
        """Put everything back, but leave gradients out: a step begins without them."""
        for parameter in self._weights:
            parameter.grad = None
        for copy in self._tensors:
            copy.put_back()
        if self._optimizer is not None:
            self._optimizer.state.clear()
            for parameter, state, copies in self._states:
                for copy in copies:
                    copy.put_back()
                self._optimizer.state[parameter] = dict(state)
            for group, before in zip(self._optimizer.param_groups, self._groups):
                group.clear()
                group.update(before)
        if self._scaler is not None and self.scaler_ran and self._scale:
            self._scaler.update(self._scale["scale"])  # forgets which optimizers it has unscaled and stepped
            self._scaler.load_state_dict(self._scale)
        self._random.put_back()

    def put_back(self) -> None:
        """Put everything back, the gradients as well."""
        self.rewind()
        for parameter, gradient, copy in zip(self._weights, self._gradients, self._written):
            if copy is not None:
                copy.put_back()
            parameter.grad = gradient


@contextmanager
def keeping(
    model: nn.Module, optimizer: torch.optim.Optimizer | None, scaler: torch.amp.GradScaler | None = None
) -> Iterator[Kept]:
    """Inside, the model may be run and changed; at the end, everything is as it was."""
    kept = Kept(model, optimizer, scaler)
    try:
        yield kept
    finally:
        kept.put_back()


class _Copy:
    """A tensor and a copy of it."""

    def __init__(self, tensor: Tensor):
        self._tensor = tensor
        self._copy = tensor.detach().clone()

    def put_back(self) -> None:
        # By `.data`, so that a graph which saved the tensor does not count it as changed.
        self._tensor.data.copy_(self._copy)


class _RandomState:
    """The states of all generators that a model may draw from: PyTorch's of each device, NumPy's and Python's."""

    def __init__(self) -> None:
        self._cpu = torch.get_rng_state()
        used = torch.cuda.is_available() and torch.cuda.is_initialized()
        self._cuda = torch.cuda.get_rng_state_all() if used else []
        self._numpy, self._python = np.random.get_state(), random.getstate()

    def put_back(self) -> None:
        torch.set_rng_state(self._cpu)
        if self._cuda:
            torch.cuda.set_rng_state_all(self._cuda)
        np.random.set_state(self._numpy)
        random.setstate(self._python)
