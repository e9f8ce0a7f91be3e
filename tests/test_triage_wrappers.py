"""Traces of models inside of DistributedDataParallel and FSDP2, in one process."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from hnf_attention import trace_non_finite
from hnf_attention.diagnosis.triage import causes

pytestmark = pytest.mark.slow


@pytest.fixture
def group(tmp_path):
    """A group of this process alone."""
    if dist.is_initialized():
        pytest.skip("another test left its processes")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def broken():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    with torch.no_grad():
        model.layers[1].self_attn.in_proj_weight[32 + 9, 3] = torch.nan  # a key of head 1
    return model


def test_inside_of_data_parallelism(group):
    model = nn.parallel.DistributedDataParallel(broken())
    trace = trace_non_finite(model, lambda: model(torch.ones(2, 12, 32)).square().mean())
    assert (trace.cause, trace.layer, trace.heads) == (causes.WEIGHT, "layers.1.self_attn", (1,))
    assert "1 of whose numbers is not finite (at [41, 3])" in trace.evidence
    assert trace.notes == ()  # the first run of the wrapper differs from the next ones


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_of_sharded_weights(group):
    model, mesh = broken(), init_device_mesh("cpu", (1,))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    before = [x.to_local().clone() for x in model.parameters()]
    trace = trace_non_finite(model, lambda: model(torch.ones(2, 12, 32)).square().mean(), optimizer=optimizer)
    assert (trace.cause, trace.layer, trace.heads) == (causes.WEIGHT, "layers.1.self_attn", (1,)), trace
    assert "sharded over processes" in str(trace.wide)
    after = [x.to_local() for x in model.parameters()]
    torch.testing.assert_close(after, before, rtol=0, atol=0, equal_nan=True)
