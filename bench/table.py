"""Markdown table of a benchmark file: python bench/table.py bench/results/forward_h200.json"""

import json
import sys
from pathlib import Path


def main(path: str) -> None:
    document = json.loads(Path(path).read_text())
    groups: dict[str, dict[str, dict]] = {}
    for benchmark in document["benchmarks"]:
        groups.setdefault(benchmark["group"], {})[benchmark["params"]["peer"]] = benchmark
    info = document["machine_info"]
    print(f"{info['device']}, bf16, torch {info['torch']}, Triton {info['triton']}, cuDNN {info['cudnn']}\n")
    print("| case | SDPA default | SDPA flash (FA2) | ours, with statistics | of SDPA default | of FA2 |")
    print("|---|---|---|---|---|---|")
    for group, peers in groups.items():
        default, flash, ours = (
            peers[name]["stats"]["median"] for name in ("sdpa default", "sdpa flash", "ours")
        )
        rate = peers["ours"]["extra_info"]["flop"] / ours / 1e12
        print(
            f"| {group} | {default * 1e3:.3f} ms | {flash * 1e3:.3f} ms | {ours * 1e3:.3f} ms "
            f"({rate:.0f} TFLOP/s) | {ours / default:.2f}x | {ours / flash:.2f}x |"
        )


if __name__ == "__main__":
    main(sys.argv[1])
