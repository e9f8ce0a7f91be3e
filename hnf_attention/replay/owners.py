"""Which module and which part of a training step makes a call."""

from __future__ import annotations

import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from types import FrameType

import torch
from torch import nn

from .. import compat
from ..diagnosis.triage.records import BACKWARD, CLIPPING, FORWARD, OPTIMIZER, SCALING
from ..names import named_modules

_TORCH = Path(torch.__file__).parent
#: Parts of a step by the files of PyTorch that run them.
_FILES = {
    str(_TORCH / "amp" / "grad_scaler.py"): SCALING,
    str(_TORCH / "nn" / "utils" / "clip_grad.py"): CLIPPING,
}
_OPTIMIZERS = str(_TORCH / "optim")


class _Thread(threading.local):
    """last: the number that autograd would have given to the next node at the last operation."""

    last = -1


class Owners:
    """Finds the module that runs an operation, by the Python stack.

    The backward has no modules on the stack. There the number of the autograd node leads to the operation of the
    forward that made it, and with it to its module.
    """

    def __init__(self, model: nn.Module):
        self._names: Mapping[int, str] = {id(module): name for name, module in named_modules(model)}
        self._model = model  # the ids are those of living modules
        self._of_node: dict[int, str | None] = {}
        self._thread = _Thread()

    def place(self) -> tuple[str | None, str]:
        """(the module, the part of the step) of the call that is made now."""
        module, phase = self._on_the_stack()
        node = compat.running_node_number()
        if module is None and node >= 0:
            module = self._of_node.get(node)
        number = compat.next_node_number()
        if number != self._thread.last:  # a forward, or the second one of a checkpoint, has made a node
            self._thread.last = number
            self._of_node[number - 1] = module
        if phase == FORWARD and compat.running_backward() != -1:
            phase = BACKWARD
        return module, phase

    def _on_the_stack(self) -> tuple[str | None, str]:
        frame: FrameType | None = sys._getframe(2)
        while frame is not None:
            code = frame.f_code
            if code is compat.module_call_code:
                name = self._names.get(id(frame.f_locals["self"]))
                if name is not None:
                    return name, FORWARD
            elif code.co_filename in _FILES:
                return None, _FILES[code.co_filename]
            elif code.co_filename.startswith(_OPTIMIZERS):
                return None, FORWARD if code.co_name == "zero_grad" else OPTIMIZER
            frame = frame.f_back
        return None, FORWARD
