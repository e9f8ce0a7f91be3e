"""What two processes do that are asked for different things, or fail alone, for test_actions_unlike.py."""

import pickle
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from processes_actions import whole
from processes_split import Net, X
from processes_together import CLIP, changed, copies, freeze_in_one, parts, raised, sgd
from torch import nn

from hnf_attention.instrumentation import treating
from hnf_attention.interventions import apply_intervention, layout, plan_intervention, start_qk_norm
from hnf_attention.interventions.clip_peers import ClipPeers
from hnf_attention.interventions.scaling import LayerScaling

FEW = {**CLIP, "layers": {"layers.1": [20.0, 10.0, 9.0, 3.0]}}
OTHER = {**CLIP, "layers": {"layers.0": [120.0, 10.0, 90.0, 31.0]}}
BOTH = {**CLIP, "layers": {**OTHER["layers"], **CLIP["layers"]}}
SLOWER = {"action": "reduce_lr", "factor": 0.5}


class Written(nn.Module):
    """Attention that no interceptor sees."""

    def forward(self, x):
        return (x @ x.transpose(1, 2)).softmax(-1) @ x


def evaluated_by_one(build):
    """Whether QK-norm waits or started, and what looks for attention, after an evaluation in one process alone."""
    model = build()
    start = start_qk_norm(model, torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1))
    for _ in range(2):
        model(X)
    if dist.get_rank() == 0:
        with torch.no_grad():
            model.eval()(X)
    dist.barrier()
    hooks = len(model._forward_hooks) + len(model._forward_pre_hooks)
    return start.started, start.listening, list(start.refused), len(treating.finders), hooks


def all_normed():
    model = Net()
    for layer in model.layers:
        layer.q_norm = nn.Identity()
    return model


def broken_forward(ranks):
    """What a forward says that an error ends in these processes, then what the next one leads to."""
    model = Net()
    before = whole(model)
    start = start_qk_norm(model, sgd(model))
    another = model.register_forward_hook(lambda *_: None)  # PyTorch goes on to it after those of QK-norm

    def fail(*_):
        raise RuntimeError("the forward's own error")

    hook = model.layers[1].register_forward_pre_hook(fail) if dist.get_rank() in ranks else None
    said = raised(lambda: model(X))
    left = changed(before, model)
    another.remove()
    if hook is not None:
        hook.remove()
    model(X)
    return said, left, start.started, start.listening, len(model._forward_hooks), changed(before, model)


def broken_layer():
    """As `broken_forward` in process 1, where the model is the layer: what is said, and what is left."""
    torch.manual_seed(0)
    model = nn.MultiheadAttention(32, 4, batch_first=True)
    before, x = whole(model), torch.randn(2, 5, 32)
    hook = model.register_forward_hook(lambda *_: 1 / 0) if dist.get_rank() == 1 else None
    start = start_qk_norm(model, sgd(model))
    said = None
    try:
        model(x, x, x, need_weights=False)
    except (ValueError, ZeroDivisionError) as error:
        said = type(error).__name__
    left = changed(before, model)
    if hook is not None:
        hook.remove()
    model(x, x, x, need_weights=False)
    return said, left, start.listening, len(model._forward_hooks) + len(model._forward_pre_hooks)


def asked(*each):
    """What is said to processes that hold parts and are given these interventions, and what changes."""
    model = parts(Net())
    before, optimizer = whole(model), sgd(model)
    said = raised(lambda: apply_intervention(optimizer, each[dist.get_rank()], model))
    return said, changed(before, model), optimizer.param_groups[0]["lr"]


def proposed_by_each():
    """Each process clips the layers that it finds it can clip, as a policy does."""
    model = parts(Net())
    freeze_in_one(model, 0)
    found = {}
    for name, sizes in BOTH["layers"].items():
        if raised(lambda name=name: layout.find(model, name, 4)) is None:
            found[name] = sizes
    return raised(lambda: apply_intervention(None, {**CLIP, "layers": found}, model))


def alone(way, act):
    """One process alone asks."""
    model = way(Net())
    if dist.get_rank() == 0:
        act(None, CLIP, model)
    dist.barrier()
    return True


def out_of_memory(place, name):
    """What is said where one process runs out of memory in a method."""

    def fail(*_, **__):
        raise torch.OutOfMemoryError("out of memory")

    model = parts(Net())
    before, original = whole(model), getattr(place, name)
    if dist.get_rank() == 1:
        setattr(place, name, fail)
    try:
        apply_intervention(None, BOTH, model)
        said = None
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    finally:
        setattr(place, name, original)
    return said, changed(before, model)


def spread_over_devices():
    """The sizes of three layers, which process 0 asks for by two devices and process 1 by one."""
    model = nn.ModuleDict({name: nn.Identity() for name in "abc"})
    numbers = torch.arange(6.0).view(3, 2) * (1 if dist.get_rank() else -1)
    sizes = SimpleNamespace(layers={n: SimpleNamespace(largest=row) for n, row in zip("abc", numbers)})
    peers = ClipPeers(model, None)
    moved = []
    peers.meet(sizes, lambda layer, heads: "it has moved" if layer in moved else None)
    moved += ["c"] * dist.get_rank()
    found = []
    for _ in range(2):
        for together in [["a", "c"], ["b"]] if dist.get_rank() == 0 else [["a"], ["b", "c"]]:
            found += zip(together, (x.tolist() for x in peers.largest(together, sizes, set())))
    return dict(found), len(found)


SCENARIOS = {
    "evaluation by one, all have a norm": partial(evaluated_by_one, all_normed),
    "evaluation by one, nothing is seen": partial(evaluated_by_one, Written),
    "a forward fails in one": partial(broken_forward, [1]),
    "a forward fails in both": partial(broken_forward, [0, 1]),
    "a layer fails in one": broken_layer,
    "other layers": partial(asked, CLIP, OTHER),
    "fewer layers": partial(asked, BOTH, CLIP),
    "other actions": partial(asked, CLIP, SLOWER),
    "other numbers": partial(asked, CLIP, FEW),
    "one item is wrong": partial(asked, CLIP, {**CLIP, "threshold": -1.0}),
    "proposed by each": proposed_by_each,
    "whole layers, one alone": partial(alone, copies, apply_intervention),
    "a plan of parts, one alone": partial(alone, parts, plan_intervention),
    "out of memory in a plan": partial(out_of_memory, layout, "find"),
    "out of memory in a change": partial(out_of_memory, LayerScaling, "multiply"),
    "other devices": spread_over_devices,
}


def main(rank, world, folder):
    """Each scenario has a group of its own: one that hangs ends in a time-out, and the next begins anew."""
    torch.set_num_threads(1)
    found = {}
    for number, (name, scenario) in enumerate(SCENARIOS.items()):
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/store{number}",
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=15),
        )
        try:
            found[name] = scenario()
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
        treating.finders.clear()
        dist.destroy_process_group()
    Path(folder, f"{rank}.pickle").write_bytes(pickle.dumps(found))
