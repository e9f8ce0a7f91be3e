"""What a monitor costs a compiled model, and whether its numbers stay.

    python bench/compiled.py --out OUT.json

Twelve layers of width 768, 1 x 1024 tokens, bf16. A step is forward and backward; a monitored one ends with `on_step`.
Copies of the model, compiled alike, take turns of a few steps: plain, with the extremes of every step, with full
statistics at every step, and with every step read and judged. The JSON file says how far output and gradients moved,
how many graphs were compiled, and which CUDA graphs were skipped.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics
import sys
from collections.abc import Callable
from typing import Any

sys.path[:0] = [
    str(pathlib.Path(__file__).resolve().parents[1]),
    str(pathlib.Path(__file__).resolve().parent),
]

import torch
from machine import machine
from timing import timed
from torch import nn
from torch._dynamo.utils import counters

from hnf_attention import AttentionStabilityMonitor

MODES = ("default", "reduce-overhead", "max-autotune-no-cudagraphs")
NEVER = 10**9
#: The options of the monitor, None for none.
WAYS: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "extremes of every step": {"log_every": NEVER},
    "every step measured": {"log_every": NEVER, "record_every": 1},
    "every step read and judged": {"log_every": 1},
}


class Block(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm, self.heads = nn.LayerNorm(width), heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x):
        q, k, v = (
            y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in self.qkv(self.norm(x)).chunk(3, -1)
        )
        attended = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(x)


class Runner:
    """One copy of the model, compiled, with its monitor if it has one."""

    def __init__(self, sizes: tuple[int, int, int, int], mode: str, options: dict[str, Any] | None, on: dict):
        width, heads, layers, length = sizes
        torch.manual_seed(0)
        self.model = nn.Sequential(*(Block(width, heads) for _ in range(layers))).to(**on)
        self.x = torch.randn(1, length, width, **on)
        self.run = torch.compile(self.model, mode=mode, fullgraph=True)
        self.monitor = None if options is None else AttentionStabilityMonitor(self.run, **options)

    def __call__(self) -> torch.Tensor:
        self.model.zero_grad()
        out = self.run(self.x)
        out.float().square().mean().backward()
        if self.monitor is not None:
            self.monitor.on_step()
        return out

    def numbers(self) -> list[torch.Tensor]:
        """The output and the gradients of one step."""
        out = self().detach().clone()
        return [out, *(p.grad.detach().clone() for p in self.model.parameters())]


def counted(key: str) -> int:
    return counters["inductor"][key]


def measure(mode: str, small: bool, rounds: int) -> dict[str, Any]:
    """Times of one mode of torch.compile, in milliseconds a step."""
    torch._dynamo.reset()
    counters.clear()
    sizes, steps = ((32, 4, 2, 16), 1) if small else ((768, 12, 12, 1024), 5)
    on = {
        "device": "cpu" if small else "cuda",
        "dtype": torch.float32 if small else torch.bfloat16,
    }
    runners: dict[str, Callable[[], torch.Tensor]] = {}
    graphs: dict[str, int] = {}
    for name, options in WAYS.items():
        known = counters["stats"]["unique_graphs"]
        runners[name] = Runner(sizes, mode, options, on)
        for _ in range(4):  # CUDA graphs are recorded at the second and third run
            runners[name]()
        graphs[name] = counters["stats"]["unique_graphs"] - known
    before = runners["plain"].numbers()
    moved = {
        name: max((a - b).abs().max().item() for a, b in zip(before, runner.numbers()))
        for name, runner in runners.items()
    }
    turns = [
        {name: timed(runner, steps)["ms"] for name, runner in runners.items()} for _ in range(rounds + 1)
    ]
    found = {
        "mode": mode,
        "ms": {name: statistics.median(turn[name] for turn in turns[1:]) for name in WAYS},
        "of plain": {
            name: statistics.median(turn[name] / turn["plain"] for turn in turns[1:]) for name in WAYS
        },
        "moved": moved,
        "graphs": graphs,
        "CUDA graphs skipped": counted("cudagraph_skips"),
        "graphs cut": counted("cudagraph_partitions"),
    }
    judged = runners["every step read and judged"].monitor
    found["layers"] = len(judged.history[-1].layers)
    found["coverage"] = sorted(set(judged.instrumentation.coverage.measured.values()))
    for runner in runners.values():
        if runner.monitor is not None:
            runner.monitor.restore()
    return found


def show(found: dict[str, Any]) -> None:
    """A short table of one mode."""
    print(f"mode={found['mode']}: {found['layers']} layers, {', '.join(found['coverage'])}")
    for name in WAYS:
        print(
            f"  {name:<28} {found['ms'][name]:8.3f} ms  {found['of plain'][name]:.3f}x"
            f"  moved by {found['moved'][name]:.1e}  graphs {found['graphs'][name]}"
        )
    print(f"  CUDA graphs skipped: {found['CUDA graphs skipped']}, cut: {found['graphs cut']}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--small", action="store_true", help="a tiny model on the CPU, in the first mode only"
    )
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES[:2], help="of torch.compile")
    parser.add_argument("--rounds", type=int, default=25, help="turns of each way that count")
    parser.add_argument("--out", type=pathlib.Path, help="a JSON file for the results")
    arguments = parser.parse_args()
    modes = arguments.modes[:1] if arguments.small else arguments.modes
    document = {"machine": machine(), "compiled": []}
    for mode in modes:
        document["compiled"].append(measure(mode, arguments.small, arguments.rounds))
        if arguments.out is not None:
            arguments.out.write_text(json.dumps(document, indent=1) + "\n")
    for found in document["compiled"]:
        show(found)


if __name__ == "__main__":
    main()
