"""The device's own clock, for pytest-benchmark."""

import torch

_start = None


def cuda_clock() -> float:
    """Seconds on the device's own clock, at the end of the work queued so far."""
    global _start
    if _start is None:
        _start = torch.cuda.Event(enable_timing=True)
        _start.record()
    now = torch.cuda.Event(enable_timing=True)
    now.record()
    now.synchronize()
    return _start.elapsed_time(now) / 1e3
