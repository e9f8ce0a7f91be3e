"""The sm_90 forward of several checkouts beside cuDNN's, in one run and in shuffled order.

    git archive OLD kernels | tar x -C /some/folder
    python bench/hopper_versions.py now=kernels old=/some/folder/kernels --out bench/results/NAME.json

bf16, B * N = 16k tokens, model width 2048. Each number is the median of 25 timings of two launches.
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
from machine import machine
from suite import HEADS, TOKENS, Case
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from hnf_attention.engine.call import check

LENGTHS, ROUNDS = (1024, 4096, 8192, 16384), 25
LARGEST_ERROR = 5e-3  # of the output, relative to cuDNN's: both round to bf16


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


def compare(case: Case, forwards: dict) -> dict[str, float]:
    """Median times in ms."""
    q, k, v = case.inputs("cuda")
    options = check(
        q,
        k,
        v,
        attn_mask=None,
        is_causal=case.is_causal,
        scale=None,
        window_size=None,
        softcap=None,
        sinks=None,
    )
    calls = {"cudnn": functools.partial(cudnn, q, k, v, case.is_causal)}
    wanted = calls["cudnn"]().float()
    for name, forward in forwards.items():
        error = (forward(q, k, v, options)[0].float() - wanted).norm() / wanted.norm()
        if not error < LARGEST_ERROR:
            raise SystemExit(f"{name} at {case.label}: the output is off by {error:.1e}")
        calls[name] = functools.partial(forward, q, k, v, options)
    times = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name in random.sample(list(calls), len(calls)):
            times[name].append(milliseconds(calls[name]))
    return {name: statistics.median(found) for name, found in times.items()}


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
        for is_causal in (True, False):
            for length in LENGTHS:
                case = Case(head_dim, HEADS[head_dim], HEADS[head_dim], length, is_causal)
                found = compare(case, forwards)
                document["cases"].append({"case": case.label, "tokens": TOKENS, "ms": found})
                ratios = (f"{name} {ms / found['cudnn']:.3f}" for name, ms in found.items())
                print(f"{case.label:26} cuDNN {found['cudnn']:.3f} ms, of that:", *ratios, flush=True)
                if given.out is not None:
                    given.out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
