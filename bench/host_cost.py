"""The host's time for one attention call: PyTorch's own, one that is not measured, and one that is measured and folded.

    python bench/host_cost.py [OUT.json]

Microseconds of Python per call, with nothing queued before it. A step pays this where the host is slower than
the device. Calls require gradients, as in training. On a CUDA card everything is real. Without one, PyTorch's
attention and our kernels are replaced by stubs, and the time is that of our own Python.
"""

import json
import sys
import time
from functools import partial
from pathlib import Path
from statistics import median

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import torch
from machine import machine
from torch import nn
from torch.nn import functional

from hnf_attention import attention, instrument
from hnf_attention.engine import api, engines, fold
from hnf_attention.engine.call import check
from hnf_attention.monitoring.recorder import Recorder

CUDA = torch.cuda.is_available()
CALLS, ROUNDS = 50, 60
SHAPE = (1, 12, 128, 64) if CUDA else (1, 12, 8, 64)
# Microseconds over a plain call that a step may cost if it is not measured, and if it is recorded.
TARGETS = {"not measured": 2.0, "fused and folded": 40.0}


class Plain(nn.Module):
    original = staticmethod(functional.scaled_dot_product_attention)  # before anything is instrumented

    def forward(self, q, k, v):
        return self.original(q, k, v, is_causal=True)


class Attention(nn.Module):
    """An instrumented module: its attention is intercepted, and measured while its handle says so."""

    def __init__(self, mode: str):
        super().__init__()
        self.handle = [instrument(self, mode=mode)]  # in a list: neither a submodule nor part of the state
        self.recorder = Recorder(self.handle[0], log_every=1_000_000, record_every=1)

    def forward(self, q, k, v):
        return functional.scaled_dot_product_attention(q, k, v, is_causal=True)


def without_arithmetic() -> None:
    """Replace the work of the device by results that exist already."""
    out = torch.zeros(SHAPE, dtype=torch.bfloat16)
    rows = [torch.zeros(SHAPE[:3]) for _ in range(4)]
    # autograd's Function needs new tensors at each call, and detaching is the cheapest way to one.
    engines.forward = lambda _: (out.detach(), *(row.detach() for row in rows), None)
    fold.fold = lambda *_: None
    functional.scaled_dot_product_attention = lambda *_, **__: out.detach()
    Plain.original = staticmethod(functional.scaled_dot_product_attention)


def per_call(actions: dict) -> dict[str, float]:
    """Median microseconds of each (prepare, action, finish). They take turns, so that all see the same machine."""
    times = {name: [] for name in actions}
    for _ in range(ROUNDS):
        for name, (prepare, action, finish) in actions.items():
            prepare()
            if CUDA:
                torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(CALLS):
                action()
            times[name].append((time.perf_counter() - start) / CALLS * 1e6)
            finish()
    return {name: median(values) for name, values in times.items()}


def measured(module: Attention, *inputs: torch.Tensor) -> tuple:
    """The module's call, measured only while it is timed."""
    switch = partial(setattr, module.handle[0], "measuring")
    return partial(switch, True), partial(module, *inputs), partial(switch, False)


def unchanged(action) -> tuple:
    return (lambda: None), action, (lambda: None)


def main() -> None:
    if not CUDA:
        without_arithmetic()
        torch.set_num_threads(1)
    device = "cuda" if CUDA else "cpu"
    q, k, v = (torch.randn(SHAPE, device=device, dtype=torch.bfloat16, requires_grad=True) for _ in "qkv")
    options = check(
        q, k, v, attn_mask=None, is_causal=True, scale=None, window_size=None, softcap=None, sinks=None
    )
    rows = api.attend(q, k, v, options, detached=True)[1]
    accumulator = fold.new_accumulator(SHAPE[1], q.device)
    idle, fused, probed = (Attention(mode) for mode in ("auto", "fused", "probe"))
    idle.handle[0].measuring = fused.handle[0].measuring = probed.handle[0].measuring = False
    calls = per_call(
        {
            "SDPA": unchanged(partial(Plain(), q, k, v)),
            "not measured": unchanged(partial(idle, q, k, v)),
            "fused and folded": measured(fused, q, k, v),
            "probed and folded": measured(probed, q, k, v),
        }
    )
    parts = per_call(
        {
            "attention()": unchanged(partial(attention, q, k, v, is_causal=True)),
            "forward": unchanged(partial(api.attend, q, k, v, options, detached=True)),
            "fold": unchanged(partial(fold.fold, accumulator, q, k, rows, options)),
            "validation": unchanged(partial(check, q, k, v, **options._asdict() | {"scale": None})),
        }
    )
    cotangent = torch.ones(SHAPE, device=device, dtype=torch.bfloat16)

    def trained(module: nn.Module):
        return lambda *inputs: torch.autograd.grad(module(*inputs), inputs, cotangent)

    trainings = {"SDPA, trained": unchanged(partial(trained(Plain()), q, k, v))}
    for name, module in (("fused", fused), ("probed", probed)):
        switch, _, off = measured(module)
        trainings[f"{name}, trained"] = (switch, partial(trained(module), q, k, v), off)
    trained_calls = per_call(trainings) if CUDA else {}
    base = calls["SDPA"]
    print(f"{'call':<20} {'us':>8} {'over SDPA':>10} {'target':>8}")
    for name, us in calls.items():
        print(f"{name:<20} {us:8.2f} {us - base:10.2f} {TARGETS.get(name, ''):>8}")
    for name, us in trained_calls.items():
        print(f"{name:<20} {us:8.2f} {us - trained_calls['SDPA, trained']:10.2f}")
    print(f"\n{'of which':<20}")
    for name, us in parts.items():
        print(f"{name:<20} {us:8.2f}")
    if len(sys.argv) > 1:
        document = {
            "machine": machine(),
            "shape": SHAPE,
            "stubbed": not CUDA,
            "calls": calls | trained_calls,
            "parts": parts,
        }
        Path(sys.argv[1]).write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
