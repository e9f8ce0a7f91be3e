"""Actions where one process alone has a reason to refuse: all do the same, and none waits for another."""

import processes_together
import pytest
import torch
from processes import by_scenario, needs_gloo, start

pytestmark = [
    pytest.mark.slow,
    needs_gloo,
]
IN_ONE = "(in process 1 of 2)"


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """By scenario, what each process found."""
    folder = tmp_path_factory.mktemp("together")
    start(processes_together.main, (2, str(folder)), 2)
    return by_scenario(folder, 2)


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("way", ["copies", "parts"])
def test_a_layer_that_one_process_cannot_normalise_is_refused_in_both(found, way):
    both = found[f"norm refused by one, {way}"]
    for layers, refused, weights in both:
        assert layers == ["layers.0"]
        assert refused == {"layers.1": f"it has QK-norm already (q_norm) {IN_ONE}"}
        assert equal(weights, both[0][2])


def test_processes_that_call_other_layers_are_told_so_and_keep_their_model(found):
    for said, more, parameters in found["norm of a skipped layer"]:
        assert said.startswith(
            "ValueError: expected every process to call the same layers in the forward that"
        )
        assert said.endswith("got layers.1 in process 0, none any more in process 1")
        assert not more and parameters == 20


def test_a_wrong_argument_of_one_process_is_an_error_in_both(found):
    for said in found["norm where one names no layer"]:
        assert said == f"ValueError: expected names of modules of the model, got ['x'] {IN_ONE}"


@pytest.mark.parametrize("act", ["norm_of_a_stage", "norm_of_a_stage_as_an_action"])
def test_qk_norm_starts_in_each_stage_of_a_pipeline(found, act):
    for number, (grouped, alone, wrong) in enumerate(found[f"pipeline, {act}"]):
        said, changed = grouped
        assert said is None
        assert {f"layers.{number}.qk_norm_query", f"layers.{number}.qk_norm_key"} <= set(changed)
        said, changed = alone
        assert said.startswith("ValueError: expected processes that hold the same layers for QK-norm, got ")
        assert said.endswith(
            "layers.0 in process 0 alone: in a pipeline, give group=, the processes of one stage"
        )
        assert not changed
        assert wrong.endswith("expected a group of processes that this process is in, got one without it")


def test_qk_clip_takes_each_stage_of_a_pipeline_for_itself(found):
    for number, (grouped, alone, _) in enumerate(found["pipeline, clip_of_a_stage"]):
        said, changed = grouped
        assert said is None and f"layers.{number}.k_proj.weight" in changed
        said, changed = alone
        assert said.startswith(
            "ValueError: expected processes that hold the same layers for QKClip, got none of the"
        )
        assert said.endswith(" in processes 0, 1: in a pipeline, give group=, the processes of one stage")


def test_keys_are_shared_by_their_layout_and_not_by_their_values(found):
    for name, heads in (("zero keys in parts", 4), ("zero keys in parts, odd names", 4)):
        assert found[name] == [({}, heads)] * 2, name
    shared = "tensor parallelism splits its queries, and several processes hold the same keys"
    for name in ("zero keys that are shared", "zero keys that are shared, odd names"):
        assert found[name] == [({"": shared}, 0)] * 2, name


@pytest.mark.parametrize("way", ["copies", "parts"])
def test_a_layer_that_one_process_cannot_clip_is_clipped_in_none(found, way):
    for refused, changed in found[f"clip refused by one, {way}"]:
        assert list(refused) == ["layers.0"] and "got frozen ones" in refused["layers.0"]
        assert refused["layers.0"].endswith(IN_ONE)
        assert changed == ["layers.1.q_proj.bias", "layers.1.q_proj.weight"]


@pytest.mark.parametrize("way", ["copies", "parts"])
def test_so_is_one_that_it_cannot_clip_any_more(found, way):
    for third, refused in found[f"clip refused by one later, {way}"]:
        assert third == ["layers.1.q_proj.bias", "layers.1.q_proj.weight"]
        assert list(refused) == ["layers.0"] and refused["layers.0"].endswith(IN_ONE)


def test_one_clip_of_parts_is_refused_in_both(found):
    for said, changed in found["one clip refused by one"]:
        assert said.startswith("ValueError: ") and "got frozen ones" in said and said.endswith(IN_ONE)
        assert not changed


def test_a_process_without_a_forward_clips_by_what_the_other_saw(found):
    (first, seen, refused), (second, none, also_refused) = found["clip without a forward in one"]
    assert equal(first, second) and not refused and not also_refused
    assert seen.keys() == {"layers.0", "layers.1"} and not none
    assert not torch.equal(first["layers.0.k_proj.weight"], processes_together.Net().layers[0].k_proj.weight)


def test_without_any_forward_both_say_so(found):
    for said in found["clip without any forward"]:
        assert said.startswith("RuntimeError: expected a training forward of the model before QKClip.step()")
