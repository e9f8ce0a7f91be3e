"""Where the fold keeps each number, what its kernel is compiled for, and what it is told of a call."""

from dataclasses import dataclass
from typing import Any, NamedTuple

from ..shared.plan import ScorePlan


class SumFields(NamedTuple):
    """The place in the accumulator of each sum over rows."""

    rows: int
    judged_rows: int
    left_out_rows: int
    empty_rows: int
    nonfinite_rows: int
    entropy: int
    logit_range: int
    normalized_entropy: int
    max_weight: int
    sink_mass: int
    rest_entropy: int
    jacobian_trace_bound: int
    saturated_rows: int
    stray_rows: int
    judged_blocks: int
    normalized_entropy_blocks: int
    max_weight_blocks: int
    sink_mass_blocks: int
    jacobian_trace_bound_blocks: int
    saturated_rows_blocks: int
    sequences: int
    query_square: int
    key_square: int
    nonfinite_query: int
    nonfinite_key: int
    nonfinite_value: int
    nonfinite_out: int
    nonfinite_empty: int


class MaxFields(NamedTuple):
    """The place in the accumulator of each maximum over rows; all of them lie behind the sums."""

    max_logit: int
    neg_min_logit: int
    logit_range: int
    max_weight: int
    neg_normalized_entropy: int
    neg_max_weight: int
    query_square: int
    key_square: int
    num_keys: int
    score_kind: int


class Layout(NamedTuple):
    """Where the accumulator keeps each number, and which rows are judged and saturated."""

    sums: SumFields
    histogram: int  # place of the first bin, behind the other sums
    bins: int
    maxima: MaxFields
    judged_min_keys: int  # visible keys of a row that is judged
    saturated: float  # normalized entropy below which a row is saturated

    @property
    def num_sums(self) -> int:
        return self.histogram + self.bins

    @property
    def num_fields(self) -> int:
        return self.num_sums + len(self.maxima)


@dataclass(frozen=True, repr=False)
class FoldPlan(ScorePlan):
    """What the fold is compiled for."""

    has_sinks: bool
    has_table: bool  # of `scan_mask`
    has_padding: bool  # what of `Context` is known
    has_values: bool
    has_outputs: bool
    is_sampled: bool
    group: int  # query heads of a key head
    head_dim: int
    block: int
    block_d: int
    columns: int  # of q and k, held at a time
    width: int  # a power of two, at least the number of fields
    bins: int  # a power of two larger than the number of bins of the histogram
    num_sums: int
    num_fields: int
    layout: Layout


class Table(NamedTuple):
    """Visible keys and first visible key of each row, or None and zeros: see `scan_mask`."""

    ptr: Any
    stride_b: int
    stride_h: int
    stride_part: int


class Context(NamedTuple):
    """What is known of a call beside its tensors, None and zeros for what is not: see `FoldPlan`.

    The fields stand here one by one, because Triton 3.6 loses an integer 1 in a tuple within a tuple.
    """

    left_out_ptr: Any  # uint8 (B, M): queries that are not judged
    left_out_stride_b: int
    left_out_stride_m: int
    hidden_ptr: Any  # uint8 (B, N): keys that no query sees
    hidden_stride_b: int
    hidden_stride_n: int
    shared_ptr: Any  # int64 (B, H): the key that the rows of a head share, -1 for none
    shared_stride_b: int
    shared_stride_h: int
    value_ptr: Any  # (B, H_kv, N): NaN or inf if the value is not finite
    value_stride_b: int
    value_stride_h: int
    value_stride_n: int
    out_ptr: Any  # (B, H, M): NaN or inf if the output is not finite
    out_stride_b: int
    out_stride_h: int
    out_stride_m: int
