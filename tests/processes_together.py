"""What one of two processes does where one of them alone has a reason to refuse, for test_actions_together.py."""

import pickle
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from processes_actions import train, whole
from processes_split import HEAD, PLAN, WIDTH, Attention, Net, X
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from hnf_attention.interventions import QKClip, apply_intervention, start_qk_norm

CLIP = {"action": "qk_clip", "threshold": 30.0, "layers": {"layers.1": [120.0, 10.0, 90.0, 31.0]}}


def copies(model):
    return model


def parts(model):
    """Heads split over both processes."""
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.layers:
        parallelize_module(layer, mesh, PLAN)
    return model


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.02)


def changed(before, model):
    now = whole(model)
    return sorted(name for name in now if name not in before or not torch.equal(now[name], before[name]))


def freeze_in_one(model, layer):
    if dist.get_rank() == 1:
        model.layers[layer].q_proj.weight.requires_grad_(False)


def raised(act):
    try:
        act()
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def norm_refused_by_one(way):
    """The layers with QK-norm, those without, and the weights after two more steps."""
    model = way(Net())
    if dist.get_rank() == 1:
        model.layers[1].q_norm = nn.Identity()
    optimizer = sgd(model)
    start = start_qk_norm(model, optimizer)
    train(model, optimizer, X, 3)
    return list(start.layers), start.refused, whole(model)


def norm_of_a_skipped_layer():
    """What is said where a process leaves out its last layer, and what is left of QK-norm."""
    model = Net()
    before, optimizer = whole(model), sgd(model)
    start_qk_norm(model, optimizer)
    if dist.get_rank() == 1:
        del model.layers[1]
    said = raised(lambda: model(X))
    return (
        said,
        [name for name in whole(model) if name not in before],
        len(optimizer.param_groups[0]["params"]),
    )


class Stage(nn.Module):
    """Of a pipeline: one layer, whose name is its number in the whole model."""

    def __init__(self, number):
        super().__init__()
        torch.manual_seed(number)
        self.layers = nn.ModuleDict({str(number): Attention(4)})
        with torch.no_grad():
            self.layers[str(number)].q_proj.weight.mul_(12)

    def forward(self, x):
        return next(iter(self.layers.values()))(x)


def pipeline(act):
    """What `act(model, optimizer, group)` leads to in a step of the pipeline, with the group of a stage and without.

    And what is said of a group without this process.
    """
    groups = [dist.new_group([rank]) for rank in range(2)]
    found = []
    for group in (groups[dist.get_rank()], None):
        model = Stage(dist.get_rank())
        before = whole(model)
        said = raised(partial(step_of_a_pipeline, model, act, group))
        found.append((said, changed(before, model)))
        dist.barrier()
    wrong = groups[1 - dist.get_rank()]
    return [*found, raised(lambda: start_qk_norm(model, sgd(model), group=wrong))]


def step_of_a_pipeline(model, act, group):
    optimizer, x = sgd(model), X.clone()
    act(model, optimizer, group)
    if dist.get_rank() == 1:
        dist.recv(x, 0)
    out = model(x)
    if dist.get_rank() == 0:
        dist.send(out.detach(), 1)
    out.square().mean().backward()
    optimizer.step()


def norm_of_a_stage(model, optimizer, group):
    start_qk_norm(model, optimizer, group=group)


def norm_of_a_stage_as_an_action(model, optimizer, group):
    apply_intervention(optimizer, {"action": "qk_norm"}, model, group=group)


def clip_of_a_stage(model, optimizer, group):
    wanted = {"action": "standing_qk_clip", "threshold": 20.0}
    apply_intervention(optimizer, wanted, model, group=group)


def norm_where_one_names_no_layer():
    model = Net()
    return raised(lambda: start_qk_norm(model, sgd(model), layers=["layers.0", "x"][dist.get_rank() :][:1]))


class OddNames(nn.Module):
    """One key head for all queries, whose projections have names that tell nothing."""

    def __init__(self, key_heads):
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, key_heads * HEAD)

    def forward(self, x):
        q, k = (p(x).unflatten(-1, (-1, HEAD)).transpose(1, 2) for p in (self.one, self.two))
        return nn.functional.scaled_dot_product_attention(q, k, k, enable_gqa=True)


def norm_by_layout(build, split):
    """Whether QK-norm starts, with all keys zero, and the number of key gains in all processes."""
    plan = {**dict.fromkeys(split, ColwiseParallel()), "o_proj": RowwiseParallel()}
    model = build()
    parallelize_module(model, init_device_mesh("cpu", (2,)), {x: plan[x] for x in plan if hasattr(model, x)})
    with torch.no_grad():
        for name in ("k_proj", "two"):
            for parameter in getattr(model, name, nn.Identity()).parameters():
                parameter.zero_()
    start = start_qk_norm(model, sgd(model))
    model(X)
    return start.refused, len(start.gains[1]) if start.gains else 0


def clip_refused_by_one(way):
    """What is refused, and which weights a step without a rate changes."""
    model = way(Net())
    freeze_in_one(model, 0)
    before, optimizer = whole(model), torch.optim.SGD(model.parameters(), lr=0.0)
    clip = QKClip(model, 20.0).attach(optimizer)
    train(model, optimizer, X, 1)
    return clip.refused, changed(before, model)


def clip_refused_by_one_later(way):
    """Which weights step 3 changes: the weights of one process have moved by then, and are frozen."""
    model = way(Net())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    clip = QKClip(model, 20.0, within_step=False).attach(optimizer)
    train(model, optimizer, X, 2)
    with torch.no_grad():
        for layer in model.layers:
            layer.q_proj.weight.mul_(12)
    if dist.get_rank() == 1:
        model.layers[0].q_proj.double().float()
    freeze_in_one(model, 0)
    before = whole(model)
    train(model, optimizer, X, 1)
    third = changed(before, model)
    train(model, optimizer, X, 1)
    return third, clip.refused


def one_clip_refused_by_one(way):
    model = way(Net())
    freeze_in_one(model, 1)
    before = whole(model)
    said = raised(lambda: apply_intervention(None, CLIP, model))
    return said, changed(before, model)


def clip_without_a_forward_in_one(way):
    """The weights after steps in which one process has no data, and the sizes that it saw."""
    model = way(Net())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    clip = QKClip(model, 20.0, within_step=False).attach(optimizer)
    if dist.get_rank() == 1:
        optimizer.step()
        optimizer.step()
    else:
        train(model, optimizer, X, 2)
    seen = dict(clip.sizes)
    train(model, optimizer, X, 1)
    return whole(model), seen, clip.refused


def clip_without_any_forward():
    model = Net()
    return raised(QKClip(model, 20.0).step)


SCENARIOS = {
    **{f"norm refused by one, {way.__name__}": partial(norm_refused_by_one, way) for way in (copies, parts)},
    "norm of a skipped layer": norm_of_a_skipped_layer,
    "norm where one names no layer": norm_where_one_names_no_layer,
    **{
        f"pipeline, {act.__name__}": partial(pipeline, act)
        for act in (norm_of_a_stage, norm_of_a_stage_as_an_action, clip_of_a_stage)
    },
    "zero keys in parts": partial(norm_by_layout, partial(Attention, 4), ("q_proj", "k_proj", "v_proj")),
    "zero keys that are shared": partial(norm_by_layout, partial(Attention, 1), ("q_proj",)),
    "zero keys in parts, odd names": partial(norm_by_layout, partial(OddNames, 4), ("one", "two")),
    "zero keys that are shared, odd names": partial(norm_by_layout, partial(OddNames, 2), ("one",)),
    **{
        f"{name}, {way.__name__}": partial(act, way)
        for way in (copies, parts)
        for name, act in {
            "clip refused by one": clip_refused_by_one,
            "clip refused by one later": clip_refused_by_one_later,
        }.items()
    },
    "one clip refused by one": partial(one_clip_refused_by_one, parts),
    "clip without a forward in one": partial(clip_without_a_forward_in_one, copies),
    "clip without any forward": clip_without_any_forward,
}


def main(rank, world, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=60),
    )
    found = {}
    for name, scenario in SCENARIOS.items():
        try:
            found[name] = scenario()
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
        dist.barrier()
    Path(folder, f"{rank}.pickle").write_bytes(pickle.dumps(found))
    dist.destroy_process_group()
