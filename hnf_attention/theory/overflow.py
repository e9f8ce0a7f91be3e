"""Which step of attention overflows first, from the number formats alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .arithmetic import Format, number_format


@dataclass(frozen=True)
class OverflowPath:
    """One step that could leave its format: `value` against `limit`, and who computes it that way.

    headroom: log2(limit / |value|), bits; below 0 the step overflows.
    """

    name: str
    value: float
    limit: float
    consequence: str
    where: str

    @property
    def overflows(self) -> bool:
        return self.value > self.limit

    @property
    def headroom(self) -> float:
        return float("inf") if self.value <= 0 else float(np.log2(self.limit) - np.log2(self.value))


def overflow_paths(
    dtype: object, max_abs_score: float, scale: float, keys: int, *, compute_dtype: object = "float32"
) -> list[OverflowPath]:
    """Every step of one attention call that could overflow, worst first, and which attention computes it.

    max_abs_score: largest |s|, nats. scale: of q.k. keys: N visible keys. dtype: of storage, in which eager
    attention keeps products and scores. compute_dtype: of the softmax.

    Steps, all of them from the formats alone (IEEE 754; OCP fp8):
        raw product q.k = |s| / scale in dtype, against its largest number (fp16: 65504);
        scaled score plus a finite mask value (finfo.min), against half an ulp of the largest number (fp16:
            16): a score below minus that gives -inf, and NaN in a row masked as a whole;
        exp without subtracting the maximum, in dtype and in compute_dtype: log of the largest number (fp16
            11.09, bf16 and fp32 88.72). Library kernels subtract it: "NaN from a logit of 89.3" is only
            right for a softmax written by hand;
        sum of N exponentials in dtype: N against the largest number (fp16: 65504 keys).
    Raises ValueError for an unknown dtype, scale <= 0 or keys < 1.
    """
    storage, compute = number_format(dtype), number_format(compute_dtype)
    if not scale > 0 or keys < 1:
        raise ValueError(f"expected scale > 0 and keys >= 1, got {scale} and {keys}")
    top = abs(float(max_abs_score))
    shifted = "a softmax written by hand that does not subtract the maximum"
    paths = [
        OverflowPath(
            f"q.k in {storage.name} before scaling",
            top / scale,
            storage.largest,
            "inf, and NaN in the softmax",
            "eager attention that scales after the product",
        ),
        OverflowPath(
            f"score + finfo.min in {storage.name}",
            top,
            _half_ulp_of_largest(storage),
            "-inf where the mask meant a finite number; NaN in a row that is masked as a whole",
            "additive masks of finfo.min on stored scores",
        ),
        OverflowPath(
            f"sum of {keys} exponentials in {storage.name}",
            float(keys),
            storage.largest,
            "inf, and weights of 0",
            "a softmax that keeps its sum in the storage format",
        ),
    ]
    for form in dict.fromkeys((storage, compute)):
        limit = float(np.log(form.largest))
        paths.append(OverflowPath(f"exp(score) in {form.name}", top, limit, "inf / inf = NaN", shifted))
    return sorted(paths, key=lambda path: path.headroom)


def _half_ulp_of_largest(storage: Format) -> float:
    """What can be subtracted from -largest without rounding to -inf."""
    return float(2.0 ** (np.floor(np.log2(storage.largest)) - storage.bits))
