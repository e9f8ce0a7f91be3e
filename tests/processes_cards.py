"""What runs in each of two processes, on a card each, for test_cards.py; what they find goes into a folder."""

import pickle
from pathlib import Path

import torch
import torch.distributed as dist
from attention_models import Direct
from processes_sharded import TENSOR_PLAN, fully_sharded, share, snapshots, trained, whole
from sharded_models import INPUTS, sharp_model, stack
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.experimental import context_parallel
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn.parallel import DistributedDataParallel

from hnf_attention import AttentionStabilityMonitor, ProcessGroups

SIZE = 2
RING = torch.randn(3, 2, 4, 1024, 64, generator=torch.Generator().manual_seed(6)).bfloat16().unbind()


def data_parallel(rank, x):
    """Monitored, and treated alike in every process."""
    model = sharp_model().cuda()
    monitor = AttentionStabilityMonitor(
        model, log_every=1, auto_intervene=True, ranks=ProcessGroups(batch=dist.group.WORLD)
    )
    DistributedDataParallel(model, device_ids=[rank])(share(x, rank, SIZE)).square().mean().backward()
    monitor.on_step()
    return snapshots(monitor), model.blocks[0].attn.qkv.weight.detach()


def fsdp(rank, x):
    """Trained, then treated in its shards."""
    mesh = init_device_mesh("cuda", (SIZE,), mesh_dim_names=("dp",))
    model = fully_sharded(mesh, sharp_model().cuda())
    monitor = AttentionStabilityMonitor(
        model, log_every=1, auto_intervene=True, ranks=ProcessGroups.of_mesh(mesh)
    )
    trained(model, share(x, rank, SIZE), monitor, steps=1)
    return snapshots(monitor), whole(model.blocks[0].attn.qkv.weight)


def tensor_parallel(rank, x):
    """Heads over two cards."""
    mesh = init_device_mesh("cuda", (SIZE,), mesh_dim_names=("tp",))
    model = stack().cuda()
    for layer in model:
        parallelize_module(layer, mesh, TENSOR_PLAN)
    monitor = AttentionStabilityMonitor(model, log_every=1, ranks=ProcessGroups.of_mesh(mesh, heads="tp"))
    out = model(x).detach().clone()
    monitor.on_step()
    return snapshots(monitor), out


def context_parallelism(rank, x):
    """PyTorch's ring over two cards, causal and balanced, in half precision: snapshots, and whether bit-equal."""
    mesh = init_device_mesh("cuda", (SIZE,), mesh_dim_names=("cp",))
    ranks = ProcessGroups.of_mesh(mesh, queries="cp")
    model, parts = Direct(), [y.cuda() for y in RING]
    with context_parallel(mesh, buffers=parts, buffer_seq_dims=[2] * 3):
        plain = model(*parts, is_causal=True)
        with AttentionStabilityMonitor(model, log_every=1, ranks=ranks) as monitor:
            same = torch.equal(model(*parts, is_causal=True), plain)
            monitor.on_step()
    return snapshots(monitor), torch.tensor(same)


def main(rank: int, folder: str) -> None:
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    store = f"file://{folder}/store"
    dist.init_process_group("nccl", init_method=store, rank=rank, world_size=SIZE, device_id=device)
    try:
        found = {}
        for scenario in (data_parallel, fsdp, tensor_parallel, context_parallelism):
            layers, tensor = scenario(rank, INPUTS.cuda())
            found[scenario.__name__] = layers, tensor.cpu()
        Path(folder, f"{rank}.pickle").write_bytes(pickle.dumps(found))
    finally:
        dist.destroy_process_group()
