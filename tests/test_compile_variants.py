"""No variant of the portable kernels spills, or takes more shared memory than a card has: read without the card."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton kernels need Linux")

SPILLED = 64  # bytes of a thread, at most
# Shared memory of a program in KiB at most: the CUDA programming guide, table of compute capabilities; of AMD's LDS.
SHARED = {"80": 163, "86": 99, "89": 99, "90": 227, "100": 227, "120": 99, "gfx942": 64}


def check(target: str, folder: Path, *amount: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(folder), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    script = Path(__file__).with_name("compile_variants.py")
    command = [sys.executable, script, target, *amount]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found) >= 10
    allowed = SHARED[target] * 1024
    assert {name: row for name, row in found.items() if row[0] > SPILLED or row[1] > allowed} == {}


@pytest.mark.slow
@pytest.mark.parametrize(
    "target", ["80", *(pytest.param(name, marks=pytest.mark.exhaustive) for name in ("120", "gfx942"))]
)
def test_common_calls_compile_well_where_tiles_are_loaded_by_pointers(target, tmp_path):
    check(target, tmp_path, "few")


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("target", SHARED)
def test_every_variant_compiles_well(target, tmp_path):
    check(target, tmp_path)
