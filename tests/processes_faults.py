"""Run by test_faults_processes.py, one scenario a process: `python processes_faults.py NAME FOLDER [RANK]`.

Each trains the model of `faults` with a run log, meets its fault, and writes the weights that it ended with.
"""

import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from faults import Model
from torch.utils.data import DataLoader, Dataset

from hnf_attention import AttentionStabilityMonitor
from hnf_attention.monitoring.process_groups import ProcessGroups
from hnf_attention.run_log import RunLogWriter

STEPS, LIMIT = 12, 5.0


class Data(Dataset):
    """So many items; each is the same wherever it is made."""

    def __len__(self):
        return 2 * STEPS

    def __getitem__(self, number):
        return torch.randn(12, 16, generator=torch.Generator().manual_seed(number))


def train(batches, watching=None, before_log=lambda step: None, seed_of_rank=0):
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)
    monitor = watching(model) if watching is not None else None
    steps = []
    for step, batch in enumerate(batches, 1):
        loss = model(batch).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        before_log(step)
        if monitor is not None:
            diagnosis = monitor.on_step(loss=loss)
            if diagnosis is not None:
                rows = int(next(iter(diagnosis.stats.values())).rows[0])
                steps.append((step, rows, len(diagnosis.stats)))
    if monitor is not None:
        monitor.restore()
    return torch.cat([x.detach().flatten() for x in model.parameters()]), steps


def loader(workers):
    return DataLoader(
        Data(), batch_size=2, num_workers=workers, multiprocessing_context="fork" if workers else None
    )


def forked_workers(folder):
    """Workers are forked while the run log's thread and the monitor are at work."""
    out = RunLogWriter(folder / "run.db")

    def watch(model):
        return AttentionStabilityMonitor(model, log_every=2, writers=[out])

    found, steps = train(loader(2), watch)
    plain, _ = train(loader(0))
    return {"same": torch.equal(found, plain), "steps": steps}


def forked_child(folder):
    """A process that is forked in the middle, ends by itself, and runs what is registered for its end."""
    out = RunLogWriter(folder / "run.db")

    def fork(step):
        if step == 5:
            child = os.fork()
            if child == 0:
                sys.exit(0)
            assert os.waitpid(child, 0)[1] == 0

    def watch(model):
        return AttentionStabilityMonitor(model, log_every=2, writers=[out])

    found, steps = train(Batches(), watch, fork)
    plain, _ = train(Batches())
    return {"same": torch.equal(found, plain), "steps": steps}


class Batches:
    def __iter__(self):
        for step in range(STEPS):
            yield torch.randn(2, 12, 16, generator=torch.Generator().manual_seed(step))


def terminated(folder, handler):
    """SIGTERM arrives while a log step is judged; handler: what the run does then."""
    out = RunLogWriter(folder / "run.db")
    if handler is not None:
        signal.signal(signal.SIGTERM, handler)

    class Slow:
        def write(self, diagnosis):
            if diagnosis.step == 8:
                assert out.flush()
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.01)

    def watch(model):
        return AttentionStabilityMonitor(model, log_every=2, writers=[out, Slow()])

    train(Batches(), watch)


def leave(number, frame):
    sys.exit(7)


def ranks(folder, rank, dies):
    """Two processes; at step 7 the one of number `dies` is killed, or, if it is None, number 1 gets no more data."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    writers = [RunLogWriter(folder / f"run_{rank}.db")]

    def watch(model):
        groups = ProcessGroups(batch=dist.group.WORLD, time_limit=LIMIT)
        return AttentionStabilityMonitor(model, log_every=2, writers=writers, ranks=groups)

    def before(step):
        if step == 7 and rank == dies:
            os.kill(os.getpid(), signal.SIGKILL)

    began = time.monotonic()
    found, steps = train(Batches(), watch, before)
    plain, _ = train(Batches())
    return {"same": torch.equal(found, plain), "steps": steps, "took": time.monotonic() - began}


def without_data(folder, rank):
    """Process 1 has no batch at log step 4: it ends the steps all the same, as an uneven data set asks for."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model, steps = Model(), []
    groups = ProcessGroups(batch=dist.group.WORLD, time_limit=LIMIT)
    with AttentionStabilityMonitor(model, log_every=2, ranks=groups) as monitor:
        for step, batch in enumerate(Batches(), 1):
            if rank == 0 or step not in (3, 4):
                model(batch).sum().backward()
            diagnosis = monitor.on_step()
            if diagnosis is not None:
                steps.append((step, int(diagnosis.stats["layers.0"].rows[0]), len(diagnosis.stats)))
    return {"same": True, "steps": steps}


def main():
    torch.set_num_threads(1)
    name, folder = sys.argv[1], Path(sys.argv[2])
    rank = int(sys.argv[3]) if len(sys.argv) > 3 else 0
    scenarios = {
        "forked_workers": lambda: forked_workers(folder),
        "forked_child": lambda: forked_child(folder),
        "terminated": lambda: terminated(folder, None),
        "terminated_politely": lambda: terminated(folder, leave),
        "rank_1_dies": lambda: ranks(folder, rank, 1),
        "rank_0_dies": lambda: ranks(folder, rank, 0),
        "without_data": lambda: without_data(folder, rank),
    }
    found = scenarios[name]()
    torch.save(found, folder / f"{rank}.pt")
    sys.stdout.flush()
    os._exit(0) if name.startswith("rank_") else None  # the other process of the group is no more


if __name__ == "__main__":
    main()
