"""From the record of a step to its root, on records that are written by hand."""

import math

import pytest

from hnf_attention.diagnosis.triage.records import BATCH, Operation, Record, Source, TensorRecord
from hnf_attention.diagnosis.triage.roots import OPERATION, SOURCE, UNSEEN, find_root

NAN, INF = (math.nan, math.nan), (0.0, math.inf)
HIDDEN, FINE = (-math.inf, 1.0), (-1.0, 1.0)


def steps(*rows):
    """A record of (name, inputs, outputs, constants); inputs and outputs map memory to (least, most)."""
    operations = []
    for index, (name, inputs, outputs, *constants) in enumerate(rows):
        sides = [
            [TensorRecord(str(memory), memory, (2,), "float32", *values) for memory, values in side.items()]
            for side in (inputs, outputs)
        ]
        operations.append(Operation(index, f"aten.{name}.default", "m", "forward", *sides, tuple(constants)))
    return operations


def root_of(operations, symptom, names=()):
    return find_root(Record(operations, dict(names), {symptom: "loss"}))


def test_nothing_is_found_where_nothing_reaches_a_symptom():
    ops = steps(("div", {0: FINE}, {1: INF}), ("where", {1: INF, 0: FINE}, {2: FINE}))
    assert root_of(ops, 2) is None


def test_the_root_is_the_first_operation_with_finite_inputs():
    ops = steps(("mm", {0: FINE}, {1: INF}), ("sub", {1: INF}, {2: NAN}), ("sum", {2: NAN}, {3: NAN}))
    root = root_of(ops, 3)
    assert (root.kind, root.operation.index, root.masked) == (OPERATION, 0, False)


def test_what_the_run_was_given_is_the_root():
    names = {7: Source(BATCH, "x")}
    ops = steps(("mul", {7: NAN}, {1: NAN}), ("sum", {1: NAN}, {2: NAN}))
    root = root_of(ops, 2, names)
    assert (root.kind, root.source.name) == (SOURCE, "x")


def test_a_mask_is_no_root_where_nan_comes_beside_it():
    ops = steps(
        ("full", {}, {5: HIDDEN}, -math.inf),
        ("mm", {0: FINE}, {1: INF}),
        ("add", {1: INF, 5: HIDDEN}, {2: NAN}),
        ("_softmax", {2: NAN}, {3: NAN}),
    )
    assert root_of(ops, 3).operation.packet == "mm"


@pytest.mark.parametrize("given", [False, True])
def test_a_softmax_over_hidden_keys_only_is_its_own_root(given):
    made = [("full", {}, {5: HIDDEN}, -math.inf)]
    ops = steps(
        *([] if given else made),
        ("add", {0: FINE, 5: HIDDEN}, {2: HIDDEN}),
        ("_softmax", {2: HIDDEN}, {3: NAN}),
    )
    root = root_of(ops, 3)
    assert root.operation.packet == "_softmax" and root.masked


def test_minus_infinity_by_accident_is_the_root_of_a_softmax_that_is_nan():
    ops = steps(
        ("bmm", {0: FINE}, {1: (-math.inf, -math.inf)}),
        ("_softmax", {1: (-math.inf, -math.inf)}, {3: NAN}),
    )
    assert root_of(ops, 3).operation.packet == "bmm"


def test_a_mask_of_the_lowest_number_that_overflows_is_on_purpose():
    lowest = (-3.4028e38, 0.0)
    ops = steps(("add", {0: FINE, 5: lowest}, {1: HIDDEN}), ("_softmax", {1: HIDDEN}, {3: NAN}))
    root = root_of(ops, 3)
    assert root.operation.packet == "_softmax" and root.masked


def test_minus_infinity_on_purpose_is_the_root_where_no_softmax_takes_it():
    ops = steps(("masked_fill", {0: FINE}, {1: HIDDEN}, -math.inf), ("gelu", {1: HIDDEN}, {2: NAN}))
    assert root_of(ops, 2).operation.packet == "masked_fill"


def test_memory_that_no_operation_is_seen_to_break_was_broken_by_another_kernel():
    ops = steps(("zeros", {}, {1: FINE}), ("add", {1: NAN}, {2: NAN}))
    root = root_of(ops, 2)
    assert (root.kind, root.operation.packet) == (UNSEEN, "add")


def test_blank_memory_that_is_overwritten_is_no_root():
    ops = steps(("empty", {}, {1: NAN}), ("mm", {0: FINE}, {1: INF}), ("sum", {1: INF}, {2: INF}))
    assert root_of(ops, 2).operation.packet == "mm"


def test_of_several_roots_the_first_to_run_is_taken():
    ops = steps(
        ("log", {0: FINE}, {1: NAN}), ("div", {0: FINE}, {2: INF}), ("add", {2: INF, 1: NAN}, {3: NAN})
    )
    assert root_of(ops, 3).operation.packet == "log"
