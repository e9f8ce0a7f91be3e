"""What recording adds to a training step that is captured as one CUDA graph, in the device's time.

    python bench/graphed.py OUT.json

GPTs of GPT-2's shape (heads of 64) and of a billion parameters (heads of 128), bf16, one sequence a step. A step is
forward, loss, backward and AdamW. It is captured once plain and once with every forward recorded, and the replays
of the two take turns. The models are the demo's, because transformers adds an attention mask during a capture.
"""

import json
import statistics
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import torch
from machine import machine
from timing import timed
from torch.nn.functional import cross_entropy

from hnf_attention import instrument
from hnf_attention.cli.demo.model import GPT, VOCABULARY
from hnf_attention.monitoring.recorder import Recorder

SHAPES = {"GPT-2": (12, 768, 12), "1B": (16, 2048, 16)}  # layers, width, heads
LENGTHS, ROUNDS, REPLAYS = (1024, 4096, 16384), 15, 5


def captured(step) -> torch.cuda.CUDAGraph:
    """`step()` as a graph. It runs on a side stream first, as a capture requires."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


def compare(shape: tuple[int, int, int], length: int) -> dict:
    torch.manual_seed(0)
    layers, width, heads = shape
    model = GPT(layers, width, heads, length, 1.0).to("cuda", torch.bfloat16)
    tokens = torch.randint(VOCABULARY, (1, length), device="cuda")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True, capturable=True)

    def step():
        cross_entropy(model(tokens).flatten(0, 1).float(), tokens.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()

    plain = captured(step)
    with instrument(model, mode="auto") as instrumentation:
        recorder = Recorder(instrumentation, log_every=10**9, record_every=1)
        recorded = captured(step)
        how = set(instrumentation.coverage.measured.values())
        recorder.read()
        graphs = plain, recorded
        turns = [[timed(graph.replay, REPLAYS)["ms"] for graph in graphs] for _ in range(ROUNDS + 1)][1:]
        rows = {int(layer.rows.sum()) for layer in recorder.read().layers.values()}
    assert rows == {heads * length * REPLAYS * (ROUNDS + 1)}, "the replays were not folded"
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "plain_ms": statistics.median(turn[0] for turn in turns),
        "recorded_ms": statistics.median(turn[1] for turn in turns),
        "overhead": statistics.median(turn[1] / turn[0] for turn in turns) - 1,
        "measured": sorted(how),
    }


def main() -> None:
    out = Path(sys.argv[1])
    document = {"machine": machine(), "graphed": []}
    for name, shape in SHAPES.items():
        for length in LENGTHS:
            found = {"model": name, "tokens": length} | compare(shape, length)
            document["graphed"].append(found)
            print(*found.values(), flush=True)
            out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
