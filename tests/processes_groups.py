"""What runs in each of four processes for test_process_groups.py; what they find goes into a folder."""

import pickle
from pathlib import Path

import torch
import torch.distributed as dist
from attention_models import Model
from heads import FakeInstrumentation, queries_and_keys
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from hnf_attention import AttentionStabilityMonitor, ProcessGroups
from hnf_attention.monitoring.agreement import Together
from hnf_attention.monitoring.recorder import NothingMeasured, Recorder

SIZE = 4
BATCH = [x.clone() for x in queries_and_keys(heads=4, rows=40, batch=8)]  # a whole batch of q and k
INPUTS = torch.randn(8, 20, 16, generator=torch.Generator().manual_seed(0))


def batch_parts(rank):
    """Two sequences each; the last process has no batch."""
    fake = FakeInstrumentation()
    recorder = Recorder(fake, 1, together=Together(ProcessGroups(batch=dist.group.WORLD)))
    if rank < 3:
        fake.run("a", *(x[2 * rank : 2 * rank + 2] for x in BATCH))
    return recorder.advance()


def mesh_parts(rank):
    """Two halves of the batch, two halves of the heads."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    fake = FakeInstrumentation()
    recorder = Recorder(fake, 1, together=Together(ProcessGroups.of_mesh(mesh, heads="tp")))
    half, heads = divmod(rank, 2)
    fake.run("a", *(x[4 * half : 4 * half + 4, 2 * heads : 2 * heads + 2] for x in BATCH))
    return recorder.advance()


def pipeline_stages(rank):
    fake = FakeInstrumentation()
    recorder = Recorder(fake, 1, together=Together(ProcessGroups(batch=dist.group.WORLD)))
    fake.run(f"layers.{rank}", *(x[rank : rank + 1] for x in BATCH))
    return recorder.advance()


def other_heads(rank):
    fake = FakeInstrumentation()
    recorder = Recorder(fake, 1, together=Together(ProcessGroups(batch=dist.group.WORLD)))
    fake.run("a", *(x[:, : 1 + rank % 2] for x in BATCH))
    try:
        return recorder.advance()
    except RuntimeError as error:
        return str(error)


def one_that_fails(rank):
    """The error that every process gets."""
    fake = FakeInstrumentation()
    recorder = Recorder(fake, 1, together=Together(ProcessGroups(batch=dist.group.WORLD)))
    fake.run("a", *BATCH)
    if rank == 2:
        recorder._lanes = None
    try:
        return recorder.advance()
    except RuntimeError as error:
        return str(error)


def nothing_anywhere(rank):
    together = Together(ProcessGroups(batch=dist.group.WORLD))
    try:
        return Recorder(FakeInstrumentation(), 1, together=together).advance()
    except NothingMeasured as error:
        return str(error)


def data_parallel(rank):
    """A model under DistributedDataParallel, monitored, and treated alike in every process."""
    torch.manual_seed(0)
    model = Model()
    with torch.no_grad():
        model.blocks[0].attn.qkv.weight.mul_(30.0)
    ranks = ProcessGroups(batch=dist.group.WORLD)
    monitor = AttentionStabilityMonitor(model, log_every=1, auto_intervene=True, ranks=ranks)
    parallel = DistributedDataParallel(model)
    parallel(INPUTS[2 * rank : 2 * rank + 2]).square().sum().backward()
    diagnosis = monitor.on_step()
    weight = model.blocks[0].attn.qkv.weight.detach()
    return diagnosis.history[-1], [(i.layer, i.head, i.issue_type) for i in diagnosis.issues], weight


SCENARIOS = (
    batch_parts,
    mesh_parts,
    pipeline_stages,
    other_heads,
    one_that_fails,
    nothing_anywhere,
    data_parallel,
)


def main(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=SIZE)
    try:
        found = {scenario.__name__: scenario(rank) for scenario in SCENARIOS}
        Path(folder, f"{rank}.pickle").write_bytes(pickle.dumps(found))
    finally:
        dist.destroy_process_group()
