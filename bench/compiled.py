"""What a monitor costs a compiled model, and whether its numbers stay.

    python bench/compiled.py --out OUT.json

Twelve layers of width 768, 1 x 1024 tokens, bf16. A step is forward and backward; a monitored one ends with `on_step`.
Two copies of the model, compiled alike, take turns of a few steps: a plain one, and one whose monitor takes the
extremes of every step, then full statistics at every step, then reads and judges every step. The JSON file says how far
output and gradients moved, how many graphs were compiled for both, and how many CUDA graphs were skipped.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics
import sys
from collections.abc import Iterator
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
#: The options of the monitor.
WAYS: dict[str, dict[str, Any]] = {
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
    """One copy of the model, compiled. monitor: of its steps, None for none."""

    def __init__(self, sizes: tuple[int, int, int, int], mode: str, on: dict[str, Any]):
        width, heads, layers, length = sizes
        torch.manual_seed(0)
        self.model = nn.Sequential(*(Block(width, heads) for _ in range(layers))).to(**on)
        self.x = torch.randn(1, length, width, **on)
        self.run = torch.compile(self.model, mode=mode, fullgraph=True)
        self.monitor: AttentionStabilityMonitor | None = None

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


def measure(mode: str, small: bool, rounds: int) -> Iterator[dict[str, Any]]:
    """Times of one mode of torch.compile, in milliseconds a step, one way after the other."""
    torch._dynamo.reset()
    counters.clear()
    sizes, steps = ((32, 4, 2, 16), 1) if small else ((768, 12, 12, 1024), 5)
    on = {
        "device": "cpu" if small else "cuda",
        "dtype": torch.float32 if small else torch.bfloat16,
    }
    plain, watched = (Runner(sizes, mode, on) for _ in range(2))
    for name, options in WAYS.items():
        known = counters["stats"]["unique_graphs"]
        with AttentionStabilityMonitor(watched.run, **options) as monitor:
            watched.monitor = monitor
            for _ in range(4):  # CUDA graphs are recorded at the second and third run
                plain()
                watched()
            pairs = zip(plain.numbers(), watched.numbers(), strict=True)
            moved = max((a - b).abs().max().item() for a, b in pairs)
            turns = [[timed(runner, steps)["ms"] for runner in (plain, watched)] for _ in range(rounds + 1)][
                1:
            ]
            yield {
                "mode": mode,
                "way": name,
                "plain_ms": statistics.median(turn[0] for turn in turns),
                "ms": statistics.median(turn[1] for turn in turns),
                "ratio": statistics.median(turn[1] / turn[0] for turn in turns),
                "moved": moved,
                "new graphs": counters["stats"]["unique_graphs"] - known,
                "CUDA graphs skipped": counters["inductor"]["cudagraph_skips"],
                "layers": {how: len(names) for how, names in by_way(monitor).items()},
            }
        watched.monitor = None


def by_way(monitor: AttentionStabilityMonitor) -> dict[str, list[str]]:
    """The layers by how they are measured."""
    found: dict[str, list[str]] = {}
    for layer, how in monitor.instrumentation.coverage.measured.items():
        found.setdefault(how, []).append(layer)
    return found


def show(found: dict[str, Any]) -> None:
    """A line of the table."""
    print(
        f"{found['mode']:<16} {found['way']:<28} plain {found['plain_ms']:8.3f} ms  {found['ms']:8.3f} ms"
        f"  {found['ratio']:.3f}x  moved by {found['moved']:.1e}  new graphs {found['new graphs']}"
        f"  CUDA graphs skipped {found['CUDA graphs skipped']}  {found['layers']}",
        flush=True,
    )


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
        for found in measure(mode, arguments.small, arguments.rounds):
            document["compiled"].append(found)
            show(found)
            if arguments.out is not None:
                arguments.out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
