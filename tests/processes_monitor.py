"""What runs in each of four processes for test_monitor_processes.py; what they find goes into a folder."""

import logging
import pickle
import time
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from attention_models import Model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel

from hnf_attention import AttentionStabilityMonitor, ProcessGroups
from hnf_attention.integrations import JSONLWriter

SIZE = 4
LIMIT = 1.5
INPUTS = torch.randn(8, 20, 16, generator=torch.Generator().manual_seed(0))


def sharp_model():
    torch.manual_seed(0)
    model = Model()
    with torch.no_grad():
        model.blocks[0].attn.qkv.weight.mul_(30.0)
    return model


def train(model, rank):
    model(INPUTS[2 * rank : 2 * rank + 2]).square().sum().backward()


@contextmanager
def logged():
    """The messages of the package inside the context."""
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = logging.getLogger("hnf_attention")
    logger.addHandler(handler)
    try:
        yield messages
    finally:
        logger.removeHandler(handler)


def plain(rank, folder):
    """A monitor as people write it, in a script that every process runs."""
    model = DistributedDataParallel(sharp_model())
    with logged() as messages:
        writer = JSONLWriter(Path(folder, "attention.jsonl"))
        with AttentionStabilityMonitor(model, log_every=1, writers=[writer]) as monitor:
            diagnoses = []
            for _ in range(2):
                train(model, rank)
                diagnoses.append(monitor.on_step())
            proposed = monitor.get_intervention(diagnoses[0])
    issues = [(i.layer, i.head, i.issue_type) for i in diagnoses[0].issues]
    return monitor.history[0], issues, messages, dict(proposed), bool(monitor.status.off.get("ranks"))


def seconds(action):
    begin = time.monotonic()
    result = action()
    return time.monotonic() - begin, result


def one_leaves(how):
    """Process 2 leaves after the first step; the time that every step takes, what it gives, and what is logged."""

    def scenario(rank, folder):
        model = DistributedDataParallel(sharp_model())
        ranks = ProcessGroups(batch=dist.group.WORLD, time_limit=LIMIT if how == "silent" else 60.0)
        with logged() as messages:
            monitor = AttentionStabilityMonitor(model, log_every=1, ranks=ranks, auto_intervene=True)
            steps = []
            for step in range(4):
                if rank == 2 and step == 1:
                    if how == "restores":
                        monitor.restore()
                    elif how == "dropped":
                        monitor = None
                train(model, rank)
                if rank == 2 and step > 0:
                    continue
                took, diagnosis = seconds(monitor.on_step)
                steps.append((took, int(diagnosis.stats["blocks.0.attn"].rows[0])))
            status = {} if monitor is None else {k: v.reason for k, v in monitor.status.off.items()}
            dist.barrier()
        return steps, [text for text in messages if "alone" in text], status

    return scenario


def one_steps_alone(rank, folder):
    """Process 1 ends a step that no other process ends."""
    model = DistributedDataParallel(sharp_model())
    ranks = ProcessGroups(batch=dist.group.WORLD, time_limit=LIMIT)
    with AttentionStabilityMonitor(model, log_every=1, ranks=ranks) as monitor:
        taken = []
        for step in range(3):
            train(model, rank)
            if rank == 1 and step == 1:
                taken.append(seconds(monitor.on_step)[0])
            taken.append(seconds(monitor.on_step)[0])
    return taken


def stages_of_the_same_names(rank, folder):
    """Every process holds another stage of a pipeline; their layers have the same names."""
    torch.manual_seed(rank)
    model = Model()
    with logged() as messages, AttentionStabilityMonitor(model, log_every=1) as monitor:
        train(model, rank)
        rows = monitor.on_step().stats["blocks.0.attn"].rows[0]
        return rows, [text for text in messages if "alone" in text]


def split_by_heads(rank, folder):
    """Weights that tensor parallelism has split."""
    model, mesh = sharp_model(), init_device_mesh("cpu", (SIZE,), mesh_dim_names=("tp",))
    for block in model.blocks:
        whole = block.attn.qkv.weight.detach()
        block.attn.qkv.weight = torch.nn.Parameter(
            DTensor.from_local(whole.chunk(SIZE)[rank], mesh, [Shard(0)], run_check=False)
        )
    with logged() as messages, AttentionStabilityMonitor(model, log_every=1) as monitor:
        return monitor._together is None, monitor._leads, messages


def fully_sharded(rank, folder):
    """FSDP2 splits every weight, and the batch: heads are whole."""
    model = sharp_model()
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    with logged() as messages, AttentionStabilityMonitor(model, log_every=1) as monitor:
        train(model, rank)
        rows = monitor.on_step().stats["blocks.0.attn"].rows[0]
        return rows, [text for text in messages if "alone" in text]


SCENARIOS = {
    "plain": plain,
    "restores": one_leaves("restores"),
    "dropped": one_leaves("dropped"),
    "silent": one_leaves("silent"),
    "one_steps_alone": one_steps_alone,
    "stages": stages_of_the_same_names,
    "split": split_by_heads,
    "fsdp": fully_sharded,
}


def main(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=SIZE)
    try:
        found = {}
        for name, scenario in SCENARIOS.items():
            found[name] = scenario(rank, folder)
            dist.barrier()
        Path(folder, f"{rank}.pickle").write_bytes(pickle.dumps(found))
    finally:
        dist.destroy_process_group()
