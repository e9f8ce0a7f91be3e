"""What `compat` says of distributed PyTorch: each entry in a case that needs it."""

import pytest
import torch
import torch.distributed as dist
from attention_models import Model
from compat_helpers import carried_by
from sharded_models import SeparateAttention

from hnf_attention import ProcessGroups, compat
from hnf_attention.interventions import layout
from hnf_attention.interventions.shards import HeadPart
from hnf_attention.monitoring.agreement import Agreement
from hnf_attention.names import named_modules


@pytest.fixture
def four_processes():
    """This process as the first of four, of which the others do not exist."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    yield
    dist.destroy_process_group()


@carried_by("flattened")
def test_all_other_dimensions_of_a_mesh_hold_the_batch(four_processes):
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "pp"))
    batch = ProcessGroups.of_mesh(mesh).batch
    assert dist.get_process_group_ranks(batch) == [0, 1, 2, 3]


@carried_by("default_store")
def test_processes_that_do_not_come_are_told_in_the_store():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        assert Agreement([0, 1], 0.05).meet() == "1 of 2 processes came within 0.05 s"
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
@carried_by("ring_attention")
def test_the_ring_of_context_parallelism_is_measured(tmp_path):
    from attention_models import Direct
    from rings import rings_on_cpus
    from torch.distributed.tensor.experimental import context_parallel

    from hnf_attention import instrument

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model, x = Direct(), [torch.randn(1, 2, 8, 4) for _ in range(3)]
        mesh = dist.init_device_mesh("cpu", (1,))
        ring = context_parallel(mesh, buffers=x, buffer_seq_dims=[2] * 3)
        with rings_on_cpus(), ring, instrument(model) as handle:
            model(*x, is_causal=True)
            assert handle.coverage.measured == {"": "probe (context_parallel)"}
    finally:
        dist.destroy_process_group()


@pytest.fixture
def split(four_processes):
    """An attention layer whose four heads lie in four processes."""
    from processes_split import PLAN
    from torch.distributed.tensor.parallel import parallelize_module

    return parallelize_module(SeparateAttention(), dist.init_device_mesh("cpu", (4,)), PLAN)


@carried_by("splits_module")
def test_weights_that_pytorch_split_are_found_without_a_hook_of_others(split):
    assert layout.find(split, "", 4).part == HeadPart(0, 4)
    split.q_proj.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="a forward or hooks of its own"):
        layout.find(split, "", 4)


def test_heads_that_cannot_be_split_alike_are_refused(split):
    with pytest.raises(
        ValueError, match="expected heads in 4 equal parts, as tensor parallelism splits them, got 6"
    ):
        layout.find(split, "", 6)


@pytest.mark.slow
@carried_by("splits_layer")
def test_weights_that_transformers_split_are_found(four_processes):
    parallel = pytest.importorskip("transformers.distributed.tensor_parallel")
    mesh, layer = dist.init_device_mesh("cpu", (4,)), SeparateAttention()
    styles = dict.fromkeys(("q_proj", "k_proj", "v_proj"), parallel.ColwiseParallel())
    for name, style in {**styles, "o_proj": parallel.RowwiseParallel()}.items():
        projection = layer.get_submodule(name)
        for parameter in ("weight", "bias"):
            style.shard_param(projection, parameter, mesh)
        style.install_forward(projection, mesh)
    assert layout.find(layer, "", 4).part == HeadPart(0, 4)


@carried_by("fsdp_wrapped")
@pytest.mark.filterwarnings("ignore:FSDP is switching to use:UserWarning")
@pytest.mark.filterwarnings("ignore:.*FullyShardedDataParallel:FutureWarning")
def test_layers_keep_their_names_inside_of_fsdp(tmp_path):
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = Model()
    names = [name for name, _ in named_modules(model)]
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        cpu = {"device_id": torch.device("cpu"), "use_orig_params": True}
        model.blocks[1] = FullyShardedDataParallel(model.blocks[1], **cpu)
        assert [name for name, _ in named_modules(FullyShardedDataParallel(model, **cpu))] == names
    finally:
        dist.destroy_process_group()


@carried_by("copy_all")
def test_what_a_forward_folded_is_taken_back_if_it_raised():
    kept, working = [torch.zeros(2, 3), torch.zeros(1)], [torch.ones(2, 3), torch.ones(1)]
    compat.copy_all(working, kept)
    assert all((x == 0).all() for x in working)
    compat.copy_all([], [])
