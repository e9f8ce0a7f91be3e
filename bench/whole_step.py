"""What monitoring adds to a whole training step: GPT-2 124M and a 1B LLaMA, bf16.

    python bench/whole_step.py OUT.json [--models gpt2 llama] [--shapes 16x1024 1x4096] [--variants plain every_step]
                               [--steps 500]
    python bench/whole_step.py OUT.json --dry       # tiny models on a CPU: does it run

A step is forward, loss, backward, AdamW, zero_grad and `on_step`. The variants share one model and take turns in
every round. A monitor is made for its turn and ended after it. An overhead is the median, over the rounds, of a
variant's time over that of "plain" in the same round. The first round, which compiles, does not count.

- plain: attn_implementation="sdpa", nothing instrumented
- log_every=1: every step is measured, read out and judged
- record_every=1: every step is measured, and no timed step is a log step
- probe: as record_every=1, measured beside the model's own attention even where "auto" would fuse
- every_step: a monitor's default mode with log_every=100: of the timed steps, extremes alone are taken
- logged: the same with log_every=1
- idle: log_every=100, every_step=False, and no timed step is measured
- eager: attn_implementation="eager" with output_attentions=True, and the entropy of each head from the weights;
  timed last and alone, because it would take the allocator's memory from the others

"log_every=100" is derived: of 100 steps, 99 are as under every_step and one is logged, so its overhead is
(99 * every_step + 1 * logged) / (100 * plain) - 1. `--steps 500` runs that many steps of plain and of a monitor with
log_every=100, in turns of 100 steps, and reports the measured overhead beside the derived one.

Dropout is 0, as fused measuring needs it; GPT-2's table of positions is as long as its sequence.
"""

import argparse
import gc
import json
import logging
import statistics
import sys
from collections import Counter
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import torch
from machine import machine
from models import DEVICE, Training
from timing import matmul_tflops, repeat, timed

from hnf_attention import AttentionStabilityMonitor

PERIOD = 100  # of the sparse monitor
# A turn's timed steps fill TURN_SECONDS. A turn starts on an idle device, so its first step waits for the host, which
# is ahead of the device in real training. LEAST_STEPS keep that wait from deciding the result. The first
# two steps of a monitor find out which layers there are.
TURN_SECONDS, LEAST_STEPS, MOST_STEPS, WARMUP = 0.3, 4, 10, 3
OUT_OF_MEMORY = "out of memory"
VARIANTS = {  # what the monitor is made with
    "plain": None,
    "log_every=1": {"log_every": 1},
    "record_every=1": {"log_every": PERIOD, "record_every": 1},
    "probe": {"log_every": PERIOD, "record_every": 1, "mode": "probe"},
    "every_step": {"log_every": PERIOD, "mode": "probe"},
    "logged": {"log_every": 1, "mode": "probe"},
    "idle": {"log_every": PERIOD, "every_step": False},
}


def guarded(action):
    """The action's result, or OUT_OF_MEMORY. Its tensors are freed by then, except the model and the optimizer."""
    try:
        return action()
    except torch.OutOfMemoryError:
        pass
    return OUT_OF_MEMORY


def cleanup(training: Training | None) -> None:
    if training is not None:
        training.optimizer.zero_grad()
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()


def turn(training: Training, options: dict | None, warmup: int, steps: int) -> dict:
    """Milliseconds a step of one variant, after `warmup` steps that are not timed."""
    coverage = None
    if options is not None:
        training.monitor = AttentionStabilityMonitor(training.model, **{"mode": "auto", **options})
    try:
        repeat(training.step, warmup)
        found = timed(training.step, steps)
        if options is not None:
            coverage = training.monitor.instrumentation.coverage
            readings = len(training.monitor.history)
    finally:
        if options is not None:
            training.monitor.restore()
            training.monitor = None
    if coverage is not None:  # shows that it was measured: training goes on without a monitor that fails
        found["measured"] = dict(Counter(coverage.measured.values()))
        found["not_measured"] = dict(Counter(coverage.not_measured.values()))
        found["readings"] = readings
    return found


def summary(turns: list[dict], plain: list[dict] | None = None) -> dict:
    """One variant's medians over its turns, its last turn's coverage, and its largest peak."""
    found = dict(turns[-1])
    for key in ("ms", "host_ms"):
        found[key] = statistics.median(t[key] for t in turns)
    if DEVICE == "cuda":
        found["peak_bytes"] = max(t["peak_bytes"] for t in turns)
    if plain:
        found["overhead"] = statistics.median(t["ms"] / p["ms"] for t, p in zip(turns, plain)) - 1
    return found


def rounds(training: Training, count: int, variants: list[str]) -> dict:
    """The variants in turns, first to last in one round and last to first in the next; the first round is left out."""
    turns = {name: [] for name in variants}
    steps = 1
    for number in range(count + 1):
        for name in list(turns)[:: 1 if number % 2 == 0 else -1]:
            found = guarded(lambda name=name, steps=steps: turn(training, VARIANTS[name], WARMUP, steps))
            if found == OUT_OF_MEMORY:
                del turns[name]
                cleanup(training)
            else:
                turns[name].append(found)
        if number == 0 and "plain" in turns:
            seconds = turn(training, None, 0, 1)["host_ms"] / 1e3
            steps = min(MOST_STEPS, max(LEAST_STEPS, round(TURN_SECONDS / seconds)))
    plain = turns.get("plain", [])[1:]
    found = {name: OUT_OF_MEMORY for name in variants}
    for name, own in turns.items():
        found[name] = summary(own[1:], None if name == "plain" else plain)
    needed = ("plain", "every_step", "logged")
    if all(name in turns for name in needed):
        found[f"log_every={PERIOD}"] = derived(*(turns[name][1:] for name in needed))
    return {"steps_a_turn": steps, "variants": found}


def derived(plain: list[dict], others: list[dict], logged: list[dict]) -> dict:
    """A monitor with log_every=100 over a whole period."""
    overhead = statistics.median(
        ((PERIOD - 1) * o["ms"] + one["ms"]) / (PERIOD * p["ms"]) for p, o, one in zip(plain, others, logged)
    )
    return {
        "ms": statistics.median(p["ms"] for p in plain) * overhead,
        "overhead": overhead - 1,
        "derived": f"({PERIOD - 1} * every_step + 1 * logged) / ({PERIOD} * plain) - 1",
        "peak_bytes": logged[-1]["peak_bytes"],
    }


def eager(training: Training, plain: dict) -> dict | str:
    training.model.set_attn_implementation("eager")
    times = []
    for _ in range(4):
        time = guarded(lambda: timed(training.step_eager, 1))
        if time == OUT_OF_MEMORY:
            return OUT_OF_MEMORY
        times.append(time)
    found = summary(times[1:])  # the first one allocates
    return found | {"overhead": found["ms"] / plain["ms"] - 1}


def long_run(training: Training, steps: int, period: int) -> dict:
    """Run `steps` steps of each, in turns of one period; a monitor's period ends with its log step."""
    turns = {"plain": [], "monitored": []}
    for number in range(max(1, steps // period)):
        for name in list(turns)[:: 1 if number % 2 == 0 else -1]:
            options = None if name == "plain" else {"log_every": period}
            turns[name].append(turn(training, options, 0, period))
    return {"period": period, "turns": len(turns["plain"])} | {
        "plain": summary(turns["plain"]),
        "monitored": summary(turns["monitored"], turns["plain"]),
    }


def compare(name: str, batch: int, length: int, arguments: argparse.Namespace) -> dict:
    """Everything about one model at one shape of its batches."""
    row = {"model": name, "batch": batch, "tokens": length, "rounds": arguments.rounds}
    row["variants"] = dict.fromkeys(arguments.variants, OUT_OF_MEMORY)
    training = guarded(lambda: Training(name, batch, length, arguments.dry))
    if training != OUT_OF_MEMORY:
        row["parameters"] = sum(p.numel() for p in training.model.parameters())
        row |= rounds(training, arguments.rounds, [name for name in arguments.variants if name != "eager"])
        plain = row["variants"]["plain"]
        if arguments.steps:
            row["long_run"] = guarded(lambda: long_run(training, arguments.steps, arguments.period))
            cleanup(training)
        if "eager" in arguments.variants:
            row["variants"]["eager"] = OUT_OF_MEMORY if plain == OUT_OF_MEMORY else eager(training, plain)
    training = None
    cleanup(None)
    return row


def show(row: dict) -> None:
    print(
        f"\n{row['model']}, {row['batch']} x {row['tokens']} tokens, {row.get('parameters', 0) / 1e6:.0f}M parameters"
    )
    lines = dict(row["variants"])
    if isinstance(run := row.get("long_run"), dict):
        lines[f"{run['turns']} x {run['period']} steps"] = run["monitored"]
    for name, found in lines.items():
        if found == OUT_OF_MEMORY:
            print(f"    {name:16} {OUT_OF_MEMORY}", flush=True)
            continue
        peak = "" if found["peak_bytes"] is None else f"{found['peak_bytes'] / 2**30:7.2f} GiB"
        over = f"{found['overhead']:+8.2%}" if "overhead" in found else " " * 8
        print(f"    {name:16} {found['ms']:9.2f} ms {over} {peak} {found.get('measured', '')}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="the JSON file to write")
    parser.add_argument("--models", nargs="+", default=["gpt2", "llama"], choices=["gpt2", "llama"])
    parser.add_argument("--shapes", nargs="+", help="sequences x tokens; 1x1024 1x4096 1x16384 unless given")
    parser.add_argument("--variants", nargs="+", default=[*VARIANTS, "eager"], choices=[*VARIANTS, "eager"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=0, help="run this many steps as well")
    parser.add_argument("--dry", action="store_true", help="tiny models, short sequences")
    arguments = parser.parse_args()
    arguments.period = 5 if arguments.dry else PERIOD
    default = ["1x32", "2x64"] if arguments.dry else ["1x1024", "1x4096", "1x16384"]
    shapes = [tuple(map(int, shape.split("x"))) for shape in arguments.shapes or default]
    logging.getLogger("hnf_attention").addHandler(
        logging.NullHandler()
    )  # issues of random weights are expected
    document = {"machine": machine() | {"matmul_tflops": matmul_tflops()}, "dry": arguments.dry, "steps": []}
    for name in arguments.models:
        for batch, length in shapes:
            document["steps"].append(compare(name, batch, length, arguments))
            show(document["steps"][-1])
            arguments.out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
