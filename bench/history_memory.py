"""The memory of a monitor's history over many log steps of a large model: `python bench/history_memory.py [STEPS]`.

The model has 80 layers of 64 heads. Each log step adds a snapshot with numbers of its own, as a run does. Every 10,000
steps, or ten times in a shorter run, one line gives the bytes that the history counts and the memory of the process.
The script fails if the history exceeds its limit, or if the memory of the process grows after the first line.
No card is needed.
"""

import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

import numpy as np

from hnf_attention.monitoring.history import History
from hnf_attention.statistics.fields import NUM_FIELDS
from hnf_attention.statistics.heads import HeadStats, Snapshot

LAYERS, HEADS, HEAD_DIM = 80, 64, 128
STEPS, LINES = 100_000, 10_000
GROWTH = 32  # MB that the process may add after the first line: the allocator's and Python's own


def resident() -> float:
    """Memory of this process now, MB."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith("VmRSS")) / 1024


def snapshot(step: int, numbers: np.ndarray) -> Snapshot:
    """A snapshot with an array of its own: the numbers (NUM_FIELDS, heads of all layers) times a factor."""
    parts = np.split(numbers * (1.0 + step % 100), LAYERS, axis=1)
    return Snapshot(
        step, {f"layers.{i}": HeadStats(part, HEAD_DIM, "bfloat16") for i, part in enumerate(parts)}
    )


def main(steps: int = STEPS) -> None:
    # Positive numbers in every field: a history looks at no more than their sizes and extremes.
    numbers = np.random.default_rng(0).random((NUM_FIELDS, LAYERS * HEADS))
    history, memory = History(), []
    began = time.perf_counter()
    for step in range(1, steps + 1):
        history.append(snapshot(step, numbers))
        assert history.bytes <= history.limit
        if step % min(LINES, max(1, steps // 10)) == 0:
            memory.append(resident())
            print(
                f"step {step}: {history!r}; process {memory[-1]:.0f} MB; {time.perf_counter() - began:.0f} s",
                flush=True,
            )
    assert memory[-1] - memory[0] < GROWTH, memory


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
