"""What a recorded run holds: one record an operation, with the smallest and largest number of each tensor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

#: Parts of a training step, in the order in which they run.
FORWARD, BACKWARD, SCALING = "forward", "backward", "loss scaling"
CLIPPING, OPTIMIZER = "gradient clipping", "optimizer step"
#: Operations that give memory without numbers in it.
WITHOUT_NUMBERS = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "resize_")


@dataclass(slots=True)
class TensorRecord:
    """A tensor that an operation read or wrote.

    name: of the parameter or result. memory: number of the memory that holds it; views of one tensor share it.
    least, most: the smallest and the largest number, both NaN if there is a NaN; 0 where the tensor has no numbers to
    judge (integers, none at all).
    """

    name: str
    memory: int
    shape: tuple[int, ...]
    dtype: str
    least: float = 0.0
    most: float = 0.0

    @property
    def finite(self) -> bool:
        return math.isfinite(self.least) and math.isfinite(self.most)

    @property
    def hidden_only(self) -> bool:
        """Whether -inf, which masks hold, is all that is not finite."""
        return self.least == -math.inf and math.isfinite(self.most) or self.most == -math.inf

    @property
    def size(self) -> float:
        """The largest absolute value; NaN if there is a NaN."""
        return max(abs(self.least), abs(self.most)) if not math.isnan(self.least) else math.nan


@dataclass(slots=True)
class Operation:
    """One operation of a run.

    index: its place in the order of execution. name: as torch.ops has it, "aten.bmm.default". module: the innermost
    module that ran it, None if no module of the model did; for the backward it is that of the forward operation.
    constants: NaN and infinities among the numbers that it was given.
    """

    index: int
    name: str
    module: str | None
    phase: str
    inputs: list[TensorRecord]
    outputs: list[TensorRecord]
    constants: tuple[float, ...] = ()

    @property
    def packet(self) -> str:
        """The name without library and overload: 'bmm'."""
        return self.name.split(".")[1]

    @property
    def library(self) -> str:
        """'aten' for PyTorch's own."""
        return self.name.split(".")[0]

    @property
    def is_attention(self) -> bool:
        """Whether it computes a whole attention, or its gradient."""
        return "attention" in self.name or "attn" in self.name

    @property
    def largest_input(self) -> float:
        """The largest |number| among the inputs that are finite."""
        return max((x.size for x in self.inputs if x.finite), default=0.0)

    @property
    def clean(self) -> bool:
        """Whether all results are finite, or without numbers."""
        return self.packet in WITHOUT_NUMBERS or all(x.finite for x in self.outputs)


@dataclass
class Record:
    """All operations of a run in their order.

    names: of memory that the run was given, by the memory's number: weights, buffers, inputs, states of the optimizer.
    symptoms: memory that holds what the user would see: outputs, loss, gradients, weights after the step.
    """

    operations: Sequence[Operation]
    names: dict[int, Source] = field(default_factory=dict)
    symptoms: dict[int, str] = field(default_factory=dict)


#: Kinds of memory that a run is given.
PARAMETER, BUFFER, BATCH, STATE = "parameter", "buffer", "input", "optimizer state"


@dataclass(frozen=True, slots=True)
class Source:
    """Memory that existed before the run.

    kind: PARAMETER, BUFFER, BATCH or STATE. name: of the tensor. parameter: whose state it is, "" where it is none.
    """

    kind: str
    name: str
    parameter: str = ""
