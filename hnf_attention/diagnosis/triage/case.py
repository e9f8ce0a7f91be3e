"""What is known of a root: the operation's numbers against double precision, and its place in the model."""

from __future__ import annotations

from dataclasses import dataclass

from .records import Operation
from .roots import Root

#: What the operation gives in double precision, where its own result is not finite.
FITS, TOO_LARGE, NOT_FINITE, UNKNOWN = "fits", "too large", "not finite", "unknown"
#: The largest number of each format.
LARGEST = {
    "float16": 65504.0,
    "bfloat16": 3.3895314e38,
    "float32": 3.4028235e38,
    "float64": 1.7976931348623157e308,
}


@dataclass(frozen=True, slots=True)
class Numbers:
    """The captured operation in numbers.

    double: FITS if double precision gives a number that the format holds, TOO_LARGE if one that it does not hold,
        NOT_FINITE, or UNKNOWN.
    double_size: the largest |result| there. index: of the first number that is not finite, in the result of the name
        `result`. kind: "NaN" or "inf".
    scores: largest |score| of the attention head in double precision; least_lse: smallest lse of its rows.
    zero_denominator: an optimizer divides by a number that is 0. no_targets: a loss averages over no target.
    element: of a tensor that the run was given, the first place that is not finite; broken: how many there are.
    overflowed: names of the results that are not finite. first, second: where they are not, along the first two
        dimensions of `result`.
    """

    double: str = UNKNOWN
    double_size: float | None = None
    kind: str = "NaN"
    result: str = "0"
    index: tuple[int, ...] = ()
    shape: tuple[int, ...] = ()
    scores: float | None = None
    least_lse: float | None = None
    zero_denominator: bool = False
    no_targets: bool = False
    element: tuple[int, ...] = ()
    broken: int = 0
    overflowed: tuple[str, ...] = ()
    first: tuple[int, ...] = ()
    second: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Place:
    """Where in the model.

    layer: the attention layer, else the module; None if no module ran the operation. attention: whether it is an
        attention layer. heads: query heads, empty where all are concerned or none. tensor: "query", "key", "value",
        "scores", "weights", "out", a gradient of these, a weight's name, or "activations". batch, row: of the first
        number that is not finite, None where they are not known.
    role: which tensor of the attention the operation makes or reads, as for `tensor`; "" where that is not known.
    reached: the tensors of the layer's attention call that are not finite, where its q, k and v are known.
    """

    layer: str | None = None
    attention: bool = False
    heads: tuple[int, ...] = ()
    tensor: str = "activations"
    batch: int | None = None
    row: int | None = None
    role: str = ""
    reached: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Case:
    """A root with all that is known of it. following: the operations after it, in their order.

    written_state: which state of the optimizer it wrote. versions: of the software whose kernel ran it.
    """

    root: Root
    numbers: Numbers = Numbers()
    place: Place = Place()
    following: tuple[Operation, ...] = ()
    written_state: str = ""
    versions: str = ""

    @property
    def operation(self) -> Operation:
        return self.root.operation

    @property
    def dtype(self) -> str:
        return self.root.tensor.dtype


def is_exponential(operation: Operation) -> bool:
    return operation.packet.rstrip("_") in ("exp", "exp2", "expm1")


def is_softmax(operation: Operation) -> bool:
    return "softmax" in operation.packet


def feeds_a_sum(case: Case) -> bool:
    """Whether the next operations sum the result of this one, as a softmax that is written out does."""
    memory = case.root.tensor.memory
    return any(
        operation.packet in ("sum", "mean", "logsumexp") and any(x.memory == memory for x in operation.inputs)
        for operation in case.following[:8]
    )
