"""A long monitored run and many short ones, whose memory, step time and file size have to stay flat.

    python bench/soak.py [--device cpu|cuda] [--steps 100000] [--pairs 10000] [--seconds 900] [--out soak.json]

The first part trains a tiny model under a monitor with a run log, `--steps` steps. The monitor is then ended, and
what it leaves is counted: hooks, replaced functions, threads, objects. The second part instruments and restores a model
`--pairs` times. Each stops early at its share of `--seconds`. Times are those of this thread's processor on a CPU,
where neighbours share it, and of the wall on a card. Exit code 1 if a check fails.
"""

import argparse
import gc
import json
import statistics
import sys
import tempfile
import threading
import time
import weakref
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import torch
from history_memory import resident
from machine import machine
from torch import nn
from torch.nn import functional

from hnf_attention import AttentionStabilityMonitor, instrument
from hnf_attention.instrumentation import observer
from hnf_attention.run_log import RunLog, RunLogWriter

WINDOWS = 10  # parts of the run that are compared; the first two are left out as a warm-up
LOG_EVERY = 100
HISTORY_BYTES = 1 << 18  # so small that it is full after a tenth of the run
GROWTH = 24.0  # MB that the process may add after the warm-up: the allocator's and Python's own
OBJECTS = 2_000  # objects that Python may add
SLOWER = 1.25  # how much slower the last window's median step may be than that of the first one compared
BYTES = 0.15  # how far the bytes of a log step may be from those of the first half
CLOCKS = {"cpu": time.thread_time, "cuda": time.perf_counter}
_FUNCTIONS = ("softmax", "matmul", "mm", "bmm", "baddbmm", "einsum")


class Layer(nn.Module):
    def __init__(self, width: int = 32, heads: int = 2):
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        x = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(x.transpose(1, 2).flatten(2))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(2))

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x


def replaced() -> list:
    """What instrumenting replaces in torch, and what it registers."""
    functions = [functional.scaled_dot_product_attention, functional.multi_head_attention_forward]
    functions += [getattr(torch, name) for name in _FUNCTIONS] + [torch.Tensor.__matmul__]
    registered = [list(observer.modules()), sorted(observer.active), sorted(observer.keeping)]
    return [*functions, vars(Model).copy(), *registered]


def hooks(model: nn.Module) -> int:
    """How many hooks the model's modules and parameters hold."""
    names = [name for name in vars(model) if name.endswith("hooks")]
    return sum(len(getattr(module, name)) for module in model.modules() for name in names)


def state(path: Path, device: str) -> dict:
    """The process now."""
    gc.collect()
    files = sum(x.stat().st_size for x in path.parent.glob(f"{path.name}*"))
    card = torch.cuda.memory_allocated() if device == "cuda" else 0
    return {"mb": resident(), "card_bytes": card, "objects": len(gc.get_objects()), "file_bytes": files}


def long_run(device: str, steps: int, seconds: float, path: Path) -> dict:
    """Train under a monitor, then end it."""
    torch.manual_seed(0)
    before, threads = replaced(), threading.active_count()
    model = Model().to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    x = torch.randn(2, 16, 32, device=device)
    own = hooks(model)
    monitor = AttentionStabilityMonitor(
        model, log_every=LOG_EVERY, writers=[out := RunLogWriter(path)], history_bytes=HISTORY_BYTES
    )
    windows, times, done, began, clock = [], [], 0, time.monotonic(), CLOCKS[device]
    while done < steps and time.monotonic() - began < seconds:
        start = clock()
        loss = (model(x) - x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        monitor.on_step(loss=loss)
        times.append(clock() - start)
        done += 1
        if done % max(1, steps // WINDOWS) == 0:
            out.flush()
            log_steps = sum(1 for step in range(LOG_EVERY, done + 1, LOG_EVERY))
            row = {"step": done, "log_steps": log_steps, "ms": 1e3 * statistics.median(times)}
            windows.append(row | state(path, device))
            times = []
            print(json.dumps(windows[-1]), flush=True)
    status, reference = str(monitor.status), weakref.ref(monitor)
    monitor.restore()
    del monitor, out
    gc.collect()
    left = {
        "hooks": hooks(model) - own,
        "functions": sum(mine is not theirs and mine != theirs for mine, theirs in zip(replaced(), before)),
        "threads": threading.active_count() - threads,
        "monitor_alive": reference() is not None,
        "garbage": len(gc.garbage),
    }
    with RunLog(path) as log:
        in_file = len(log.steps)
    return {
        "steps": done,
        "windows": windows,
        "status": status,
        "left": left,
        "log_steps_in_file": in_file,
        "log_steps_expected": done // LOG_EVERY,
    }


def pairs(device: str, count: int, seconds: float, path: Path) -> dict:
    """Instrument and restore."""
    model, before = Model().to(device), replaced()
    own, rows, times = hooks(model), [], []
    began, done, clock = time.monotonic(), 0, CLOCKS[device]
    while done < count and time.monotonic() - began < seconds:
        start = clock()
        handle = instrument(model)
        handle.restore()
        del handle
        times.append(clock() - start)
        done += 1
        if done % max(1, count // WINDOWS) == 0:
            rows.append({"pair": done, "ms": 1e3 * statistics.median(times)} | state(path, device))
            times = []
            print(json.dumps(rows[-1]), flush=True)
    functions = sum(mine is not theirs and mine != theirs for mine, theirs in zip(replaced(), before))
    return {"pairs": done, "windows": rows, "left": {"hooks": hooks(model) - own, "functions": functions}}


def judged(found: dict) -> dict[str, tuple[bool, str]]:
    """Each check: whether it holds, and its numbers."""
    checks: dict[str, tuple[bool, str]] = {}

    def check(name: str, holds: bool, text: str) -> None:
        checks[name] = bool(holds), text

    for part, what in (("training", "long_run"), ("instrument and restore", "pairs")):
        left = found[what]["left"]
        check(f"{part}: left behind", not any(left.values()), ", ".join(f"{k} {v}" for k, v in left.items()))
        rows = found[what]["windows"][2:]
        if len(rows) < 2:
            check(f"{part}: windows", False, f"{len(rows)} windows after the warm-up; give more --seconds")
            continue
        first, last = rows[0], rows[-1]
        for name, unit, most in (
            ("mb", "MB", GROWTH),
            ("objects", "objects", OBJECTS),
            ("card_bytes", "bytes", 0),
        ):
            grown = last[name] - first[name]
            check(
                f"{part}: {unit}",
                grown <= most,
                f"{first[name]:,.0f} -> {last[name]:,.0f}, at most +{most:g}",
            )
        ratio = last["ms"] / first["ms"]
        check(
            f"{part}: time", ratio <= SLOWER, f"{first['ms']:.2f} -> {last['ms']:.2f} ms, at most x{SLOWER}"
        )
    run = found["long_run"]
    rows = run["windows"]
    if len(rows) >= 4:
        half, last = rows[len(rows) // 2 - 1], rows[-1]
        early = half["file_bytes"] / half["log_steps"]
        late = (last["file_bytes"] - half["file_bytes"]) / (last["log_steps"] - half["log_steps"])
        text = f"{early:,.0f} bytes a log step in the first half, {late:,.0f} in the second"
        check("training: file", late <= early * (1 + BYTES), text)
    check(
        "training: log steps",
        run["log_steps_in_file"] == run["log_steps_expected"],
        f"{run['log_steps_in_file']} of {run['log_steps_expected']} in the file",
    )
    check("training: status", run["status"] == "all parts work", run["status"])
    return checks


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda")
    )
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--pairs", type=int, default=10_000)
    parser.add_argument(
        "--seconds", type=float, default=900.0, help="of both parts together; 4/5 for the training"
    )
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    if options.device == "cpu":
        torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.db"
        run = long_run(options.device, options.steps, 0.8 * options.seconds, path)
        found = {"machine": machine(), "device": options.device, "long_run": run}
        found["pairs"] = pairs(options.device, options.pairs, 0.2 * options.seconds, path)
    checks = judged(found)
    found["checks"] = {name: {"holds": holds, "numbers": text} for name, (holds, text) in checks.items()}
    if options.out is not None:
        options.out.write_text(json.dumps(found, indent=1) + "\n")
    print(f"\n{run['steps']:,} monitored steps, {found['pairs']['pairs']:,} times instrumented and restored")
    for name, (holds, text) in checks.items():
        print(f"{'ok    ' if holds else 'FAILED'}  {name:32}  {text}")
    return 0 if all(holds for holds, _ in checks.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
