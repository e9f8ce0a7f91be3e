"""What runs in each of two or four processes for test_rings.py; what they find goes into a folder."""

import os
import pickle
import runpy
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from rings import places, rings_on_cpus
from sharded_models import EXAMPLE, HEADS, INPUTS, WIDTH, SeparateAttention, stack
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.experimental import context_parallel
from torch.distributed.tensor.experimental._attention import set_rotate_method

from hnf_attention import AttentionStabilityMonitor, ProcessGroups

X = INPUTS[:2]  # (B, N, WIDTH)
MASK = torch.arange(X.shape[1]) < torch.tensor(
    [[X.shape[1] - 9], [X.shape[1] - 2]]
)  # of tokens that are judged


class Full(SeparateAttention):
    """Without a causal mask."""

    def forward(self, x):
        out = F.scaled_dot_product_attention(*self.split(x))
        return self.o_proj(out.transpose(1, 2).flatten(2))


def sharp(attention=SeparateAttention):
    """Two layers. The scores of the first one are far too large."""
    model = stack(attention)
    with torch.no_grad():
        model[0].q_proj.weight.mul_(20.0)
        model[1].k_proj.weight.mul_(3.0)
    return model


def run(model, inputs, steps=2):
    """Outputs and gradients of some steps."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    found = []
    for _ in range(steps):
        x = inputs.clone().requires_grad_()
        out = model(x)
        out.square().sum().backward()
        found += [out.detach(), x.grad, *(p.grad.clone() for p in model.parameters())]
        optimizer.step()
        optimizer.zero_grad()
        yield found


def watched(model, inputs, ranks, mask=None):
    """Numbers of two steps, snapshots, issues and coverage."""
    with AttentionStabilityMonitor(model, log_every=1, ranks=ranks) as monitor:
        monitor.instrumentation.query_mask = mask
        diagnoses, steps = [], []
        for numbers in run(model, inputs):
            steps.append(numbers)
            diagnoses.append(monitor.on_step())
        issues = [(i.layer, i.head, i.issue_type) for i in diagnoses[0].issues]
        return steps[-1], [s.layers for s in monitor.history], issues, monitor.instrumentation.coverage


def pytorch(rank, size):
    """PyTorch's, by (causal, balanced, method, which was entered first)."""
    mesh = init_device_mesh("cpu", (size,), mesh_dim_names=("cp",))
    ranks = ProcessGroups.of_mesh(mesh, queries="cp")
    found = {}
    with rings_on_cpus() as theirs:
        for causal, balanced, method in (
            (True, True, "allgather"),
            (True, True, "alltoall"),
            (True, False, "allgather"),
            (True, False, "alltoall"),
            (False, False, "allgather"),
        ):
            set_rotate_method(method)
            theirs._cp_options.enable_load_balance = balanced
            kind = SeparateAttention if causal else Full
            x, mask = X.clone(), MASK.clone()
            with context_parallel(mesh, buffers=[x, mask], buffer_seq_dims=[1, 1]):
                for numbers in run(sharp(kind), x):
                    plain = numbers
                numbers, *rest = watched(sharp(kind), x, ranks)
                found[causal, balanced, method] = [all(map(torch.equal, plain, numbers)), *rest]
                if causal and method == "allgather":
                    found["mask", balanced] = watched(sharp(kind), x, ranks, mask)
        x, model = X.clone(), sharp()
        with AttentionStabilityMonitor(model, log_every=1, ranks=ranks) as monitor:
            with context_parallel(mesh, buffers=[x], buffer_seq_dims=[1]):
                model(x)
            monitor.on_step()
            found["monitor first"] = monitor.history[0].layers
    return found


class Product(nn.Module):
    def forward(self, query, key, value):
        return F.scaled_dot_product_attention(query, key, value, is_causal=True)


class Wrapped(SeparateAttention):
    """Its SDPA is a module of its own, which context parallelism wraps."""

    def __init__(self):
        super().__init__()
        self.product = Product()

    def forward(self, x):
        return self.o_proj(self.product(*self.split(x)).transpose(1, 2).flatten(2))


def wrapped(rank, size):
    """PyTorch's newer way: modules that hand DTensors to SDPA."""
    from torch.distributed.tensor.parallel import parallelize_module

    mesh = init_device_mesh("cpu", (size,), mesh_dim_names=("cp",))
    model = sharp(Wrapped)
    with rings_on_cpus() as theirs:
        style = theirs._ContextParallel(2, theirs._ContextParallel.AttentionType.SDPA)
        for layer in model:
            parallelize_module(layer.product, mesh, style)
        balancer = theirs._create_default_load_balancer(X.shape[1], size, torch.device("cpu"))
        (x,) = theirs._context_parallel_shard(mesh, [X], [1], balancer)
        theirs._enable_context_parallel_dispatcher()
        try:
            return watched(model, x, ProcessGroups.of_mesh(mesh, queries="cp"))[1:]
        finally:
            theirs._disable_context_parallel_dispatcher()


def resting(rank, size):
    """Process 0 alone has a monitor, and its every-step tier does without the ring: (coverage, whether equal)."""
    mesh = init_device_mesh("cpu", (size,), mesh_dim_names=("cp",))
    model, found = sharp(), None
    with rings_on_cpus():
        x = X.clone()
        with context_parallel(mesh, buffers=[x], buffer_seq_dims=[1]):
            if rank == 0:
                with AttentionStabilityMonitor(model, log_every=2, ranks=None) as monitor:
                    for _ in run(model, x, 3):
                        monitor.on_step()
                    found = monitor.instrumentation.coverage, len(monitor.history)
            else:
                list(run(model, x, 3))
    return found


def example(rank, size):
    """The example's ring, in both orders, trained."""
    if not EXAMPLE.is_file():  # it is in the checkout only
        return None
    theirs, found = runpy.run_path(str(EXAMPLE)), {}
    ranks = ProcessGroups(queries=dist.group.WORLD)
    for order in ("contiguous", "zigzag"):
        rows = places(rank, size, X.shape[1], order == "zigzag")

        class Ring(SeparateAttention):
            def forward(self, x, order=order):
                out = theirs["ring_attention"](*self.split(x), dist.group.WORLD, order)
                return self.o_proj(out.transpose(1, 2).flatten(2))

        for numbers in run(sharp(Ring), X[:, rows]):
            plain = numbers
        numbers, *rest = watched(sharp(Ring), X[:, rows], ranks)
        found[order] = numbers, all(map(torch.equal, plain, numbers)), *rest
    return found


class Ulysses(SeparateAttention):
    """Its sequence is exchanged for heads around SDPA."""

    def forward(self, x):
        q, k, v = (_exchange(y, 1, 2) for y in self.split(x))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(_exchange(out, 2, 1).transpose(1, 2).flatten(2))


def _exchange(x, split, join):
    """Give each process a part of dimension `split`, and put together the parts of dimension `join`."""
    from torch.distributed.nn.functional import all_to_all

    parts = [y.contiguous() for y in x.chunk(dist.get_world_size(), split)]
    return torch.cat(all_to_all([torch.empty_like(y) for y in parts], parts), join)


def ulysses(rank, size):
    """Each process has HEADS / size heads of the whole sequence."""
    rows = places(rank, size, X.shape[1], False)
    return watched(sharp(Ulysses), X[:, rows], ProcessGroups(heads=dist.group.WORLD))[1:]


LONG = torch.randn(1, 512, WIDTH, generator=torch.Generator().manual_seed(5))


class Flex(SeparateAttention):
    """FlexAttention, a module of its own, as context parallelism wraps it. mask: its BlockMask."""

    mask = None

    def __init__(self):
        super().__init__()
        self.product = FlexProduct()

    def forward(self, x):
        out = self.product(*self.split(x), self.mask)
        return self.o_proj(out.transpose(1, 2).flatten(2))


class FlexProduct(nn.Module):
    def forward(self, query, key, value, mask):
        from torch.nn.attention.flex_attention import flex_attention

        return flex_attention(query, key, value, block_mask=mask)


def causal(b, h, i, j):
    return i >= j


def flex(rank, size):
    """Keys are gathered before the call, and its BlockMask knows where the queries are."""
    from torch.distributed.tensor.parallel import parallelize_module
    from torch.nn.attention.flex_attention import create_block_mask

    mesh = init_device_mesh("cpu", (size,), mesh_dim_names=("cp",))
    model = sharp(Flex)
    with rings_on_cpus() as theirs:
        style = theirs._ContextParallel(2, theirs._ContextParallel.AttentionType.FLEX)
        for layer in model:
            parallelize_module(layer.product, mesh, style)
        theirs._compiled_create_block_mask = create_block_mask  # to compile it takes a minute
        mask = create_block_mask(causal, 1, HEADS, LONG.shape[1], LONG.shape[1], "cpu")
        balancer = theirs._create_default_load_balancer(LONG.shape[1], size, torch.device("cpu"))
        x, mask = theirs._context_parallel_shard(mesh, [LONG, mask], [1, 2], balancer)
        for layer in model:
            layer.mask = mask
        ranks = ProcessGroups.of_mesh(mesh, queries="cp")
        with AttentionStabilityMonitor(model, log_every=1, ranks=ranks) as monitor, torch.no_grad():
            model(x)
            monitor.on_step()
            return monitor.history[0].layers, monitor.instrumentation.coverage


SCENARIOS = (pytorch, wrapped, resting, example, ulysses)


def main(rank: int, size: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    scenarios = SCENARIOS + ((flex,) if size == 4 else ())
    try:
        found = {scenario.__name__: scenario(rank, size) for scenario in scenarios}
        Path(folder, f"{rank}.pickle").write_bytes(pickle.dumps(found))
    finally:
        dist.destroy_process_group()
