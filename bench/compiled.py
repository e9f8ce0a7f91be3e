"""What measuring costs a compiled model on a card, and whether its numbers stay: `python bench/compiled.py`.

Prints, for each mode of torch.compile, the time of a training step before the model is instrumented, while it is
(measuring, and not measuring), and after; how far output and gradients moved; how many graphs were compiled; and
how many layers were measured.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
import time

import torch
from torch import nn

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from torch._dynamo.utils import counters

from hnf_attention.instrumentation import instrument

MODES = ("default", "reduce-overhead", "max-autotune-no-cudagraphs")


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


def step(run: nn.Module, model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """One step's output and gradients."""
    model.zero_grad()
    out = run(x)
    out.float().square().mean().backward()
    return [out.detach().clone(), *(p.grad.detach().clone() for p in model.parameters())]


def milliseconds(run: nn.Module, model: nn.Module, x: torch.Tensor, repeats: int) -> float:
    """Median time of a training step."""
    times = []
    for _ in range(repeats):
        wait(x)
        start = time.perf_counter()
        model.zero_grad()
        run(x).float().square().mean().backward()
        wait(x)
        times.append(1e3 * (time.perf_counter() - start))
    return sorted(times)[repeats // 2]


def wait(x: torch.Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize()


def measure(mode: str, small: bool) -> None:
    torch._dynamo.reset()
    counters.clear()
    device = "cpu" if small else "cuda"
    width, heads, layers, length, repeats = (32, 4, 2, 16, 3) if small else (768, 12, 12, 1024, 50)
    dtype = torch.float32 if small else torch.bfloat16
    torch.manual_seed(0)
    model = nn.Sequential(*(Block(width, heads) for _ in range(layers))).to(device, dtype)
    x = torch.randn(1, length, width, device=device, dtype=dtype)
    run = torch.compile(model, mode=mode, fullgraph=True)
    for _ in range(3):  # CUDA graphs are recorded at the second and third run
        before = step(run, model, x)
    times = {"before": milliseconds(run, model, x, repeats)}
    with instrument(model, mode="auto") as handle:
        for _ in range(3):
            during = step(run, model, x)
        times["measuring"] = milliseconds(run, model, x, repeats)
        handle.measuring = False
        times["not measuring"] = milliseconds(run, model, x, repeats)
        handle.measuring = True
        handle.latest.clear()
        run(x)
        layers_measured, coverage = len(handle.latest), str(handle.coverage)
    after = step(run, model, x)
    times["after"] = milliseconds(run, model, x, repeats)
    moved = max((a - b).abs().max().item() for a, b in zip(before, during))
    back = max((a - b).abs().max().item() for a, b in zip(before, after))
    print(f"mode={mode}: {', '.join(f'{name} {ms:.2f} ms' for name, ms in times.items())}")
    print(
        f"  moved by {moved:.1e} while instrumented, {back:.1e} after; {layers_measured} of {layers} layers measured"
    )
    print(f"  graphs {counters['stats']['unique_graphs']}, CUDA graphs skipped {dict(counters['inductor'])}")
    print("  " + coverage.replace("\n", "\n  "))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--small", action="store_true", help="a tiny model on the CPU, in the first mode only"
    )
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES, help="of torch.compile")
    arguments = parser.parse_args()
    for mode in arguments.modes[:1] if arguments.small else arguments.modes:
        measure(mode, arguments.small)


if __name__ == "__main__":
    main()
