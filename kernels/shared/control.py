"""What the launches in a CUDA graph do at a replay: one int64 on the device says it, which the host sets before.

A replay runs no Python, and its launches keep their arguments. They read this number instead. Its low 31 bits are the
number of the forward, and higher bits say what is wanted of it. Plain Python: `gate` reads it in kernels.
"""

NUMBER = (1 << 31) - 1
EXTREMES = 1 << 32  # the extremes of the calls
STATISTICS = 1 << 33  # their row statistics, folded
EVALUATION = 1 << 34  # the forward is not under grad: its rows have accumulators of their own
