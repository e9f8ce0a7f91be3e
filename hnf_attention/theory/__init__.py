"""Theory: curvature, forward errors, required bits, and scores before training. fp64, no model in sight."""

from .arithmetic import (
    EIGHT_BIT_TENSOR_CORE_UNIT,
    FORMATS,
    TENSOR_CORE_UNIT,
    Arithmetic,
    Format,
    eager,
    eight_bit_flash,
    flash,
    number_format,
)
from .bits import TOLERANCE, required_bits, required_bits_of_row, rounding_spread, typical_bits
from .curvature import hnf_curvature, hnf_curvature_bound
from .error import expected_error, forward_error_bound, forward_error_bound_from_norms
from .initial import (
    critical_std,
    critical_temperature,
    entropy_law,
    expected_entropy,
    expected_max_logit,
    row_spread,
    score_std,
)
from .overflow import OverflowPath, overflow_paths
from .weights import HeadWeights, Norm, fold_norm, weight_logit_bound, weight_score_std

__all__ = [
    "EIGHT_BIT_TENSOR_CORE_UNIT",
    "FORMATS",
    "TENSOR_CORE_UNIT",
    "TOLERANCE",
    "Arithmetic",
    "Format",
    "HeadWeights",
    "Norm",
    "OverflowPath",
    "critical_std",
    "critical_temperature",
    "eager",
    "eight_bit_flash",
    "entropy_law",
    "expected_entropy",
    "expected_error",
    "expected_max_logit",
    "flash",
    "fold_norm",
    "forward_error_bound",
    "forward_error_bound_from_norms",
    "hnf_curvature",
    "hnf_curvature_bound",
    "number_format",
    "overflow_paths",
    "required_bits",
    "required_bits_of_row",
    "rounding_spread",
    "row_spread",
    "score_std",
    "typical_bits",
    "weight_logit_bound",
    "weight_score_std",
]
