"""Inject faults into small models and count how often a trace names layer, heads and cause.

    python -m bench.validation.triage_causes [--places 3] [--only WORDS] [--device cuda] [--out FILE.json]

Every fault is put into several places (layer, head). Every miss is printed. Exit code 1 below 95% right.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from pathlib import Path

import torch

from hnf_attention.diagnosis.triage import NonFiniteTrace
from hnf_attention.replay import trace_non_finite

from .triage_faults import FAULTS, Expected
from .triage_models import HEADS, LAYERS

TARGET = 0.95


def places(count: int) -> list[tuple[int, int]]:
    """(layer, head), spread over both."""
    return [(number % LAYERS, (3 * number + 1) % HEADS) for number in range(count)]


def judge(name: str, layer: int, head: int, folder: Path | None = None) -> dict:
    """Trace one injected fault."""
    made, expected = FAULTS[name](layer, head)
    start = time.perf_counter()
    try:
        trace = trace_non_finite(
            made.model, made.run, made.loss, optimizer=made.optimizer, scaler=made.scaler, folder=folder
        )
    except Exception as error:  # a miss, too: the other faults are still tried
        trace = NonFiniteTrace(None, evidence=f"{type(error).__name__}: {error}")
    right = right_parts(trace, expected)
    return {
        "fault": name,
        "place": [layer, head],
        "seconds": round(time.perf_counter() - start, 3),
        **right,
        "right": all(right.values()),
        "expected": [expected.cause, expected.layer, list(expected.heads)],
        "found": [trace.cause, trace.layer, list(trace.heads)],
        "evidence": trace.evidence,
        "wide": str(trace.wide),
    }


def right_parts(trace, expected: Expected) -> dict[str, bool]:
    return {
        "cause": trace.cause == expected.cause,
        "layer": expected.layer in ("any", trace.layer),
        "heads": tuple(trace.heads) == expected.heads,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--places", type=int, default=3)
    parser.add_argument("--only", default="")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    logging.getLogger("hnf_attention").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    torch.set_default_device(options.device)
    rows = []
    for name in FAULTS:
        if options.only not in name:
            continue
        found = [judge(name, *place) for place in places(options.places)]
        rows += found
        print(f"{sum(x['right'] for x in found)}/{len(found)}  {name}", flush=True)
        for miss in (x for x in found if not x["right"]):
            print(
                f"      at {miss['place']}: expected {miss['expected']}, got {miss['found']}: {miss['evidence']}"
            )
    share = {part: sum(x[part] for x in rows) / len(rows) for part in ("right", "cause", "layer", "heads")}
    kinds = len({x["fault"] for x in rows})
    print(f"{kinds} faults in {len(rows)} places: " + ", ".join(f"{k} {v:.1%}" for k, v in share.items()))
    if options.out:
        document = {"torch": torch.__version__, "device": options.device, "share": share, "rows": rows}
        options.out.write_text(json.dumps(document, indent=1) + "\n")
    return 0 if share["right"] >= TARGET else 1


if __name__ == "__main__":
    sys.exit(main())
