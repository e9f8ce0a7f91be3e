"""The Hopper forward under Triton's concurrency sanitizer, on the GPU at hand.

    python bench/consan.py [--head-dims 64] [--limit 900] [--fast-assembly]

Triton instruments every access to shared memory of a kernel that is compiled with TRITON_INSTRUMENTATION_MODE=consan
(3.6 and later): a read of a buffer that a copy still writes, or a write to one that a product still reads, stops the
kernel with an assertion. Each case runs in a process of its own, because such a stop ends CUDA in that process. The
control reads a buffer without waiting for its copy, and must be stopped. The instrumented kernel compiles for minutes;
--fast-assembly compiles without ptxas's optimisations. FpSan, which 3.8 added, compares two forms of one computation
by their integer payloads. It is left out: the Hopper forward is used with 3.6 and 3.7.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

root = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(root), str(root / "bench")]

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from hnf_attention.engine import engines
from hnf_attention.engine.call import check
from hnf_attention.engine.card import card_of
from hnf_attention.kernels.hopper.names import copy_in

# More blocks of queries than programs, a ragged end, and keys of a single tile.
LENGTHS = ((2, 40, 1000), (1, 2, 100))
DEFAULTS = dict.fromkeys(("attn_mask", "scale", "window_size", "softcap", "sinks"))


@gluon.jit
def _reads_too_early(x_desc, out_ptr, LAYOUT: gl.constexpr):
    buffer = gl.allocate_shared_memory(x_desc.dtype, x_desc.block_type.shape, x_desc.layout)
    ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(ready, count=1)
    mbarrier.expect(ready, x_desc.block_type.nbytes)
    copy_in(x_desc, [0, 0], ready, buffer)
    x = buffer.load(LAYOUT)
    rows = gl.arange(0, 64, gl.SliceLayout(1, LAYOUT))[:, None]
    columns = gl.arange(0, 64, gl.SliceLayout(0, LAYOUT))[None, :]
    gl.store(out_ptr + rows * 64 + columns, x)
    mbarrier.wait(ready, 0)


def control() -> None:
    """A kernel with a race."""
    x = torch.ones(64, 64, device="cuda", dtype=torch.bfloat16)
    layout = gl.NVMMASharedLayout.get_default_for([64, 64], gl.bfloat16)
    registers = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    described = TensorDescriptor.from_tensor(x, [64, 64], layout)
    _reads_too_early[(1,)](described, torch.empty_like(x), registers, num_warps=4)
    torch.cuda.synchronize()


def forward(head_dim: int, is_causal: bool) -> None:
    """The Hopper forward of a few shapes, and whether its numbers are finite."""
    for batch, heads, length in LENGTHS:
        q, k, v = (
            torch.randn(batch, heads, length, head_dim, device="cuda", dtype=torch.bfloat16) for _ in range(3)
        )
        options = check(q, k, v, is_causal=is_causal, **DEFAULTS)
        results = engines.kernel("hopper.host").forward(q, k, v, options)[:5]
        torch.cuda.synchronize()
        assert all(x.isfinite().all() for x in results)


def run_case(name: str) -> None:
    # The sanitizer keeps what it knows of the buffers in global memory.
    triton.set_allocator(lambda size, alignment, stream: torch.empty(size, device="cuda", dtype=torch.int8))
    if name == "control":
        control()
        return
    head_dim, mask = name.split()
    forward(int(head_dim), mask == "causal")


def outcome(name: str, limit: float, fast_assembly: bool) -> tuple[str, str]:
    """("clean", "stopped", "failed" or "too slow", the line that says why) of one case in its own process."""
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | {"TRITON_INSTRUMENTATION_MODE": "consan", "TRITON_CACHE_DIR": cache}
        if fast_assembly:
            environment["DISABLE_PTXAS_OPT"] = "1"
        command = [sys.executable, __file__, "--case", name]
        try:
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=limit)
        except subprocess.TimeoutExpired:
            return "too slow", f"more than {limit:.0f} s"
    if done.returncode == 0:
        return "clean", ""
    lines = (done.stdout + done.stderr).strip().splitlines() or [""]
    said = [line for line in lines if "Assertion" in line or "assert" in line]
    return ("stopped", said[0]) if said else ("failed", lines[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--head-dims", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--limit", type=float, default=900, help="seconds for one case")
    parser.add_argument("--fast-assembly", action="store_true")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        run_case(options.case)
        return
    reason = engines.hopper_runs_on(card_of(torch.device("cuda", torch.cuda.current_device())))
    if reason is not None:
        sys.exit(f"the Hopper forward does not run here: {reason}")
    cases = [f"{head_dim} {mask}" for head_dim in options.head_dims for mask in ("causal", "full")]
    passed = True
    for name in ("control", *cases):
        found, why = outcome(name, options.limit, options.fast_assembly)
        wanted = "stopped" if name == "control" else "clean"
        passed &= found == wanted
        print(f"{name:12} {found:9} {'as it must' if found == wanted else 'WRONG'}  {why}", flush=True)
    sys.exit(not passed)


if __name__ == "__main__":
    main()
