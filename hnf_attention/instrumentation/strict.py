"""`strict=True`: the first complete forward that is measured raises if any of its attention is not."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Protocol

import torch
from torch import nn

from .coverage import Coverage


class Judged(Protocol):
    """What is judged of an instrumentation."""

    @property
    def measuring(self) -> bool: ...

    @property
    def coverage(self) -> Coverage: ...


class CoverageJudge:
    """A forward hook of the model that judges its coverage once, and then removes itself.

    handle: removes the hook. The hook is copied and pickled with the model. A copy does nothing, and a pickle loads
    without this package.
    """

    def __init__(self, model: nn.Module, judged: weakref.ref[Any]):
        self._root, self._judged = weakref.ref(model), judged
        self.handle = model.register_forward_hook(self)

    def __call__(self, module: nn.Module, *_: object) -> None:
        if torch.compiler.is_compiling():  # a graph raises nothing
            return
        judged: Judged | None = self._judged()
        # A shallow copy of the model shares this hook; it is not the model that was instrumented.
        if judged is None or module is not self._root() or not judged.measuring:
            return
        self.handle.remove()
        coverage = judged.coverage
        if coverage.not_measured or not coverage.measured:
            raise RuntimeError(str(coverage))

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return getattr, (nullcontext(), "__exit__")
