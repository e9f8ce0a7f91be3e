"""Context parallelism and rings at a long sequence against one process: merged statistics, and what they cost.

Queries, keys and values are given, so that every process holds bits of the same tensors, and what differs is the merge.
"""

from __future__ import annotations

import runpy
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from hnf_attention import AttentionStabilityMonitor, ProcessGroups

from .model import COMPARED, Setting, difference, gathered, statistics_difference

ROOT = Path(__file__).resolve().parents[2]
EXACT = tuple(name for name in COMPARED if name != "sink_mass")
TURNS = 5


class Product(nn.Module):
    """attend: (query, key, value) -> output."""

    def __init__(self, attend: Callable[[Tensor, Tensor, Tensor], Tensor]):
        super().__init__()
        self.attend = attend

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return self.attend(query, key, value)


def causal(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, is_causal=True)


def inputs(setting: Setting) -> list[Tensor]:
    """Query, key and value (1, H, N, D) of the whole sequence, bf16 on a card; scores as of a sharp layer.

    The rows of every second head share a sink, the key in the middle of the sequence's second quarter.
    """
    heads, head_dim = (4, 8) if setting.tiny else (16, 64)
    dtype = torch.bfloat16 if setting.device.type == "cuda" else torch.float32
    generator = torch.Generator().manual_seed(2)
    shape = (1, heads, setting.length, head_dim)
    parts = [torch.randn(shape, generator=generator, dtype=torch.float32) for _ in range(3)]
    parts[0].mul_(2.0)
    parts[0][:, ::2] += 2.0
    parts[1][:, ::2, setting.length * 3 // 8] = 8 * head_dim**-0.5
    return [x.to(setting.device, dtype) for x in parts]


def synchronised(setting: Setting) -> float:
    if setting.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def step(model: nn.Module, tensors: list[Tensor]) -> None:
    model(*(x.detach().requires_grad_() for x in tensors)).sum().backward()


def measured(setting: Setting, attend: Callable[..., Tensor], tensors: list[Tensor], ranks: Any) -> Any:
    """(head statistics, coverage, milliseconds of a step by variant): forward and backward, medians of turns."""
    model = Product(attend)
    with AttentionStabilityMonitor(model, log_every=1, ranks=ranks) as monitor:
        step(model, tensors)
        monitor.on_step()
        layers, coverage = monitor.history[-1].layers, monitor.instrumentation.coverage
    times: dict[str, list[float]] = {"plain": [], "log_every=100": [], "log_every=1": []}
    for _ in range(TURNS):
        for name, turn in times.items():
            period = None if name == "plain" else int(name.partition("=")[2])
            watching: Any = nullcontext()
            if period is not None:
                watching = AttentionStabilityMonitor(model, log_every=period, ranks=ranks)
            with watching as monitor:
                begin = synchronised(setting)
                step(model, tensors)
                if monitor is not None:
                    monitor.on_step()
                turn.append((synchronised(setting) - begin) * 1e3)
    return layers, coverage, {name: statistics.median(turn) for name, turn in times.items()}


@contextmanager
def _rings(setting: Setting) -> Iterator[None]:
    """PyTorch has no ring of the CPU's operator; the tests make one of PyTorch's own functions."""
    if setting.device.type == "cuda":
        yield
        return
    with runpy.run_path(str(ROOT / "tests" / "rings.py"))["rings_on_cpus"]():
        yield


def pytorch(setting: Setting, method: str) -> Any:
    """PyTorch's `context_parallel`, balanced (zigzag)."""
    from torch.distributed.tensor.experimental import context_parallel
    from torch.distributed.tensor.experimental._attention import set_rotate_method

    mesh = init_device_mesh(setting.device.type, (setting.size,), mesh_dim_names=("cp",))
    set_rotate_method(method)
    tensors = inputs(setting)
    ranks = ProcessGroups.of_mesh(mesh, queries="cp")
    with _rings(setting), context_parallel(mesh, buffers=tensors, buffer_seq_dims=[2] * 3):
        return measured(setting, causal, tensors, ranks)


def example(setting: Setting, order: str) -> Any:
    """The ring of examples/ring_attention.py, which tells the monitor of its blocks."""
    theirs = runpy.run_path(str(ROOT / "examples" / "ring_attention.py"))
    tensors = [theirs["share"](x, setting.rank, setting.size, order, 2) for x in inputs(setting)]

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return theirs["ring_attention"](query, key, value, dist.group.WORLD, order)

    return measured(setting, attend, tensors, ProcessGroups(queries=dist.group.WORLD))


def sinks(layers: Any, expected: Any, first: int) -> float:
    """The largest difference of `sink_mass` in every second head. Without a sink, each process finds its own keys."""
    pairs = zip(layers.values(), expected.values(), strict=True)
    found = [(x.sink_mass[first::2], y.sink_mass[first::2]) for x, y in pairs]
    return difference(*zip(*found))


def run(setting: Setting) -> dict[str, Any]:
    """By ring: the largest difference of a statistic from one process, and the overhead of a monitor."""
    expected, _, alone = measured(setting, causal, inputs(setting), None)
    found: dict[str, Any] = {"one process": {"ms": alone}}
    rings: dict[str, Callable[[], Any]] = {
        "context_parallel, allgather": lambda: pytorch(setting, "allgather"),
        "context_parallel, alltoall": lambda: pytorch(setting, "alltoall"),
        "example, zigzag": lambda: example(setting, "zigzag"),
        "example, contiguous": lambda: example(setting, "contiguous"),
    }
    for name, ring in rings.items():
        layers, coverage, times = ring()
        worst = max(statistics_difference(layers, expected, EXACT), sinks(layers, expected, 0))
        everyone = gathered((worst, sinks(layers, expected, 1), times, dict(coverage.measured)))
        slowest = {key: max(x[2][key] for x in everyone) for key in times}
        found[name] = {
            "difference": max(x[0] for x in everyone),
            "difference_of_sink_mass_without_sinks": max(x[1] for x in everyone),
            "ms": slowest,
            "overhead_every_step": slowest["log_every=1"] / slowest["plain"] - 1,
            "overhead_between_log_steps": slowest["log_every=100"] / slowest["plain"] - 1,
            "measured": everyone[0][3],
        }
    return found
