"""Processes that are asked for different things, or fail alone: all are told so, and none waits for another."""

import processes_unlike
import pytest
from processes import by_scenario, needs_gloo, start

pytestmark = [
    pytest.mark.slow,
    needs_gloo,
]
IN_ONE = "(in process 1 of 2)"


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """By scenario, what each process found."""
    folder = tmp_path_factory.mktemp("unlike")
    start(processes_unlike.main, (2, str(folder)), 2)
    return by_scenario(folder, 2)


@pytest.mark.parametrize(
    "name, refused", [("all have a norm", ["layers.0", "layers.1"]), ("nothing is seen", [])]
)
def test_qk_norm_that_no_layer_can_have_listens_to_one_forward(found, name, refused):
    assert found[f"evaluation by one, {name}"] == [(False, False, refused, 0, 0)] * 2


def test_a_forward_that_fails_in_one_process_starts_qk_norm_in_none(found):
    (other, *left), (own, *also_left) = found["a forward fails in one"]
    assert own == "RuntimeError: the forward's own error"
    assert other.startswith("ValueError: expected every process to call the same layers in the forward that")
    assert other.endswith("got layers.1 in process 0, an error in process 1")
    assert left == also_left == [[], False, False, 0, []]


def test_so_does_that_of_a_model_which_is_the_layer(found):
    rest = [], False, 0
    assert found["a layer fails in one"] == [("ValueError", *rest), ("ZeroDivisionError", *rest)]


def test_a_forward_that_fails_in_all_leaves_it_to_the_next(found):
    for said, left, started, listening, _, changed in found["a forward fails in both"]:
        assert said == "RuntimeError: the forward's own error"
        assert left == ["layers.0.qk_norm_key", "layers.0.qk_norm_query"]
        assert started and not listening and len(changed) == 4


@pytest.mark.parametrize(
    "name", ["other layers", "fewer layers", "other actions", "other numbers", "one item is wrong"]
)
def test_processes_that_hold_parts_and_are_given_other_interventions_are_told_so(found, name):
    for said, changed, rate in found[name]:
        assert said.startswith("ValueError: expected processes that hold parts of one model to do the same, ")
        assert "got {'action': 'qk_clip'" in said and said.endswith(" in process 1")
        assert not changed and rate == 0.02


def test_so_are_those_that_propose_each_for_itself(found):
    first, second = found["proposed by each"]
    assert first == second and "to do the same, got {'action': 'qk_clip'" in first


def test_whole_layers_and_plans_ask_one_process_alone(found):
    assert found["whole layers, one alone"] == found["a plan of parts, one alone"] == [True, True]


@pytest.mark.parametrize("where", ["plan", "change"])
def test_an_error_of_one_process_is_one_of_the_others_too(found, where):
    (other, *left), (own, *also_left) = found[f"out of memory in a {where}"]
    assert own == "OutOfMemoryError: out of memory"
    assert other == f"RuntimeError: OutOfMemoryError: out of memory {IN_ONE}"
    assert left == also_left == [[]]


def test_processes_that_spread_their_layers_over_other_devices_clip_by_all(found):
    inf = float("inf")
    expected = {"a": [0.0, 1.0], "b": [2.0, 3.0], "c": [inf, inf]}
    assert found["other devices"] == [(expected, 6)] * 2
