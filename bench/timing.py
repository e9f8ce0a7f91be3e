"""The device's own clock and the peak of its memory; on a CPU, the host's clock and no memory."""

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

_start = None


def cuda_clock() -> float:
    """Seconds on the device's own clock, at the end of the work queued so far: for pytest-benchmark."""
    global _start
    if _start is None:
        _start = torch.cuda.Event(enable_timing=True)
        _start.record()
    now = torch.cuda.Event(enable_timing=True)
    now.record()
    now.synchronize()
    return _start.elapsed_time(now) / 1e3


class Spent(NamedTuple):
    """The cost of one action.

    device, host: seconds until the device was done, by either clock.
    peak, before: bytes allocated at most, and before the action; None without CUDA.
    """

    result: Any
    device: float
    host: float
    peak: int | None
    before: int | None


def spent(action: Callable[[], Any]) -> Spent:
    """Run one action on an idle device and measure it. The peak includes what was allocated before."""
    if not torch.cuda.is_available():
        begin = time.perf_counter()
        result = action()
        seconds = time.perf_counter() - begin
        return Spent(result, seconds, seconds, None, None)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    begin = time.perf_counter()
    start.record()
    result = action()
    end.record()
    end.synchronize()
    host = time.perf_counter() - begin
    return Spent(result, start.elapsed_time(end) / 1e3, host, torch.cuda.max_memory_allocated(), before)


def repeat(action: Callable[[], Any], times: int) -> None:
    for _ in range(times):
        action()


def timed(step: Callable[[], Any], steps: int) -> dict[str, Any]:
    """Milliseconds per step, over `steps` in a row, and the peak of their memory."""
    time = spent(lambda: repeat(step, steps))
    return {"ms": time.device / steps * 1e3, "host_ms": time.host / steps * 1e3, "peak_bytes": time.peak}


def matmul_tflops(size: int = 8192) -> float | None:
    """The ceiling that attention is compared with: TFLOP/s of one bf16 product of 2 * size ** 3 operations.

    The numbers are random, because the card clocks higher on zeros. None without CUDA.
    """
    if not torch.cuda.is_available():
        return None
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)

    def ten():
        for _ in range(10):
            torch.matmul(a, b, out=out)

    ten()
    return 10 * 2 * size**3 / statistics.median(spent(ten).device for _ in range(9)) / 1e12
