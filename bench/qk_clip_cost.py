"""What `QKClip` adds to a whole training step of a 1B LLaMA, bf16.

    python bench/qk_clip_cost.py [--shapes 4x4096 8x2048] [--rounds 6] [--out OUT.json]
    python bench/qk_clip_cost.py --dry              # a tiny model on a CPU: does it run

A step is forward, loss, backward, AdamW and zero_grad. The variants share one model and take turns in every round:

- plain: no clip
- far: every head is far below the threshold, so a bound is computed at one step of eight
- bound: every layer's bound is just below half of the threshold, so it is computed at every step
- near: every head is close to the threshold, so its exact size is computed at every step
- few near: the same for one query head of each layer, which is made four times as long; the others are far below
- default, ...: with `within_step=True`, where each forward of a layer that is not calm looks at its own sizes
- steps that clip cost the same as "near": factors are multiplied in whether they are 1 or not

The learning rate is 0: sizes stay where the thresholds were chosen for them.

A clip is made for its turn and ended after it. The first round, which compiles, does not count. One step of each turn
runs under torch's own check that the host waits for nothing; "waits" says whether it did.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import torch
from machine import machine
from models import DEVICE, Training
from timing import repeat, timed

from hnf_attention.interventions import QKClip

WARMUP = 12  # until the way of measuring is chosen, the bounds have been read, and layers far below are calm
FAR, BOUND, NEAR = 1e6, 2.2, 1.05  # nats; of the largest bound; of the largest size
LONGER = 4.0
STEPS = 8  # in a row: as many as a layer that is far below is looked at once in


def sizes(training: Training) -> tuple[float, float]:
    """The largest exact size of a head, and the largest bound of one."""
    clip = QKClip(training.model, FAR).attach(training.optimizer)
    found = []
    for _ in range(3):  # the third step takes bounds alone
        training.step()
        found.append(max(max(heads) for heads in clip.sizes.values()))
    clip.remove()
    return found[0], found[2]


@torch.no_grad()
def scale_first_heads(training: Training, factor: float) -> None:
    """Multiply the queries of each layer's first head."""
    for layer in training.model.model.layers:
        layer.self_attn.q_proj.weight[: layer.self_attn.head_dim] *= factor


def turn(training: Training, options: dict | None, steps: int) -> dict:
    """Milliseconds a step."""
    clip = None if options is None else QKClip(training.model, **options).attach(training.optimizer)
    repeat(training.step, WARMUP)
    waits = host_waits(training)
    found = timed(training.step, steps) | {"waits": waits}
    if clip is not None:
        clip.remove()
        found["layers"], found["refused"] = len(clip.sizes), dict(clip.refused)
    return found


def host_waits(training: Training) -> str | None:
    """Where a step waits for the device, by torch's own check; None for nowhere."""
    if DEVICE != "cuda":
        return None
    torch.cuda.set_sync_debug_mode("error")
    try:
        training.step()
    except RuntimeError as error:
        return str(error)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return None


def measure(shape: str, rounds: int, tiny: bool) -> dict:
    batch, length = map(int, shape.split("x"))
    training = Training("llama", batch, length, tiny)
    for group in training.optimizer.param_groups:
        group["lr"] = 0.0  # sizes stay where the thresholds were chosen for them
    largest, bound = sizes(training)
    variants = {
        "plain": None,
        "far": {"threshold": FAR, "within_step": False},
        "bound": {"threshold": BOUND * bound, "within_step": False},
        "near": {"threshold": NEAR * largest, "within_step": False},
        "default, far": {"threshold": FAR},
        "default, bound": {"threshold": BOUND * bound},
        "default, near": {"threshold": NEAR * largest},
        "few near": {"threshold": NEAR * LONGER * largest, "within_step": False},
        "default, few near": {"threshold": NEAR * LONGER * largest},
    }
    turns = {name: [] for name in variants}
    for number in range(rounds + 1):
        for name in list(variants)[:: 1 if number % 2 == 0 else -1]:
            factor = LONGER if "few" in name else 1.0
            scale_first_heads(training, factor)
            turns[name].append(turn(training, variants[name], 1 if number == 0 else STEPS))
            scale_first_heads(training, 1 / factor)
    found = {"largest_size": largest, "largest_bound": bound}
    for name, own in turns.items():
        ratios = [t["ms"] / p["ms"] - 1 for t, p in zip(own[1:], turns["plain"][1:])]
        found[name] = dict(own[-1]) | {
            "ms": statistics.median(t["ms"] for t in own[1:]),
            "overhead": statistics.median(ratios),
            "overheads": ratios,
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shapes", nargs="+", default=["4x4096", "8x2048"])
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--dry", action="store_true")
    asked = parser.parse_args()
    shapes, rounds = (["2x64"], 1) if asked.dry else (asked.shapes, asked.rounds)
    found = {"machine": machine(), "shapes": {shape: measure(shape, rounds, asked.dry) for shape in shapes}}
    if asked.out:
        asked.out.write_text(json.dumps(found, indent=1))
    for shape, variants in found["shapes"].items():
        print(f"\n1B LLaMA, {shape} tokens, largest size {variants['largest_size']:.1f} nats")
        for name in [name for name in variants if not name.startswith("largest")]:
            print(
                f"  {name:17} {variants[name]['ms']:9.2f} ms  {variants[name]['overhead']:+8.2%}"
                f"  {'the host waits' if variants[name]['waits'] else 'no wait'}"
            )


if __name__ == "__main__":
    main()
