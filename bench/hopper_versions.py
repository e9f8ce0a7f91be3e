"""The sm_90 forward of several checkouts beside cuDNN's, in one run and in shuffled order.

    git archive OLD kernels | tar x -C /some/folder
    python bench/hopper_versions.py now=kernels old=/some/folder/kernels --out bench/results/NAME.json

bf16, B * N = 16k tokens, model width 2048: causal and full, causal windows and packs (which cuDNN does not compute),
and causal calls all of whose scores are negative.
Each number is the median of 25 timings of two launches. Outputs and row statistics must agree.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import random
import statistics
import sys
import types
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import torch
from hopper_intervals import EVEN, RAGGED, drawn, error, options_of
from machine import machine
from suite import HEADS, TOKENS
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

LENGTHS, ROUNDS = (1024, 2048, 4096, 8192, 16384), 25
WINDOWS = ((8192, 1024), (8192, 4096))  # length, window
LARGEST_ERROR = 5e-3  # of the output, relative to the first call's: both round to bf16
LARGEST_ROW_ERROR = 1e-4  # of the row statistics
NEGATIVE = "negative scores"  # in a case's name: all of them are


def cases():
    """(name, length, keywords of a call)."""
    for is_causal in (True, False):
        for length in LENGTHS:
            yield f"N={length} {'causal' if is_causal else 'full'}", length, {"is_causal": is_causal}
    yield f"N={LENGTHS[-1]} causal, {NEGATIVE}", LENGTHS[-1], {"is_causal": True}
    for length, window in WINDOWS:
        yield f"N={length} window {window}", length, {"is_causal": True, "window_size": window}
    for name, edges in (("8 x 2k", EVEN), ("ragged", RAGGED)):
        seqlens = torch.tensor(edges, dtype=torch.int32, device="cuda")
        yield f"pack of {name}", TOKENS, {"is_causal": True, "seqlens": seqlens}


def forward_of(name: str, folder: str):
    """The function `hopper.host.forward` of a folder of kernels."""
    package = types.ModuleType(f"kernels_{name}")
    package.__path__ = [str(Path(folder).resolve())]
    sys.modules[package.__name__] = package
    return importlib.import_module(f"{package.__name__}.hopper.host").forward


def cudnn(q, k, v, is_causal):
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return scaled_dot_product_attention(q, k, v, is_causal=is_causal)


def milliseconds(call) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    call()
    begin.record()
    call()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 2


def compare(name: str, head_dim: int, length: int, given: dict, forwards: dict) -> dict[str, float]:
    """Median times in ms."""
    q, k, v = drawn(TOKENS // length, HEADS[head_dim], length, head_dim)
    if NEGATIVE in name:
        q, k = q.abs(), -k.abs()
    options = options_of(q, k, v, **given)
    calls = {version: functools.partial(forward, q, k, v, options) for version, forward in forwards.items()}
    wanted = next(iter(calls.values()))()[:5]
    for version, call in calls.items():
        out, *rows = (error(*pair) for pair in zip(call()[:5], wanted))
        if not (out < LARGEST_ERROR and max(rows) < LARGEST_ROW_ERROR):
            raise SystemExit(f"{version} at {name}: off by {out:.1e}, {max(rows):.1e}")
    if given.keys() == {"is_causal"}:
        calls["cudnn"] = functools.partial(cudnn, q, k, v, given["is_causal"])
        if not error(calls["cudnn"](), wanted[0]) < LARGEST_ERROR:
            raise SystemExit(f"at {name} cuDNN gives another output")
    times = {version: [] for version in calls}
    for _ in range(ROUNDS):
        for version in random.sample(list(calls), len(calls)):
            times[version].append(milliseconds(calls[version]))
    return {version: statistics.median(found) for version, found in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("versions", nargs="+", metavar="NAME=KERNELS")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    forwards = {
        name: forward_of(name, folder) for name, _, folder in (x.partition("=") for x in given.versions)
    }
    random.seed(0)
    document = {"machine": machine(), "cases": []}
    for head_dim in (128, 64):
        for name, length, keywords in cases():
            found = compare(name, head_dim, length, keywords, forwards)
            label = f"D={head_dim} {name}"
            document["cases"].append({"case": label, "tokens": TOKENS, "ms": found})
            base = "cudnn" if "cudnn" in found else list(forwards)[-1]
            ratios = (f"{version} {ms / found[base]:.3f}" for version, ms in found.items())
            print(f"{label:26} {base} {found[base]:.3f} ms, of that:", *ratios, flush=True)
            if given.out is not None:
                given.out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
