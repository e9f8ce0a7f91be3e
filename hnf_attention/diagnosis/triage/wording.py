"""The sentences of a trace: what was seen, with its numbers, and what to do."""

from __future__ import annotations

from ...names import display_name
from ..issue import number_text
from . import causes
from .case import FITS, LARGEST, NOT_FINITE, TOO_LARGE, Case
from .records import BACKWARD, OPTIMIZER
from .roots import SOURCE, UNSEEN

#: The natural logarithm of each format's largest number.
_EXP_LIMIT = {"float16": 11.09, "bfloat16": 88.7, "float32": 88.7, "float64": 709.8}
_WIDER = "compute it in float32 or bfloat16"
_CALMER = "smaller query and key weights (QK-clip, QK-norm) keep scores small for good"

SUGGESTIONS = {
    causes.NAIVE_SOFTMAX: "subtract each row's maximum before the exponential, as torch.softmax does",
    causes.FP16_PRODUCT: f"scale q before the product, or {_WIDER} (bfloat16 reaches 3e38); {_CALMER}",
    causes.PRODUCT: "the query and key weights have exploded: go back to a checkpoint, lower the learning rate; "
    f"{_CALMER}",
    causes.EMPTY_ROW: "give every row a key to see, padding included, or set such rows to 0 after the softmax, as "
    "scaled_dot_product_attention does",
    causes.MASK: "look for NaN and +inf in the mask or position bias; hide keys with -inf or a boolean mask",
    causes.INPUT: "look at the batch: skip or repair it; check where the data come from",
    causes.WEIGHT: "an earlier step broke this weight: go back to a checkpoint in which it is finite, and trace the "
    "step that breaks it, with the optimizer",
    causes.WRITTEN: "look at the code that writes this constant: a hook, a masked_fill, an index assignment",
    causes.ACTIVATION: f"{_WIDER}; if it is in float32 already, the weights before it have exploded: go back to a "
    "checkpoint and lower the learning rate",
    causes.UNDEFINED: "keep its argument inside of the domain: an epsilon in the denominator, or under the root or the "
    "logarithm",
    causes.NO_TARGETS: "skip batches without targets, or sum the loss and divide by max(1, targets)",
    causes.KERNEL: "take another kernel for this call (torch.nn.attention.sdpa_kernel chooses), or another version; "
    "the reproduction is what a bug report needs",
    causes.GRADIENT: "a smaller loss scale where one is used (a GradScaler lowers it by itself and skips the step), "
    "bfloat16, or float32 for this operation",
    causes.SCALER: "the scale has fallen too far: every step overflowed. Find why (a trace without the scaler says), "
    "then start the scaler anew",
    causes.EPSILON: "a larger epsilon: 1e-8 is 0 in float16; keep the optimizer's state in float32",
    causes.SECOND_MOMENT: "clip gradients before the step; keep the second moment in float32; drop this state to start "
    "it anew",
    causes.OPTIMIZER_STATE: "an earlier step broke the state: go back to a checkpoint in which it is finite",
    causes.UNTRACED: "trace a smaller step: without the optimizer, and with PyTorch's own operators in place of others",
    causes.UPDATE: "a smaller learning rate; clip gradients before the step",
}


def evidence_of(case: Case, cause: str) -> str:
    """One sentence: what, where, and the numbers."""
    return f"{case.numbers.kind} in {_where(case)} traced to {_what(case, cause)}"


def _where(case: Case) -> str:
    place = case.place
    if place.layer is None:
        return "the loss" if case.operation.phase != OPTIMIZER else "the optimizer's step"
    heads = number_text(place.heads)
    return f"layer {display_name(place.layer)}{',' if heads else ''}{heads}"


def _what(case: Case, cause: str) -> str:
    root, numbers, operation = case.root, case.numbers, case.operation
    if root.kind == SOURCE:
        return _of_a_source(case, cause)
    if root.kind == UNSEEN:
        return (
            "memory that a kernel outside of PyTorch's operators wrote, from finite numbers as far as is seen"
        )
    name, size = operation.packet, _size(case)
    if cause == causes.NAIVE_SOFTMAX:
        most = max(x.most for x in operation.inputs)
        limit = _EXP_LIMIT.get(case.dtype, 88.7)
        return f"QK^T logits reaching {most:.4g}, whose {name} is inf in {case.dtype} (above {limit})"
    if cause in (causes.FP16_PRODUCT, causes.PRODUCT):
        reach = (
            numbers.double_size if numbers.scores is None else numbers.scores
        )  # those of a fused attention
        reached = f"up to {size:.4g}, whose product is" if reach is None else f"reaching {reach:.4g},"
        return f"{name} of q and k {reached} above the largest {_named(case)}"
    if cause == causes.EMPTY_ROW:
        place = case.place
        row = "" if place.row is None else f" (batch {place.batch}, row {place.row} is the first)"
        return f"{name} over rows all of whose keys are hidden{row}: of -inf alone it is NaN"
    if cause == causes.WRITTEN:
        written = ", ".join(str(x) for x in operation.constants)
        return f"{name} with the constant {written} in {_module(case)}"
    if cause == causes.NO_TARGETS:
        return f"{name}: every target is ignored, and a mean over none is 0 / 0"
    if cause == causes.SCALER:
        return f"1 / the loss scale, which is inf: the scale has fallen to {_scale(case)}"
    if cause == causes.EPSILON:
        return f"{name} of {_state(case)}, whose denominator is 0: second moment and epsilon are both 0 in {case.dtype}"
    if cause == causes.SECOND_MOMENT:
        return (
            f"{_state(case)}: the square of gradients up to {size:.4g} is beyond the largest {_named(case)}"
        )
    if cause == causes.KERNEL:
        return _of_a_kernel(case)
    if numbers.double == TOO_LARGE and numbers.double_size is not None:
        reaching = f"reaching {numbers.double_size:.4g}, above the largest {_named(case)}"
        return f"{name} in {_module(case)} {reaching}"
    if numbers.double == NOT_FINITE:
        return f"{name} in {_module(case)} of finite numbers up to {size:.4g}, not finite in double precision either"
    if numbers.double == FITS:
        return (
            f"{name} in {_module(case)} of numbers up to {size:.4g}: the result would be {numbers.double_size:.4g}, "
            f"but what it computes on the way is beyond the largest {_named(case)}"
        )
    return f"{name} in {_module(case)} of finite numbers up to {size:.4g}"


def _of_a_source(case: Case, cause: str) -> str:
    source, tensor = case.root.source, case.root.tensor
    shape = f"{tensor.dtype} {tensor.shape}"
    known = f"a tensor {shape} that the run was given"
    if source is not None:
        owner = f" of {source.parameter}" if source.parameter else ""
        known = f"{source.kind} {source.name}{owner} ({shape})"
    if cause == causes.WRITTEN:
        return f"the constant {tensor.most:g}, written by {case.operation.packet} in {_module(case)}"
    if cause == causes.MASK:
        return f"{known}, which is added to the scores: q, k and v are finite"
    if case.numbers.element:
        number, at = case.numbers.broken, list(case.numbers.element)
        where = f"is not finite (at {at})" if number == 1 else f"are not finite (the first at {at})"
        return f"{known}, {number:,} of whose numbers {where}"
    first = "" if source is not None and source.kind == "parameter" else f", first read by {_module(case)}"
    return f"{known}, which holds NaN or inf before the step{first}"


def _of_a_kernel(case: Case) -> str:
    operation, numbers = case.operation, case.numbers
    result = "gradients" if operation.phase == BACKWARD else "results"
    text = f"{operation.packet}, which gave {result} that are not finite from finite inputs up to {_size(case):.4g}"
    if operation.is_attention and numbers.least_lse is not None:
        text += (
            f" and finite statistics (scores up to {numbers.scores:.4g}, smallest lse {numbers.least_lse:.4g}"
        )
        known = numbers.least_lse < -88.7 and operation.phase == BACKWARD
        text += "; exp(-lse) is inf in float32 below -88.7)" if known else ")"
    if numbers.double == FITS and numbers.double_size is not None:
        text += f"; double precision gives {numbers.double_size:.4g}"
    return f"{text}; {case.versions}" if case.versions else text


def _size(case: Case) -> float:
    return case.operation.largest_input


def _module(case: Case) -> str:
    return "the loss" if case.operation.module is None else display_name(case.operation.module)


def _named(case: Case) -> str:
    return f"{case.dtype} ({LARGEST.get(case.dtype, LARGEST['float32']):.5g})"


def _state(case: Case) -> str:
    return (
        f"{case.written_state or 'the update'} of {case.place.tensor}"
        if case.place.tensor
        else case.written_state
    )


def _scale(case: Case) -> str:
    return f"{min((x.least for x in case.operation.inputs), default=0.0):.3g}"
