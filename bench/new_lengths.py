"""What a length costs that no call had before, and the Hopper forward beside that of another checkout.

    python bench/new_lengths.py [--old TREE] [--causal] [--forward] [--lengths 4096] [--odd 2] [--out OUT.json]

Stall: milliseconds of the host from a call to its return while the card is busy with other work, so that a call that
waits for the card is seen. Every length is called twice; the first call is compared with the second one. The kernels
are compiled, and PyTorch's allocator holds enough memory. The target is 0.3 ms more for the first call.
Forward: medians of CUDA graphs, both checkouts in turns in one process; outputs must agree to the last bit. --stretch
times other values of `schedule.STRETCH` beside them.
"""

import argparse
import importlib
import json
import random
import statistics
import sys
import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from types import ModuleType

root = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(root), str(root / "bench")]

import torch
from machine import machine
from triton.testing import do_bench_cudagraph

from hnf_attention import attention, attention_stats
from hnf_attention.engine import engines, fold
from hnf_attention.engine.call import check
from hnf_attention.engine.card import card_of

TARGET_MS = 0.3
TOKENS = 16384
LENGTHS = (1024, 2048, 4096, 8192, 16384)
# (heads, batch, length): lengths that are no multiple of a tile, heads that are no multiple of a group's.
ODD = [(12, 16, 1000), (16, 4, 3000), (20, 2, 5000), (25, 8, 1777), (6, 1, 12000), (96, 4, 777), (3, 1, 2500)]
DEFAULTS = dict.fromkeys(("attn_mask", "scale", "window_size", "softcap", "sinks"))
ROUNDS = 3


def tensors(batch: int, heads: int, length: int, head_dim: int) -> list[torch.Tensor]:
    shape = (batch, heads, length, head_dim)
    return [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(3)]


def paths():
    """Name -> a call with (q, k, v) and a causality."""

    def folded(q, k, v, is_causal):
        rows = attention_stats(q, k, is_causal=is_causal)
        accumulator = fold.new_accumulator(q.shape[1], q.device)
        fold.fold(accumulator, q, k, rows, check(q, k, None, is_causal=is_causal, **DEFAULTS))

    return {
        "forward": lambda q, k, v, is_causal: attention(q, k, v, is_causal=is_causal),
        "probe": lambda q, k, v, is_causal: attention_stats(q, k, is_causal=is_causal),
        "sample": lambda q, k, v, is_causal: attention_stats(q, k, is_causal=is_causal, sample=(4, 1)),
        "probe and fold": folded,
        "SDPA": lambda q, k, v, is_causal: torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=is_causal
        ),
    }


def stalls(new_lengths: int = 12) -> list[dict]:
    """Host milliseconds of the first and the second call of each length, for every path."""
    busy = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    found = []
    for heads in (64, 512):
        for name, call in paths().items():
            # Compile for lengths that 16 divides and for others, and make the allocator keep memory.
            for length in (1040, 1033):
                call(*tensors(1, heads, length, 64), True)
            kept = [torch.empty(1 << 28, device="cuda") for _ in range(4)]
            small = [torch.empty(1 << 16, device="cuda") for _ in range(64)]
            del kept, small
            lengths = [1024 + 80 * step + (step % 3 == 2) * 9 for step in range(1, new_lengths + 1)]
            first, again = [], []
            for length in lengths:
                inputs = tensors(1, heads, length, 64)
                torch.cuda.synchronize()
                for times in (first, again):
                    for _ in range(10):
                        busy @ busy
                    begin = time.perf_counter()
                    call(*inputs, True)
                    times.append((time.perf_counter() - begin) * 1e3)
                    torch.cuda.synchronize()
            more = [a - b for a, b in zip(first, again)]
            found.append(
                {
                    "path": name,
                    "batch_heads": heads,
                    "first_ms": statistics.median(first),
                    "again_ms": statistics.median(again),
                    "more_ms": statistics.median(more),
                    "most_ms": max(more),
                }
            )
    return found


def kernels_of(tree: Path) -> ModuleType:
    """The Hopper forward of another checkout, beside this one's."""
    package = ModuleType("old_kernels")
    package.__path__ = [str(tree.resolve() / "kernels")]
    sys.modules["old_kernels"] = package
    return importlib.import_module("old_kernels.hopper.host")


def shapes(lengths: list[int], odd: int, causalities: tuple[bool, ...]):
    """(head dimension, heads, batch, length, causal), with so many of the odd shapes."""
    for head_dim, heads in ((64, 32), (128, 16)):
        for is_causal in causalities:
            for length in lengths:
                yield head_dim, heads, TOKENS // length, length, is_causal
        for heads_, batch, length in ODD[:odd]:
            yield head_dim, heads_, batch, length, True


def forwards(old: ModuleType | None, stretches: list[int], chosen: Iterable[tuple]) -> list[dict]:
    """Milliseconds of the Hopper forward, of the other checkout's, and with other stretches, by shape."""
    new, schedule = engines.kernel("hopper.host"), engines.kernel("hopper.schedule")
    variants = {"new": (new, schedule.STRETCH)} | {f"stretch {n}": (new, n) for n in stretches}
    if old is not None:
        variants["old"] = old, schedule.STRETCH
    found = []
    for head_dim, heads, batch, length, is_causal in chosen:
        q, k, v = tensors(batch, heads, length, head_dim)
        options = check(q, k, v, is_causal=is_causal, **DEFAULTS)
        times: dict[str, list[float]] = {name: [] for name in variants}
        results = {}
        for _ in range(ROUNDS):
            for name in random.sample(list(variants), len(variants)):
                host, schedule.STRETCH = variants[name]
                results[name] = host.forward(q, k, v, options)[:5]
                action = partial(host.forward, q, k, v, options)
                times[name].append(do_bench_cudagraph(action, rep=10, return_mode="median"))
        schedule.STRETCH = variants["new"][1]
        same = all(torch.equal(*pair) for other in results.values() for pair in zip(results["new"], other))
        milliseconds = {name: statistics.median(spent) for name, spent in times.items()}
        shape = f"D={head_dim} H={heads} B={batch} N={length} {'causal' if is_causal else 'full'}"
        found.append({"shape": shape, "ms": milliseconds, "same_bits": same})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--old", type=Path, help="another checkout, whose Hopper forward is timed beside")
    parser.add_argument(
        "--stretch", type=int, nargs="*", default=[], help="other values of schedule.STRETCH to time"
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--odd", type=int, default=len(ODD), help="how many of the odd shapes to time")
    parser.add_argument("--causal", action="store_true", help="leave shapes without a causal mask out")
    parser.add_argument("--forward", action="store_true", help="leave the stall of the host out")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    reason = engines.hopper_runs_on(card_of(torch.device("cuda", torch.cuda.current_device())))
    if reason is not None:
        sys.exit(f"the Hopper forward does not run here: {reason}")
    torch.manual_seed(0)
    document = {
        "machine_info": machine(),
        "target_ms": TARGET_MS,
        "stalls": [] if options.forward else stalls(),
    }
    document["forwards"] = forwards(
        None if options.old is None else kernels_of(options.old),
        options.stretch,
        shapes(options.lengths, options.odd, (True,) if options.causal else (True, False)),
    )
    if options.out:
        options.out.write_text(json.dumps(document, indent=1) + "\n")
    for row in document["forwards"]:
        base = row["ms"].get("old", row["ms"]["new"])
        numbers = "  ".join(f"{name} {ms:.4f} ({ms / base:.3f})" for name, ms in row["ms"].items())
        print(f"{row['shape']:36} {numbers}  {'same bits' if row['same_bits'] else 'OTHER BITS'}")
    for name in document["forwards"][0]["ms"]:
        ratios = [row["ms"][name] / row["ms"].get("old", row["ms"]["new"]) for row in document["forwards"]]
        print(f"{name}: median {statistics.median(ratios):.3f}, {min(ratios):.3f} to {max(ratios):.3f}")
    print("host milliseconds of a call, the card busy: a new length, the same again, more (median, largest)")
    for row in document["stalls"]:
        numbers = "  ".join(f"{row[key]:8.3f}" for key in ("first_ms", "again_ms", "more_ms", "most_ms"))
        print(f"{row['path']:16} B*H={row['batch_heads']:4} {numbers}")


if __name__ == "__main__":
    main()
