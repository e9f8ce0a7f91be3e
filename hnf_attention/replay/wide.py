"""The same step in a wider number format: it tells what overflows the format from what is NaN in any."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .. import compat
from ..diagnosis.triage.finding import WideReplay
from .kept import Kept
from .recorder import local, map_tensors
from .step import Step


def replay_wide(step: Step, kept: Kept) -> WideReplay:
    """Run forward and backward in double precision, or in single precision where that fails.

    Single precision is of use only where the model or its autocast is narrower: it is said which one ran.
    """
    if any(local(x) is not x for x in step.model.parameters()):
        return WideReplay(None, None, None, None, "its weights are sharded over processes")
    reasons: list[str] = []
    for dtype in (torch.float64, torch.float32):
        kept.rewind()
        name = str(dtype).removeprefix("torch.")
        if dtype == torch.float64 and any(x.device.type == "mps" for x in step.model.parameters()):
            reasons.append("float64: this device has no double precision")
            continue
        try:
            with _widened(step.model, dtype), WiderFormats(dtype) as mode:
                outcome = step.run(mode, plain=True)
                if outcome.error is not None:
                    raise outcome.error
                loss = None if outcome.loss is None else float(outcome.loss.detach())
                tensors = [x.grad for x in step.model.parameters() if x.grad is not None]
                tensors += [] if outcome.loss is not None else list((outcome.outputs or {}).values())
                finite = all(bool(x.isfinite().all()) for x in tensors)
                largest = max((float(x.abs().max()) for x in tensors if x.numel()), default=0.0)
        except Exception as error:  # kernels without this format, or no memory for it
            reasons.append(
                f"{name}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            )
            continue
        good = finite and (loss is None or loss - loss == 0)
        return WideReplay(name, good, loss, largest if finite else None)
    return WideReplay(None, None, None, None, "; ".join(reasons))


@contextmanager
def _widened(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Inside, weights and buffers are in a wider format; at the end they are the very tensors that they were."""
    held = []
    try:
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point() and torch.finfo(tensor.dtype).bits < torch.finfo(dtype).bits:
                held.append((tensor, tensor.data))
                tensor.grad = None
                tensor.data = tensor.data.to(dtype)
        yield
    finally:
        for tensor, data in held:
            tensor.grad = None
            tensor.data = data


class WiderFormats(compat.DispatchMode):
    """A context in which each operation takes and gives numbers of at least this format."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self._dtype = dtype
        self.went_back = self.stepped = self.scaled = False

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        self.went_back |= compat.running_backward() != -1
        wide = [map_tensors(x, self._wider) for x in (tuple(args), dict(kwargs or {}))]
        return operator(*self._dtypes(wide[0]), **self._dtypes(wide[1]))

    def _narrow(self, dtype: torch.dtype) -> bool:
        return dtype.is_floating_point and torch.finfo(dtype).bits < torch.finfo(self._dtype).bits

    def _wider(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._dtype) if self._narrow(tensor.dtype) else tensor

    def _dtypes(self, value: Any) -> Any:
        if isinstance(value, torch.dtype):
            return self._dtype if self._narrow(value) else value
        if isinstance(value, dict):
            return {name: self._dtypes(x) for name, x in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(self._dtypes(x) for x in value)
        return value
