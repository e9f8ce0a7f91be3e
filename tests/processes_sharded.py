"""What runs in each of two or four processes for test_sharded.py; what they find goes into a folder."""

import os
import pickle
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from attention_models import Direct
from sharded_models import (
    BROKEN,
    CLIP,
    INPUTS,
    LENGTH,
    MASK,
    QKV,
    REAL,
    TOKENS,
    WIDTH,
    GatheringAttention,
    Layouts,
    sharp_model,
    stack,
    zigzag,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.experimental import context_parallel
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.attention import SDPBackend, sdpa_kernel

from hnf_attention import AttentionStabilityMonitor, ProcessGroups, apply_intervention, instrument

TENSOR_PLAN = dict.fromkeys(("q_proj", "k_proj", "v_proj"), ColwiseParallel()) | {"o_proj": RowwiseParallel()}


def share(x, rank, size):
    return x.chunk(size)[rank]


def trained(model, x, monitor=None, steps=3):
    """The model's parameters after some steps, whole, and the monitor's diagnoses."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    diagnoses = []
    for _ in range(steps):
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if monitor is not None:
            diagnoses.append(monitor.on_step())
    return [whole(p) for p in model.parameters()], diagnoses


def whole(parameter):
    return (parameter.full_tensor() if isinstance(parameter, DTensor) else parameter).detach().clone()


def snapshots(monitor):
    return [snapshot.layers for snapshot in monitor.history]


def fully_sharded(mesh, model=None):
    model = sharp_model() if model is None else model
    for block in getattr(model, "blocks", ()):
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def fsdp(rank, size):
    """Trained with and without a monitor."""
    mesh = init_device_mesh("cpu", (size,), mesh_dim_names=("dp",))
    x = share(INPUTS, rank, size)
    plain, _ = trained(fully_sharded(mesh), x)
    model = fully_sharded(mesh)
    monitor = AttentionStabilityMonitor(model, log_every=1, ranks=ProcessGroups.of_mesh(mesh))
    watched, diagnoses = trained(model, x, monitor)
    issues = [(i.layer, i.head, i.issue_type) for i in diagnoses[0].issues]
    return snapshots(monitor), issues, all(map(torch.equal, plain, watched))


def fsdp_treated(rank, size):
    """By its monitor."""
    mesh = init_device_mesh("cpu", (size,), mesh_dim_names=("dp",))
    model = fully_sharded(mesh)
    ranks = ProcessGroups.of_mesh(mesh)
    monitor = AttentionStabilityMonitor(model, log_every=1, auto_intervene=True, ranks=ranks)
    model(share(INPUTS, rank, size)).square().mean().backward()
    monitor.on_step()
    return len(monitor.applied), whole(model.blocks[0].attn.qkv.weight)


def layouts(rank, size):
    """Clipped in shards, taken back, and clipped again when FSDP2 has gathered them."""
    mesh = init_device_mesh("cpu", (size,), mesh_dim_names=("dp",))
    model = Layouts()
    fully_shard(model.low, mesh=mesh)  # one group of parameters has one dtype
    fully_shard(model.interleaved, mesh=mesh)  # which gets a class of FSDP2's
    fully_sharded(mesh, model)
    before = [whole(p) for p in model.parameters()]
    done = apply_intervention(None, CLIP, model)
    after = {name: whole(p) for name, p in model.named_parameters()}
    done.revert()
    back = all(
        torch.allclose(whole(p), b, rtol=1e-2 if p.dtype == torch.bfloat16 else 1e-6)
        for p, b in zip(model.parameters(), before)
    )
    model.unshard()
    apply_intervention(None, CLIP, model)
    again = all(torch.equal(whole(p), after[name]) for name, p in model.named_parameters())
    return after, back, again


def tensor_parallel(rank, size):
    """Heads over two processes, and FSDP2 over the others."""
    mesh = init_device_mesh("cpu", (size // 2, 2), mesh_dim_names=("dp", "tp"))
    model = stack()
    for layer in model:
        parallelize_module(layer, mesh["tp"], TENSOR_PLAN)
    if size > 2:
        fully_sharded(mesh["dp"], model)
    monitor = AttentionStabilityMonitor(model, log_every=1, ranks=ProcessGroups.of_mesh(mesh, heads="tp"))
    x = share(INPUTS, rank // 2, size // 2)
    out = model(x).detach().clone()  # which waits for the last sum over processes
    monitor.on_step()
    return snapshots(monitor)[0], out


# DTensor has rules for the operators of the math backend; for the CPU's own it searches for minutes.
@sdpa_kernel(SDPBackend.MATH)
def distributed_tensors(rank, size):
    """Attention that sees DTensors: (coverage, statistics, whether the output is the one without) of each."""
    mesh = init_device_mesh("cpu", (size,), mesh_dim_names=("tp",))
    found = {}
    for name, placement, kind in (
        ("heads", Shard(1), ProcessGroups(heads=mesh.get_group())),
        ("batch", Shard(0), ProcessGroups(batch=mesh.get_group())),
        ("queries", Shard(2), ProcessGroups(batch=mesh.get_group())),
        ("everywhere", Replicate(), ProcessGroups(batch=mesh.get_group())),
    ):
        parts = [distribute_tensor(x, mesh, [placement]) for x in BROKEN]
        options = {"attn_mask": distribute_tensor(MASK, mesh, [Replicate()])} if name != "queries" else {}
        model = Direct()
        plain = model(*parts, **options).full_tensor().nan_to_num()
        with AttentionStabilityMonitor(model, log_every=1, ranks=kind) as monitor:
            same = torch.equal(model(*parts, **options).full_tensor().nan_to_num(), plain)
            monitor.on_step()
        found[name] = monitor.instrumentation.coverage, snapshots(monitor), same
    model = Direct()
    with instrument(model, "fused") as instrumentation:
        parts = [distribute_tensor(x, mesh, [Shard(1)]) for x in QKV]
        stays_one = isinstance(model(*parts), DTensor)
        found["fused"] = instrumentation.coverage, [], stays_one
    mixed = Direct()
    with instrument(mixed) as instrumentation:
        odd = [distribute_tensor(x[:, :3], mesh, [Shard(1)]) for x in QKV]
        mixed(*odd).full_tensor()
        found["uneven"] = instrumentation.coverage, [], True
    return found


def gathered_keys(rank, size):
    """Context parallel over two processes, and other sequences in the others.

    (statistics, output) of the first half of the sequences, then of whole ones, then of padded ones; and how many
    processes there are.
    """
    mesh = init_device_mesh("cpu", (size // 2, 2), mesh_dim_names=("dp", "cp"))
    model = stack(GatheringAttention)
    ranks = ProcessGroups.of_mesh(mesh, queries="cp")
    monitor = AttentionStabilityMonitor(model, log_every=1, ranks=ranks)
    x, real = (share(y, rank // 2, size // 2) for y in (INPUTS, REAL))
    outputs = []
    for length, padded in ((LENGTH // 2, False), (LENGTH, False), (LENGTH, True)):
        rows = zigzag(rank % 2, 2, length)
        for layer in model:
            layer.rows, layer.group, layer.real = rows, mesh["cp"].get_group(), real if padded else None
        monitor.instrumentation.query_mask = real[:, rows] if padded else None
        outputs.append(model(x[:, rows]).detach())
        monitor.on_step()
    return list(zip(snapshots(monitor), outputs, strict=True)), ranks.processes


@sdpa_kernel(SDPBackend.MATH)
def torch_context_parallel(rank, size):
    """Without a ring, as PyTorch has none of this operator: its coverage, entered inside and outside."""
    mesh = init_device_mesh("cpu", (size,), mesh_dim_names=("cp",))
    found = []
    for entered_first in (False, True):
        model, buffers = Direct(), [x.clone() for x in QKV]
        outer = None if entered_first else instrument(model)
        with context_parallel(mesh, buffers=buffers, buffer_seq_dims=[2] * 3):
            instrumentation = instrument(model) if entered_first else outer
            model(*buffers)
            found.append(instrumentation.coverage)
            if entered_first:
                instrumentation.restore()
        if outer is not None:
            outer.restore()
    return found, F.scaled_dot_product_attention.__module__


def pipeline(rank, size):
    """A stage of a model in each process, fed in micro-batches; its modules keep their names."""
    from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

    torch.manual_seed(0)
    every = torch.nn.ModuleDict({str(number): stack()[0] for number in range(size)})
    model = torch.nn.Module()
    model.layers = torch.nn.ModuleDict({str(rank): every[str(rank)]})
    model.forward = lambda x: model.layers[str(rank)](x)
    monitor = AttentionStabilityMonitor(model, log_every=1, ranks=ProcessGroups.of_world())
    # Without an example of its inputs and outputs a stage first runs once on made-up numbers.
    example = INPUTS[: len(INPUTS) // 2]
    differentiable = example.clone().requires_grad_()
    first = example if rank == 0 else differentiable
    stage = PipelineStage(model, rank, size, torch.device("cpu"), first, differentiable)
    schedule = ScheduleGPipe(stage, n_microbatches=2, loss_fn=lambda out, _: out.square().mean())
    if rank == 0:
        schedule.step(INPUTS)
    elif rank == size - 1:
        schedule.step(target=torch.zeros(len(INPUTS), LENGTH, WIDTH))
    else:
        schedule.step()
    monitor.on_step()
    return snapshots(monitor)[0]


def llama(rank, size):
    """By its own plan for tensor parallelism, as a trainer's callback sees it."""
    from transformers import LlamaForCausalLM
    from transformers.distributed import DistributedConfig

    from hnf_attention.integrations.training import TrainingCallback

    model = LlamaForCausalLM.from_pretrained(sys.argv[1], distributed_config=DistributedConfig(tp_size=size))
    callback = TrainingCallback(log_every=1)
    callback._begin(model, 1, 0, True, model._device_mesh)
    callback._resume()
    with torch.no_grad():
        logits = model(TOKENS).logits
    diagnosis = callback._end_step([])
    callback.restore()
    return diagnosis.stats, logits


SCENARIOS = (
    fsdp,
    fsdp_treated,
    tensor_parallel,
    distributed_tensors,
    gathered_keys,
    torch_context_parallel,
    pipeline,
)
OF_TWO = (layouts, llama)  # they import transformers, which is slow, and more processes add nothing


def main(rank: int, size: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    sys.argv[1:] = [folder]
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    scenarios = SCENARIOS + (OF_TWO if size == 2 else ())
    try:
        found = {scenario.__name__: scenario(rank, size) for scenario in scenarios}
        Path(folder, f"{rank}.pickle").write_bytes(pickle.dumps(found))
    finally:
        dist.destroy_process_group()
