"""The compiler is stricter than Triton's interpreter: kernels are compiled for a card also where there is none."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

KERNELS = """_beside_kernel _bounds_kernel _columns_kernel _forward_kernel _huge_rows_kernel _join_kernel
_largest_rows_kernel _longest_kernel _mask_kernel _mask_rows_kernel _places_kernel _prepare_rows_kernel _probe_kernel
_rows_asked_kernel _scaled_kernel _scan_mask_kernel _settle_kernel _size_bounds_kernel dkv_kernel dq_kernel
extremes_kernel fold_kernel hopper_kernel single_extremes_kernel"""


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="every other test compiles them here")
def test_the_kernels_compile_for_sm_90(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    script = Path(__file__).with_name("compile_kernels.py")
    done = subprocess.run(
        [sys.executable, "-W", "error", script], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == KERNELS.split()
