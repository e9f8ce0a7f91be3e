"""The model of these runs, how it is spread over processes, and how numbers of processes are compared."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from hnf_attention import ProcessGroups

#: Of the head statistics.
COMPARED = (
    "rows",
    "entropy",
    "normalized_entropy",
    "max_weight",
    "sink_mass",
    "logit_range",
    "logit_range_max",
    "max_logit",
    "min_logit",
    "log2_curvature",
)


class Setting(NamedTuple):
    """One process of the run. length: tokens of a ring's sequence. tiny: sizes for a CPU."""

    rank: int
    size: int
    device: torch.device
    length: int
    tiny: bool


class Attention(nn.Module):
    """Causal, with separate projections, and as many heads as this process's projections hold."""

    def __init__(self, width: int, head_dim: int):
        super().__init__()
        self.head_dim = head_dim
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(self, name, nn.Linear(width, width))
            nn.init.normal_(getattr(self, name).weight, std=0.6 * width**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (p(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for p in projections)
        return self.o_proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class Net(nn.Module):
    """Layers of attention. The scores of the first one are far too large."""

    def __init__(self, setting: Setting):
        super().__init__()
        width, head_dim = (32, 8) if setting.tiny else (512, 64)
        self.layers = nn.ModuleList(Attention(width, head_dim) for _ in range(2))
        with torch.no_grad():
            self.layers[0].q_proj.weight.mul_(16)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


def net(setting: Setting) -> Net:
    torch.manual_seed(0)
    return Net(setting).to(setting.device)


def batch(setting: Setting) -> Tensor:
    """(B, N, width), the same in every process; B is 4 sequences a process."""
    shape = (4 * setting.size, 24, 32) if setting.tiny else (4 * setting.size, 512, 512)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(setting.device)


class Spread(NamedTuple):
    """A model over processes. inputs: this process's part of the batch. ranks: None for one process alone."""

    model: nn.Module
    inputs: Tensor
    ranks: ProcessGroups | None


def alone(setting: Setting, model: Net) -> Spread:
    return Spread(model, batch(setting), None)


def ddp(setting: Setting, model: Net) -> Spread:
    devices = [setting.device.index] if setting.device.type == "cuda" else None
    whole = nn.parallel.DistributedDataParallel(model, device_ids=devices)
    return Spread(whole, batch(setting).chunk(setting.size)[setting.rank], ProcessGroups.of_world())


def fsdp2(setting: Setting, model: Net) -> Spread:
    mesh = init_device_mesh(setting.device.type, (setting.size,), mesh_dim_names=("dp",))
    _shard(model, mesh)
    return Spread(model, batch(setting).chunk(setting.size)[setting.rank], ProcessGroups.of_mesh(mesh))


def bf16_over_fp32(setting: Setting, model: Net) -> Spread:
    """FSDP2 that computes in bf16. Its shards are the masters, in fp32."""
    mesh = init_device_mesh(setting.device.type, (setting.size,), mesh_dim_names=("dp",))
    _shard(model, mesh, mp_policy=_bf16())
    return Spread(model, batch(setting).chunk(setting.size)[setting.rank], ProcessGroups.of_mesh(mesh))


def bf16_alone(setting: Setting, model: Net) -> Spread:
    """The same with all shards in one process."""
    mesh = init_device_mesh(setting.device.type, (setting.size, 1), mesh_dim_names=("others", "dp"))
    _shard(model, mesh["dp"], mp_policy=_bf16())
    return Spread(model, batch(setting), None)


def _bf16() -> Any:
    from torch.distributed.fsdp import MixedPrecisionPolicy

    return MixedPrecisionPolicy(torch.bfloat16, torch.float32, torch.float32)


def _shard(model: Net, mesh: Any, **options: Any) -> None:
    from torch.distributed.fsdp import fully_shard

    for layer in model.layers:
        fully_shard(layer, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)


def _plan() -> dict[str, Any]:
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

    return {**dict.fromkeys(("q_proj", "k_proj", "v_proj"), ColwiseParallel()), "o_proj": RowwiseParallel()}


def tensor_parallel(setting: Setting, model: Net) -> Spread:
    from torch.distributed.tensor.parallel import parallelize_module

    mesh = init_device_mesh(setting.device.type, (setting.size,), mesh_dim_names=("tp",))
    for layer in model.layers:
        parallelize_module(layer, mesh, _plan())
    return Spread(model, batch(setting), ProcessGroups.of_mesh(mesh, heads="tp"))


def both(setting: Setting, model: Net) -> Spread:
    """Heads in pairs of processes, FSDP2 over the pairs. An odd number of processes has FSDP2 alone."""
    from torch.distributed.tensor.parallel import parallelize_module

    parts = math.gcd(setting.size, 2)
    shares = setting.size // parts
    mesh = init_device_mesh(setting.device.type, (shares, parts), mesh_dim_names=("dp", "tp"))
    for layer in model.layers:
        parallelize_module(layer, mesh["tp"], _plan())
    _shard(model, mesh["dp"])
    mine = batch(setting).chunk(shares)[setting.rank // parts]
    return Spread(model, mine, ProcessGroups.of_mesh(mesh, heads="tp"))


WAYS: dict[str, Callable[[Setting, Net], Spread]] = {
    "DDP": ddp,
    "FSDP2": fsdp2,
    "tensor parallel": tensor_parallel,
    "FSDP2 and tensor parallel": both,
}


def whole(tensor: Tensor) -> Tensor:
    """A copy of a parameter or of an optimizer's state; every process has to ask for that of a DTensor."""
    full = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full.detach().clone()


def weights(model: nn.Module) -> list[Tensor]:
    return [whole(p) for p in getattr(model, "module", model).parameters()]


def train(
    spread: Spread, optimizer: torch.optim.Optimizer, steps: int, after: Callable[[], None] = lambda: None
) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        spread.model(spread.inputs).square().mean().backward()
        optimizer.step()
        after()


def difference(found: Any, expected: Any) -> float:
    """The largest |a - b| / max(1, |b|) over arrays or tensors in pairs; inf where only one is finite."""
    worst = 0.0
    for a, b in zip(found, expected, strict=True):
        a, b = (np.asarray(x.cpu() if isinstance(x, Tensor) else x, np.float64) for x in (a, b))
        if a.shape != b.shape or (np.isfinite(a) != np.isfinite(b)).any():
            return float("inf")
        known = np.isfinite(b)
        distance = np.abs(a[known] - b[known]) / np.maximum(1.0, np.abs(b[known]))
        worst = max(worst, float(distance.max(initial=0.0)))
    return worst


def statistics_difference(layers: Any, expected: Any, names: tuple[str, ...] = COMPARED) -> float:
    """`difference` of the head statistics of layers, by name; inf where the layers differ."""
    if len(layers) != len(expected):
        return float("inf")
    pairs = list(zip(layers.values(), expected.values()))
    return difference(
        [getattr(x, name) for x, _ in pairs for name in names],
        [getattr(y, name) for _, y in pairs for name in names],
    )


@contextmanager
def logged() -> Iterator[list[str]]:
    """The messages of the package inside the context."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("hnf_attention")
    logger.addHandler(handler)
    try:
        yield messages
    finally:
        logger.removeHandler(handler)


def gathered(value: Any) -> list[Any]:
    """The value of every process, by rank."""
    everyone = [value] * dist.get_world_size()
    dist.all_gather_object(everyone, value)
    return everyone
