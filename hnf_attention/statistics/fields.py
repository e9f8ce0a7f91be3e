"""The one ordered list of what a head's fold holds: sums, a histogram, maxima.

An accumulator is (NUM_FOLDED, H) fp64: SUM_FIELDS, then HISTOGRAM_BINS counts, then MAX_FIELDS. Two folds
merge by one addition (sums and counts) and one maximum. Kernels get the indices of these names from their host.
Head statistics are (NUM_FIELDS, H): behind the fold they have STEP_FIELDS, which merge by the maximum too.
"""

from __future__ import annotations

# A row with fewer visible keys is not judged: the entropy of three keys says little about a head.
JUDGED_MIN_KEYS = 16
# A row whose entropy is below this share of log(visible keys) is saturated: almost no gradient passes it.
SATURATED_ENTROPY = 0.02

# Means over judged rows that have a standard error where rows are sampled. Rows of a block are alike, so the
# error comes from the spread between blocks (Cochran, Sampling Techniques, 1977, chapter 9). Each of these
# fields therefore has a second sum: (sum over a block)^2 / rows of the block.
ERROR_FIELDS = ("normalized_entropy", "max_weight", "sink_mass", "jacobian_trace_bound", "saturated_rows")
SUM_FIELDS = (
    "rows",  # count: finite rows with at least one visible key, but for those left out
    "judged_rows",  # count: of those, rows with at least JUDGED_MIN_KEYS visible keys
    "left_out_rows",  # count: rows of padding, of a query mask, or past the last sequence of a pack
    "empty_rows",  # count: other rows without a visible key
    "nonfinite_rows",  # count: other rows whose statistics are NaN or inf, because q or k is
    "entropy",  # nats, over rows
    "logit_range",  # nats, over rows: largest score minus smallest
    "normalized_entropy",  # 0 to 1, over judged rows: entropy / log(visible keys)
    "max_weight",  # 0 to 1, over judged rows: largest softmax weight
    "sink_mass",  # 0 to 1, over judged rows: weight on the row's sink key and on the learned sink
    "rest_entropy",  # 0 to 1, over judged rows: (1 - sink mass) * entropy / log(keys) of the keys but the sink key
    "jacobian_trace_bound",  # 0 to 1, over judged rows: 1 - max_weight^2, at least 1 - sum p^2
    "saturated_rows",  # count: judged rows with a normalized entropy below SATURATED_ENTROPY
    "stray_rows",  # count: of those, rows with less than half of their weight on the sink
    "judged_blocks",  # count: blocks of BLOCK_ROWS rows of a batch element that hold a judged row
    *(f"{name}_blocks" for name in ERROR_FIELDS),  # the unit of the field, squared, times rows
    "sequences",  # count: batch elements; of a pack, sequences that hold a token; 0 where a call continues one
    "query_square",  # |q|^2 over all queries that are not left out, sampled or not; those that hold NaN do not count
    "key_square",  # |k|^2 over the keys of the head that some query sees, and no call before; likewise
    "nonfinite_query",  # count: queries, sampled or not, that hold NaN or inf, left out or not
    "nonfinite_key",  # count: keys that hold NaN or inf
    "nonfinite_value",  # count: values that hold NaN or inf
    "nonfinite_out",  # count: outputs of the measured rows that hold NaN or inf
    "nonfinite_empty",  # count: of those, outputs of rows without a visible key
)
HISTOGRAM_BINS = 32  # counts of judged rows by normalized entropy, over [0, 1]
MAX_FIELDS = (
    "max_logit",  # nats, over rows
    "neg_min_logit",  # nats, over rows; minima are negated, so that one maximum merges all fields
    "logit_range",  # nats, over rows
    "max_weight",  # 0 to 1, over judged rows
    "neg_normalized_entropy",  # -1 to 0, over judged rows
    "neg_max_weight",  # -1 to 0, over rows
    "query_square",  # scale^2 |q|^2, over the queries of the sum
    "key_square",  # |k|^2, over the keys of the sum
    "num_keys",  # count: keys of a call, visible or not; of a pack, all its tokens
    "score_kind",  # 0, 1 or 2: what else shapes the scores, see `reference.fold.Measured`
)
#: Maxima of the steps since the snapshot before that were not measured, from the calls that were kept.
STEP_FIELDS = (
    "max_logit",  # nats, over one block of rows of each sequence in each forward
    "logit_range",  # nats, over the same rows
    "neg_first_query",  # minus the number of the first step whose queries held NaN or inf
    "neg_first_key",
    "neg_first_value",
    "neg_first_out",
    "neg_first_forward",  # minus the number of the first forward in which any of them did
)
NUM_SUMS = len(SUM_FIELDS) + HISTOGRAM_BINS
NUM_FOLDED = NUM_SUMS + len(MAX_FIELDS)
NUM_FIELDS = NUM_FOLDED + len(STEP_FIELDS)

# What `extended=True` adds to a RowStats, in the order that the kernels write them.
EXTENDED_FIELDS = ("logit_var", "collision", "score_std", "sink_mass", "score_mean", "visible_keys")
