"""What one process of data parallelism does with a standing clip, QK-norm and rewind."""

import os
import pickle
from pathlib import Path

import torch
import torch.distributed as dist
from odd_layers import Fused
from torch import nn

from hnf_attention.interventions import GoodStates, QKClip, apply_intervention, start_qk_norm

X = torch.randn(8, 20, 32, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.3, 3, 8).view(
    -1, 1, 1
)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.attention = Fused(is_causal=True)
        with torch.no_grad():
            self.attention.qkv.weight.mul_(8)

    def forward(self, x):
        return self.attention(x)


def whole(model):
    return {
        name: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone()
        for name, p in model.named_parameters()
    }


def train(model, optimizer, x, steps, after=None):
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        if after is not None:
            after(step)


def standing_clip(wrap, x):
    model = wrap(Net())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    # Within a step each process clips by its own part of the batch, so that only the rest equals one process.
    QKClip(model, 30.0, within_step=False).attach(optimizer)
    train(model, optimizer, x, 3)
    return whole(getattr(model, "module", model))


def qk_norm(wrap, x):
    model = wrap(Net())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    start = start_qk_norm(model, optimizer)
    train(model, optimizer, x, 3)
    assert len(start.layers) == 1
    return whole(getattr(model, "module", model))


def rewind(wrap, x):
    model = wrap(Net())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    states = GoodStates(model, optimizer, every=2, keep=3, margin=3)
    seen = {}

    def after(step):
        states.on_step(step)
        seen[step] = whole(getattr(model, "module", model))

    train(model, optimizer, x, 6, after)
    step = states.rewind(before=6)
    back = whole(getattr(model, "module", model))
    assert step == 2 and all(torch.equal(back[name], seen[2][name]) for name in back)
    applied = apply_intervention(optimizer, {"action": "reduce_lr", "factor": 0.5})
    train(model, optimizer, x, 2, after)
    applied.revert()
    return whole(getattr(model, "module", model))


def one_qk_clip(wrap, x):
    """Applied and reverted: the weights before, between and after."""
    model = wrap(Net())
    found = [whole(model)]
    wanted = {"action": "qk_clip", "threshold": 30.0, "layers": {"attention": [120.0, 10.0, 90.0, 31.0]}}
    applied = apply_intervention(None, wanted, model)
    found.append(whole(model))
    applied.revert()
    found.append(whole(model))
    return found


def ddp(model):
    return nn.parallel.DistributedDataParallel(model)


def fsdp(model):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    return fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))


SCENARIOS = {
    "standing clip, ddp": (standing_clip, ddp),
    "standing clip, fsdp": (standing_clip, fsdp),
    "qk-norm, ddp": (qk_norm, ddp),
    "rewind, ddp": (rewind, ddp),
    "rewind, fsdp": (rewind, fsdp),
    "one clip, fsdp": (one_qk_clip, fsdp),
}


def main(rank, world, folder):
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": Path(folder, "port").read_text()}
    dist.init_process_group("gloo", rank=rank, world_size=world)
    found = {}
    for name, (scenario, wrap) in SCENARIOS.items():
        try:
            found[name] = scenario(wrap, X[rank::world])
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
        dist.barrier()
    Path(folder, f"{rank}.pickle").write_bytes(pickle.dumps(found))
    dist.destroy_process_group()
