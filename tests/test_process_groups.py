"""Statistics of four processes together are those of one process with everything."""

import pickle

import numpy as np
import processes_groups
import pytest
import torch
from attention_models import Model
from heads import FakeInstrumentation
from processes import needs_gloo, start
from processes_groups import BATCH, INPUTS, SIZE

import hnf_attention
from hnf_attention import AttentionStabilityMonitor, ProcessGroups
from hnf_attention.monitoring.recorder import Recorder

pytestmark = needs_gloo


@pytest.fixture(scope="module", params=[pytest.param("spawned", marks=pytest.mark.slow)])
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("groups")
    start(processes_groups.main, (str(folder),), SIZE)
    return [pickle.loads((folder / f"{rank}.pickle").read_bytes()) for rank in range(SIZE)]


def alone(query, key):
    fake = FakeInstrumentation()
    recorder = Recorder(fake, 1)
    fake.run("a", query, key)
    return recorder.advance().layers["a"]


def same(stats, expected):
    np.testing.assert_allclose(stats.values, expected.values, rtol=1e-12)
    assert (stats.head_dim, stats.dtype) == (expected.head_dim, expected.dtype)


def test_parts_of_a_batch_and_a_process_without_one(found):
    expected = alone(*(x[:6] for x in BATCH))
    for process in found:
        same(process["batch_parts"].layers["a"], expected)


def test_heads_split_over_processes_get_their_global_numbers(found):
    expected = alone(*BATCH)
    for process in found:
        same(process["mesh_parts"].layers["a"], expected)


def test_pipeline_stages_have_layers_of_their_own(found):
    for process in found:
        layers = process["pipeline_stages"].layers
        assert list(layers) == [f"layers.{stage}" for stage in range(SIZE)]
        for stage, stats in enumerate(layers.values()):
            same(stats, alone(*(x[stage : stage + 1] for x in BATCH)))


def test_other_numbers_of_heads_are_an_error_in_every_process(found):
    for process in found:
        assert process["other_heads"] == "expected every process to hold as many heads of a, got [1, 2, 1, 2]"


def test_a_process_that_fails_leaves_nobody_waiting(found):
    assert all(process["one_that_fails"].startswith("process 2: AttributeError") for process in found)


def test_nothing_anywhere_is_known_to_every_process(found):
    assert all("never ran" in process["nothing_anywhere"] for process in found)


def test_a_data_parallel_model_is_judged_and_treated_alike_everywhere(found):
    torch.manual_seed(0)
    model = Model()
    with torch.no_grad():
        model.blocks[0].attn.qkv.weight.mul_(30.0)
    monitor = AttentionStabilityMonitor(model, log_every=1, auto_intervene=True)
    model(INPUTS)
    diagnosis = monitor.on_step()
    issues = [(issue.layer, issue.head, issue.issue_type) for issue in diagnosis.issues]
    weight = model.blocks[0].attn.qkv.weight
    assert issues and monitor.applied
    for process in found:
        snapshot, theirs, treated = process["data_parallel"]
        assert theirs == issues
        for name, stats in diagnosis.history[-1].layers.items():
            # Each process multiplies other matrices: their last digits differ.
            np.testing.assert_allclose(snapshot.layers[name].values, stats.values, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(treated, weight, rtol=1e-5, atol=1e-6)


def test_the_former_name_is_the_same_class():
    assert hnf_attention.Ranks is ProcessGroups


def test_groups_need_torch_distributed():
    with pytest.raises(RuntimeError, match="expected torch.distributed to be initialised"):
        ProcessGroups(batch=None)


def test_groups_and_mesh_dimensions_that_do_not_exist(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        with pytest.raises(
            ValueError, match="expected a process group for batch, heads or queries, got None"
        ):
            ProcessGroups()
        mesh = torch.distributed.init_device_mesh("cpu", (1,), mesh_dim_names=("dp",))
        with pytest.raises(ValueError, match="expected heads to be one of the mesh's dimensions"):
            ProcessGroups.of_mesh(mesh, heads="tp")
        with pytest.raises(ValueError, match="expected queries to be one of the mesh's dimensions"):
            ProcessGroups.of_mesh(mesh, queries="cp")
        with pytest.raises(
            ValueError, match="heads and queries to be different dimensions, got 'dp' for both"
        ):
            ProcessGroups.of_mesh(mesh, heads="dp", queries="dp")
        assert ProcessGroups.of_mesh(mesh).heads is None
        assert ProcessGroups.of_mesh(mesh, heads="dp").batch is None
    finally:
        torch.distributed.destroy_process_group()
