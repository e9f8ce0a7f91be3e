"""Compile variants of the portable kernels for one kind of card that is not there, and say what they spill.

    python tests/compile_variants.py TARGET [few]

TARGET: a compute capability without its point, such as 80, or an AMD architecture, such as gfx942. Prints JSON:
variants, each with [spilled bytes of a thread, shared memory in bytes]. Run by tests/test_compile_variants.py in a
process of its own.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

import torch
import triton
from cases import Case
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from hnf_attention.kernels.portable import backward, forward, probe
from hnf_attention.kernels.shared import launch, tiles

LENGTH = 256
FEW = {"causal": {"is_causal": True}}
ALL = FEW | {
    "full": {},
    "window": {"is_causal": True, "window_size": 70},
    "soft-cap": {"is_causal": True, "softcap": 20.0},
    "boolean mask": {"mask": "bool"},
    "additive mask": {"mask": "additive"},
    "packed": {"seqlens": (0, 10, 100, 250), "is_causal": True},
}


class Card(mock.MagicMock):
    """What Triton asks of a driver before it compiles."""

    def get_current_target(self) -> GPUTarget:
        return TARGET

    def get_current_device(self) -> int:
        return 0


class Forgets(dict):
    """What was compiled must not be launched."""

    def __setitem__(self, key, value):
        pass


def usage(compiled) -> list[int]:
    """[spilled bytes of a thread, shared memory in bytes]."""
    if "cubin" not in compiled.asm:
        found = re.search(r"\.private_segment_fixed_size:\s*(\d+)", compiled.asm["amdgcn"])
        return [int(found[1]), compiled.metadata.shared]
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        done = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    return [int(re.search(r"STACK:(\d+)", done.stdout)[1]), compiled.metadata.shared]


def actions(case: Case, dtype: torch.dtype):
    """(name, function that compiles the kernels of that name)."""
    tensors = case.tensors(dtype)
    q, k, v = tensors[:3]
    options = case.options(*tensors)
    out, row = torch.zeros(*q.shape[:3], v.shape[3], dtype=dtype), torch.zeros(q.shape[:3])
    yield "forward", lambda: forward.forward(q, k, v, options)
    yield "backward", lambda: backward.backward(q, k, v, options, out, row, row, out, None, None)
    yield "probe", lambda: probe.probe(q, k, options)
    if not FEW_ONLY:
        yield "extended", lambda: forward.forward(q, k, v, options, extended=True)
        yield (
            "gradient of statistics",
            lambda: backward.backward(q, k, v, options, out, row, row, out, row, row),
        )


def main() -> None:
    found: dict[str, list[int]] = {}
    run, label = JITFunction.run, ""

    def compile_only(kernel, *arguments, grid, warmup, **keywords):
        compiled = run(kernel, *arguments, grid=grid, warmup=True, **keywords)
        found[f"{label}: {kernel.fn.__name__.strip('_')}"] = usage(compiled)
        return compiled

    driver.set_active(Card())
    kind = tiles.Kind(TARGET.backend == "hip", (9, 4) if TARGET.backend == "hip" else divmod(TARGET.arch, 10))
    with (
        mock.patch.object(JITFunction, "run", compile_only),
        mock.patch.object(launch, "_compiled", Forgets()),
        mock.patch.object(tiles, "kind_of", lambda device: kind),
        mock.patch.object(backward, "kind_of", lambda device: kind),
    ):
        dims = (64, 128) if FEW_ONLY else (64, 128, 256)
        for head_dim in dims:
            for name, keywords in (FEW if FEW_ONLY else ALL).items():
                batch = 1 if "seqlens" in keywords else 2
                case = Case(batch, 4, 2, LENGTH, LENGTH, head_dim, head_dim, **keywords)
                for dtype in (torch.bfloat16,) if FEW_ONLY else (torch.bfloat16, torch.float32):
                    for action, function in actions(case, dtype):
                        label = f"{action}, {name}, D={head_dim} {str(dtype).removeprefix('torch.')}"
                        function()
    print(json.dumps(found))


if __name__ == "__main__":
    target, *rest = sys.argv[1:]
    FEW_ONLY = rest == ["few"]
    TARGET = GPUTarget("hip", target, 64) if target.startswith("gfx") else GPUTarget("cuda", int(target), 32)
    main()
