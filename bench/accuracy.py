"""Errors of the Triton kernels and of PyTorch's SDPA against fp64, on the GPU at hand.

    python bench/accuracy.py [OUT.json]

The rule: our error is at most twice SDPA's in the same dtype, plus one rounding. Exit code 1 if not.
"""

import json
import sys
from pathlib import Path

root = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(root), str(root / "tests"), str(root / "bench")]

import torch
from cases import HEAD_DIMS, errors_beside_sdpa
from machine import machine


def main() -> int:
    rows, worst, broken = [], 0.0, 0
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for head_dim in HEAD_DIMS:
            for is_causal in (False, True):
                for name, (ours, theirs) in errors_beside_sdpa(head_dim, dtype, is_causal).items():
                    rows.append([str(dtype), head_dim, is_causal, name, ours, theirs])
                    worst = max(worst, ours / theirs)
                    broken += ours > 2 * theirs + torch.finfo(dtype).eps / 2
    print(f"{len(rows)} comparisons, {broken} beyond the rule; largest ours / SDPA {worst:.2f}")
    columns = ["dtype", "head_dim", "is_causal", "tensor", "ours", "sdpa"]
    document = {"machine": machine(), "seed": 0, "broken": broken, "columns": columns, "rows": rows}
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(json.dumps(document, indent=1) + "\n")
    return int(broken > 0)


if __name__ == "__main__":
    raise SystemExit(main())
