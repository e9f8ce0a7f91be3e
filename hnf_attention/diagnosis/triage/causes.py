"""The cause of a root, from what is known of it."""

from __future__ import annotations

from .case import (
    FITS,
    LARGEST,
    NOT_FINITE,
    TOO_LARGE,
    Case,
    feeds_a_sum,
    is_exponential,
)
from .records import BACKWARD, BUFFER, CLIPPING, OPTIMIZER, PARAMETER, SCALING, STATE
from .roots import SOURCE, UNSEEN

NAIVE_SOFTMAX = "naive softmax overflow"
FP16_PRODUCT = "fp16 product overflow"
PRODUCT = "product overflow"
EMPTY_ROW = "fully masked row"
MASK = "NaN or inf in the mask"
INPUT = "NaN or inf in an input"
WEIGHT = "NaN or inf in a weight"
WRITTEN = "NaN or inf written into activations"
ACTIVATION = "activation overflow"
UNDEFINED = "undefined operation"
NO_TARGETS = "loss over no targets"
KERNEL = "kernel fault"
GRADIENT = "gradient overflow"
SCALER = "loss-scaler underflow"
EPSILON = "optimizer epsilon"
SECOND_MOMENT = "optimizer second moment"
OPTIMIZER_STATE = "NaN or inf in the optimizer's state"
UPDATE = "optimizer update overflow"
UNTRACED = "origin not seen"

CAUSES = (
    *(NAIVE_SOFTMAX, FP16_PRODUCT, PRODUCT, EMPTY_ROW, MASK, INPUT, WEIGHT, WRITTEN, ACTIVATION, UNDEFINED),
    *(NO_TARGETS, KERNEL, GRADIENT, SCALER, EPSILON, SECOND_MOMENT, OPTIMIZER_STATE, UPDATE, UNTRACED),
)
_SECOND_MOMENTS = ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum")


def find_cause(case: Case) -> str:
    """One of `CAUSES`."""
    root, operation = case.root, case.operation
    if root.kind == SOURCE:
        return _of_a_source(case)
    if root.kind == UNSEEN:
        return KERNEL
    if root.masked and not is_exponential(operation):
        return EMPTY_ROW
    if operation.constants and operation.phase not in (OPTIMIZER, SCALING):
        return WRITTEN
    if operation.phase == SCALING:
        return GRADIENT if operation.packet in ("mul", "mul_") else SCALER
    if operation.phase == OPTIMIZER:
        return _of_the_optimizer(case)
    if operation.phase == CLIPPING:
        return GRADIENT
    if case.numbers.no_targets:
        return NO_TARGETS
    if operation.is_attention or operation.library != "aten":
        return _of_a_kernel(case)
    return _of_an_operation(case)


def _of_a_source(case: Case) -> str:
    source, place = case.root.source, case.place
    if source is not None and source.kind in (PARAMETER, STATE):
        return WEIGHT if source.kind == PARAMETER else OPTIMIZER_STATE
    reached = bool(place.reached) and not {"query", "key", "value"} & set(place.reached)
    if place.attention and (reached or place.role == "scores"):
        return MASK
    if source is not None and source.kind == BUFFER:
        return WEIGHT
    return WRITTEN if source is None and not case.root.tensor.shape else INPUT


def _of_the_optimizer(case: Case) -> str:
    if case.numbers.zero_denominator:
        return EPSILON
    if case.written_state in _SECOND_MOMENTS or "sq" in case.written_state:
        return SECOND_MOMENT
    written = {name.partition("[")[0] for name in case.numbers.overflowed}
    if any("sq" in name for name in written):
        return SECOND_MOMENT
    return UPDATE


def _of_a_kernel(case: Case) -> str:
    """Of an operation that computes a whole attention, or of one that is not PyTorch's own."""
    numbers = case.numbers
    if numbers.scores is not None and numbers.scores > LARGEST["float32"]:
        return PRODUCT
    if case.operation.library != "aten":  # what it computes is not known
        if case.operation.largest_input < LARGEST["float32"] ** 0.5:
            return KERNEL
        return PRODUCT if case.operation.is_attention else ACTIVATION
    if numbers.double == TOO_LARGE:
        return GRADIENT if case.operation.phase == BACKWARD else ACTIVATION
    if numbers.double == NOT_FINITE:
        return UNDEFINED
    return KERNEL


def _of_an_operation(case: Case) -> str:
    numbers, operation = case.numbers, case.operation
    if operation.phase == BACKWARD:
        return UNDEFINED if numbers.double == NOT_FINITE else GRADIENT
    if is_exponential(operation) and feeds_a_sum(case):
        return NAIVE_SOFTMAX
    if numbers.double == NOT_FINITE and not is_exponential(operation):
        return UNDEFINED
    if case.place.attention and case.place.role == "scores":
        return FP16_PRODUCT if case.dtype == "float16" else PRODUCT
    limit = LARGEST.get(case.dtype, LARGEST["float32"]) ** 0.5
    if numbers.double == FITS and operation.largest_input < limit:
        return KERNEL
    return ACTIVATION
