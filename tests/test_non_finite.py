"""Where NaN and inf come from, and rows whose keys are all hidden."""

import numpy as np
import pytest
import torch
from heads import found, snapshot

from hnf_attention.diagnosis import diagnose
from hnf_attention.engine import fold
from hnf_attention.instrumentation.scores import given
from hnf_attention.monitoring.extremes import with_steps
from hnf_attention.reference import masks
from hnf_attention.statistics.heads import HeadStats, Snapshot

FED = {
    "nonfinite_query": 32,
    "nonfinite_key": 32,
    "nonfinite_value": 32,
    "nonfinite_rows": 32,
    "nonfinite_out": 32,
}
HIDDEN = {"nonfinite_out": 8, "nonfinite_empty": 8}


def evaluated(step, **layers):
    """A snapshot of a finished model."""
    made = snapshot(step, **layers)
    object.__setattr__(made, "training", False)
    return made


def origin(*history):
    """The one error, after checks that hold wherever it is."""
    diagnosis = diagnose(history)
    (error,) = diagnosis.errors
    assert error.issue_type == "non_finite" and not diagnosis.healthy
    assert f"step {history[-1].step}" in error.evidence and len(error.headline) <= 160
    return error


def test_rows_without_keys_are_the_origin_in_the_layer_whose_output_they_break():
    error = origin(evaluated(1, a={}, b=HIDDEN, c=FED, d=FED))
    assert error.layer == "b" and error.head is None
    assert "layer b: 32 outputs are not finite at step 1" in error.evidence
    assert "rows whose keys are all hidden" in error.evidence and "give every row a key" in error.suggestion
    assert "checkpoint" not in error.suggestion


@pytest.mark.parametrize("own_keys", [True, False])  # with a key of its own, a hidden row is padding
def test_a_softmax_over_hidden_keys_only_is_found_from_what_it_returns(own_keys):
    """Hand-written attention: -inf in all scores of the first four rows, NaN in their weights."""
    scores = torch.randn(2, 4, 24, 24, generator=torch.Generator().manual_seed(0))
    seen = torch.ones(24, 24, dtype=torch.bool).tril()
    seen[:, :4] = False
    scores = scores.masked_fill(~seen, -torch.inf)

    def part(rows):
        return masks.take_rows(scores, rows), masks.take_rows(seen.expand(2, 4, 24, 24), rows)

    options = dict(own_keys=own_keys, result=scores.softmax(-1), device=scores.device)
    measured = given("a", part, (2, 4, 24, 24), 16, torch.float32, **options)
    values = fold.new_accumulator(4, scores.device)
    fold.fold_measured(values, measured.rows, measured.beside)
    stats = HeadStats(with_steps(fold.collect([values]).numpy()), 16, "float32")
    assert (stats.nonfinite_rows == 0).all()
    error = origin(Snapshot(1, {"a": stats, "b": snapshot(1, b=FED).layers["b"]}))
    assert error.layer == "a" and "rows whose keys are all hidden" in error.evidence


def test_what_followed_is_one_note():
    diagnosis = diagnose([evaluated(1, a={}, b=HIDDEN, c=FED, d=FED | {"heads": 2})])
    (note,) = diagnosis.notes
    assert (note.layer, note.head, note.issue_type) == ("", None, "non_finite")
    assert (
        "2 layers more" in note.evidence
        and "6 heads: c to d" in note.evidence
        and "from layer b" in note.evidence
    )
    assert len(diagnosis.issues) == 2


@pytest.mark.parametrize("step", [1, 50])
def test_what_arises_from_finite_inputs_is_known_at_any_cadence(step):
    assert "not known" not in origin(snapshot(0, a={}, b={}), snapshot(step, a={}, b=HIDDEN)).evidence


@pytest.mark.parametrize("size, key", [(9e4 / 8, 1.0), (1.0, 9e4 / 8)])
def test_a_product_that_fp16_cannot_hold(size, key):
    """SDPA's own statistics are finite; the eager product is not."""
    overflow = dict(nonfinite_out=[0, 32, 0, 0], query_size=size, key_size=key, max_logit=[5, 9e4 / 8, 5, 5])
    overflow["min_logit"] = [-5, 9e4 / 8 - 20, -5, -5]
    error = origin(evaluated(1, a=overflow | {"dtype": "float16"}, b=FED))
    assert (error.layer, error.head) == ("a", 1) and "q.k before scaling reaches 9e+04" in error.evidence
    assert "bf16 or fp32" in error.suggestion and "SDPA" in error.suggestion and "fp16" in error.headline
    other = origin(evaluated(1, a=overflow | {"dtype": "bfloat16"}, b=FED))
    assert "between the scores and the output" in other.evidence and "fp16" not in other.suggestion


def test_a_product_that_fp16_cannot_hold_is_named_where_its_output_was_not_seen():
    product = dict(
        query_size=9e4 / 8, key_size=1.0, max_logit=9e4 / 8, min_logit=9e4 / 8 - 20, dtype="float16"
    )
    diagnosis = diagnose([evaluated(1, first=product, b=FED | {"dtype": "float16"}, c=FED)])
    error = diagnosis.errors[0]
    assert error.layer == "b" and "reaches 9e+04 in first" in error.evidence and "SDPA" in error.suggestion


def test_a_product_of_hidden_keys_counts_too():
    """Eager attention stores it before it adds the mask."""
    hidden = dict(nonfinite_out=32, query_size=9e4 / 8, key_size=1.0, score_kind=1, dtype="float16")
    assert "may reach 9e+04, which is inf in fp16" in origin(evaluated(1, a=hidden)).evidence
    fill = dict(nonfinite_out=32, min_logit=-65504.0, score_kind=1, dtype="float16")
    assert "q.k" not in origin(evaluated(1, a=fill)).evidence


def test_finite_q_and_k_with_a_mask_blame_the_mask_and_without_one_the_product():
    masked = origin(evaluated(1, a={"nonfinite_rows": 5, "score_kind": 1}))
    assert "the mask or bias" in masked.evidence and "(0.5%)" in masked.evidence
    plain = origin(evaluated(1, a={"nonfinite_rows": 5}))
    assert "beyond the largest fp32 number" in plain.evidence
    unseen = {"nonfinite_rows": 5, "score_kind": 2, "query_norm": 0.0, "query_size": np.nan}
    assert "only its scores were seen" in origin(evaluated(1, a=unseen)).evidence


def test_broken_inputs_after_finite_layers_lie_between_two_layers():
    error = origin(snapshot(1, a={}, b={}, c={}), snapshot(2, a={}, b=FED, c=FED))
    assert error.layer == "b" and "between a and b" in error.evidence
    assert "b's projections" in error.suggestion and "checkpoint with finite weights" in error.suggestion
    assert error.suggestion.endswith("; trace_non_finite(model, batch) names the operation")
    assert "checkpoint" not in origin(evaluated(2, a={}, b=FED, c=FED)).suggestion


def test_a_value_alone_is_an_input():
    assert "128 values are not finite" in origin(evaluated(1, a={}, b={"nonfinite_value": 32})).evidence


@pytest.mark.parametrize("cadence", [2, 100])
@pytest.mark.parametrize("earlier", [{}, {"a": {}, "b": {}}])
def test_at_a_coarse_cadence_the_origin_of_broken_weights_is_not_known(cadence, earlier):
    history = [snapshot(10, **earlier)] if earlier else []
    step = cadence + (10 if earlier else 0)
    error = origin(*history, snapshot(step, a=FED, b=FED))
    assert f"not known at this cadence: {cadence} steps" in error.evidence
    # record_every=1 measures more steps, but a snapshot still covers several.
    assert "log_every=1" in error.suggestion and "record_every" not in error.suggestion + error.headline
    assert "log_every=1" in error.headline


def test_at_every_step_the_first_layer_is_fed_by_weights_or_data():
    error = origin(snapshot(9, a={}, b={}), snapshot(10, a=FED, b=FED))
    assert "first layer to run" in error.evidence and "not known" not in error.evidence
    assert error.suggestion.endswith("; trace_non_finite(model, batch) names the operation")
    finished = origin(evaluated(100, a=FED, b=FED))  # its weights do not change, however many steps are in it
    assert "not known" not in finished.evidence and "checkpoint" not in finished.suggestion


def test_the_origin_is_that_of_the_first_broken_snapshot():
    history = [
        snapshot(1, a={}, b={}, c={}),
        snapshot(2, a={}, b=HIDDEN, c={}),
        snapshot(3, a=FED, b=FED, c=FED),
    ]
    error = origin(*history)
    assert error.layer == "b" and "at step 2, and it is still there at step 3" in error.evidence
    assert "2 layers more" in diagnose(history).notes[0].evidence


def test_an_old_incident_is_not_the_origin_of_a_new_one():
    history = [snapshot(1, a={}, b=HIDDEN), snapshot(2, a={}, b={}), snapshot(3, a=HIDDEN, b={})]
    assert origin(*history).layer == "a" and "at step 3;" in origin(*history).evidence
    assert diagnose(history[:2]).issues == []


def test_a_layer_that_is_the_model_itself_is_named_in_words():
    error = origin(evaluated(1, **{"": HIDDEN, "b": FED}))
    assert "layer (the model itself): " in error.evidence


def test_a_long_name_keeps_the_headline_short():
    error = origin(evaluated(1, a={}, **{f"{'deep.' * 60}attention": FED}))
    assert len(error.headline) <= 160 and error.headline.startswith("...") and " -> " in error.headline


# Rows whose keys are all hidden, with finite outputs


@pytest.mark.parametrize("kind, mask", [(0, "a boolean mask, a window"), (1, "an additive mask")])
def test_empty_rows_are_a_note_of_the_layer(kind, mask):
    issues = found([snapshot(4, a={}, b={"empty_rows": 100.0, "score_kind": kind})], "empty_rows")
    (issue,) = issues.values()
    assert (issue.layer, issue.head, issue.severity, issue.value) == ("b", None, "note", 400)
    assert f"the keys of 400 rows (9.1%) of layer b are all hidden at step 4, by {mask}" in issue.evidence
    assert not diagnose([snapshot(4, b={"empty_rows": 100.0})]).has_issues()


def test_empty_rows_of_many_layers_are_one_note():
    layers = {f"h.{n}": {"empty_rows": 10.0 * (n > 1)} for n in range(5)}
    (issue,) = diagnose([snapshot(4, **layers)]).issues
    assert issue.layer == "" and "120 rows (1.0%) of 3 layers (h.2 to h.4)" in issue.evidence


def test_empty_rows_with_nan_in_their_output_are_the_error_alone():
    diagnosis = diagnose([evaluated(4, a={}, b={"empty_rows": 100.0} | HIDDEN)])
    assert [(i.layer, i.issue_type, i.severity) for i in diagnosis.issues] == [("b", "non_finite", "error")]


def test_padding_without_keys_is_not_told():
    assert diagnose([snapshot(4, a={"left_out_rows": 100.0})]).issues == []


def test_a_snapshot_without_a_training_flag_is_taken_for_training():
    plain = Snapshot(100, snapshot(1, a=FED).layers)
    assert "not known at this cadence" in diagnose([plain]).errors[0].evidence
