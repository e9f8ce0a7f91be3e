"""What one of four processes does with heads that are split, for test_actions_split.py; it goes into a folder."""

import os
import pickle
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from processes_actions import train, whole
from sharded_models import TOKENS
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from hnf_attention import AttentionStabilityMonitor, ProcessGroups
from hnf_attention.interventions import GoodStates, QKClip, apply_intervention, start_qk_norm

WIDTH, HEAD = 32, 8
X = torch.randn(8, 20, WIDTH, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.3, 3, 8).view(
    -1, 1, 1
)
PLAN = dict.fromkeys(("q_proj", "k_proj", "v_proj"), ColwiseParallel()) | {"o_proj": RowwiseParallel()}


class Attention(nn.Module):
    """Causal, with as many heads as this process's projections hold. A norm in front of it stays whole."""

    def __init__(self, key_heads):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        for name, out in zip(("q_proj", "k_proj", "v_proj"), (WIDTH, key_heads * HEAD, key_heads * HEAD)):
            setattr(self, name, nn.Linear(WIDTH, out))
        self.o_proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        x = x + self.norm(x)
        q, k, v = (
            p(x).unflatten(-1, (-1, HEAD)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o_proj(out.transpose(1, 2).flatten(2))


class Net(nn.Module):
    """Of four heads each: one layer has a key head for each, the other one for two. Scores of both are too large."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([Attention(4), Attention(2)])
        with torch.no_grad():
            for layer in self.layers:
                layer.q_proj.weight.mul_(12)

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x


def alone(model):
    return model, X


def tensor_parallel(model):
    """In pairs of processes, which all see the whole batch."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    for layer in model.layers:
        parallelize_module(layer, mesh["tp"], PLAN)
    return model, X


def both(model):
    """And FSDP2 over the pairs, which see other data."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    for layer in model.layers:
        parallelize_module(layer, mesh["tp"], PLAN)
        fully_shard(layer, mesh=mesh["dp"])
    return fully_shard(model, mesh=mesh["dp"]), X[dist.get_rank() // 2 :: 2]


def fsdp(model):
    mesh = init_device_mesh("cpu", (4,), mesh_dim_names=("dp",))
    fully_shard(model.layers[0], mesh=mesh)
    return fully_shard(model, mesh=mesh), X[dist.get_rank() :: 4]


def hybrid(model):
    """FSDP2's shards in pairs of processes, copied to the other pair."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("copies", "shards"))
    return fully_shard(model, mesh=mesh), X[dist.get_rank() :: 4]


def standing_clip(way):
    model, x = way(Net())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    # Within a step each process clips by its own part of the batch, so that only the rest equals one process.
    clip = QKClip(model, 20.0, within_step=len(x) == len(X)).attach(optimizer)
    train(model, optimizer, x, 3)
    assert not clip.refused, clip.refused
    return whole(model)


def one_clip(way):
    """The weights that it gives. Its revert gives back the old ones, bit for bit, and a forward leaves it possible."""
    model, x = way(Net())
    with torch.no_grad():
        model(x)
    before = whole(model)
    wanted = {
        "action": "qk_clip",
        "threshold": 30.0,
        "layers": {"layers.0": [120.0, 10.0, 90.0, 31.0], "layers.1": [60.0, None, 10.0, 90.0]},
    }
    applied = apply_intervention(None, wanted, model)
    after = whole(model)
    applied.revert()
    back = whole(model)
    assert all(torch.equal(back[name], before[name]) for name in before)
    assert not torch.equal(after["layers.0.k_proj.weight"], before["layers.0.k_proj.weight"])
    return after


def qk_norm(way):
    """Trained by AdamW, with the states of its gains; then taken away."""
    model, x = way(Net())
    every = way in (fsdp, hybrid)  # all parameters are DTensors on one mesh
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, foreach=every)
    start = start_qk_norm(model, optimizer)

    def step():
        optimizer.zero_grad()
        model(x).square().mean().backward()
        if every or way is alone:
            nn.utils.clip_grad_norm_(model.parameters(), 100.0)
        optimizer.step()

    for _ in range(3):
        step()
    assert len(start.layers) == 2 and not start.refused, start.refused
    found = whole(model)
    assert found["layers.1.qk_norm_query"].shape == (4,) and found["layers.1.qk_norm_key"].shape == (2,)
    kept = {id(p): optimizer.state[p]["exp_avg"] for p in start.gains}
    for name, p in model.named_parameters():
        if id(p) in kept:
            state = kept[id(p)]
            found[f"state of {name}"] = (state.full_tensor() if way is not alone else state).clone()
    start.revert()
    assert len(optimizer.state) == sum(len(group["params"]) for group in optimizer.param_groups)
    step()
    return found


def qk_norm_resumed(way):
    """From the state of one process, and back to a state of before the gains came."""
    model, x = way(Net())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    states = GoodStates(model, optimizer, every=1, keep=3, margin=1)
    train(model, optimizer, x, 1, states.on_step)
    gains = {
        f"layers.{n}.qk_norm_{side}": 1 + torch.arange(heads) / 4
        for n, heads in ((0, (4, 4)), (1, (4, 2)))
        for side, heads in zip(("query", "key"), heads)
    }
    start_qk_norm(model, optimizer, gains=gains)
    train(model, optimizer, x, 2, lambda step: states.on_step(step + 1))
    learnt = whole(model)
    # A model's own state, of DTensors where they are, starts another one.
    again, _ = way(Net())
    start_qk_norm(again, torch.optim.SGD(again.parameters(), lr=0.01), gains=model.state_dict())
    theirs = whole(again)
    assert all(torch.equal(theirs[name], learnt[name]) for name in gains)
    assert states.rewind(before=2) == 1
    assert all(torch.equal(whole(model)[name], gains[name]) for name in gains)
    train(model, optimizer, x, 1)
    return whole(model)


def qk_norm_verified(way):
    """Whether the keys that a monitor measures are as short as their gains say, and how many heads it measured."""
    model, x = way(Net())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    mesh = model.layers[0].q_proj.weight.device_mesh if way is not alone else None
    split = {} if way in (fsdp, hybrid) else {"heads": "tp"}
    ranks = None if mesh is None else ProcessGroups.of_mesh(mesh, **split)
    monitor = AttentionStabilityMonitor(model, log_every=1, ranks=ranks)
    applied = apply_intervention(optimizer, {"action": "qk_norm"}, model)
    for _ in range(2):
        train(model, optimizer, x, 1)
        diagnosis = monitor.on_step()
    (verdict,) = applied.verify(diagnosis.stats)
    monitor.restore()
    assert verdict.holds, verdict
    return {name: torch.tensor(len(stats.max_logit)) for name, stats in diagnosis.stats.items()}


class Stage(nn.Module):
    """Of a pipeline: one layer, whose name is its number in the whole model."""

    def __init__(self, number):
        super().__init__()
        layer = Net().layers[number]
        self.layers = nn.ModuleDict({str(number): layer})

    def forward(self, x):
        return next(iter(self.layers.values()))(x)


def staged(stage, x, group=None):
    """The weights of a stage after a clip, then two steps with QK-norm."""
    optimizer = torch.optim.SGD(stage.parameters(), lr=0.01)
    clip = QKClip(stage, 20.0, within_step=len(x) == len(X), group=group).attach(optimizer)
    train(stage, optimizer, x, 1)
    clip.remove()
    start = start_qk_norm(stage, optimizer, group=group)
    train(stage, optimizer, x, 2)
    assert not clip.refused and not start.refused, (clip.refused, start.refused)
    return whole(stage)


def pipeline():
    """Of two stages in two processes each: copies with half of the data each, and heads that are split."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("stage", "inside"))
    number, index = mesh.get_coordinate()
    stage, x = Stage(number), X
    if number == 1:
        parallelize_module(stage.layers["1"], mesh["inside"], PLAN)
    else:
        x = X[index::2]
        for parameter in stage.parameters():  # as data parallelism does
            parameter.register_hook(partial(_mean, group=mesh["inside"].get_group()))
    return number, staged(stage, x, mesh["inside"].get_group())


def _mean(gradient, group):
    dist.all_reduce(gradient, group=group)
    return gradient / 2


SCENARIOS = {
    f"{scenario.__name__}, {way.__name__}": (scenario, way)
    for scenario in (standing_clip, one_clip, qk_norm, qk_norm_resumed, qk_norm_verified)
    for way in (tensor_parallel, both, fsdp, hybrid)
}


def llama(folder):
    """A LLaMA by its own plan: clipped after two steps, then two steps with QK-norm."""
    from transformers import LlamaForCausalLM

    options = {}
    if dist.is_initialized():
        from transformers.distributed import DistributedConfig

        options["distributed_config"] = DistributedConfig(tp_size=dist.get_world_size())
    model = LlamaForCausalLM.from_pretrained(folder, **options).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)

    def step():
        optimizer.zero_grad()
        model(TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()

    clip = QKClip(model, 0.05).attach(optimizer)
    step()
    step()
    assert not clip.refused, clip.refused
    clip.remove()
    start = start_qk_norm(model, optimizer)
    step()
    step()
    assert len(start.layers) == 2, start.refused
    return whole(model)


def refused():
    """What is said of keys that all processes hold, beside queries that are split; and whether anything changed."""
    mesh = init_device_mesh("cpu", (4,), mesh_dim_names=("tp",))
    torch.manual_seed(0)
    model = Attention(1)
    parallelize_module(model, mesh, {name: how for name, how in PLAN.items() if name[0] in "qo"})
    before = whole(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    start = start_qk_norm(model, optimizer)
    model(X).sum().backward()
    said = [start.refused[""]]
    start.revert()
    try:
        apply_intervention(None, {"action": "qk_clip", "threshold": 1.0, "layers": {"": [9.0] * 4}}, model)
    except ValueError as error:
        said.append(str(error))
    after = whole(model)
    return said, after.keys() == before.keys() and all(torch.equal(after[x], before[x]) for x in before)


def main(rank, world, folder):
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    scenarios = {name: partial(scenario, way) for name, (scenario, way) in SCENARIOS.items()}
    found = {}
    for name, scenario in {
        **scenarios,
        "llama": partial(llama, folder),
        "refused": refused,
        "pipeline": pipeline,
    }.items():
        try:
            found[name] = scenario()
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
        dist.barrier()
    Path(folder, f"{rank}.pickle").write_bytes(pickle.dumps(found))
    dist.destroy_process_group()
