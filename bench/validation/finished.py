"""The diagnosis of models at the end of their training, from one reading alone, as `hnf-attention analyze` has it.

    python -m bench.validation.finished RECORDS.zip [MORE.zip ...]

Ordinary runs have no twin and count as clean: their recipes were chosen for that.
"""

from __future__ import annotations

import argparse
from collections import Counter
from dataclasses import replace
from pathlib import Path

from hnf_attention.diagnosis import diagnose

from .harm import CLEAN, HARMED, harm
from .record import Record, read


def state(record: Record) -> str | None:
    """What became of the run: "harmed" or "clean", None for neither and for a twin that is missing."""
    if record.recipe.name.startswith("ordinary"):
        return "clean"
    lost = harm(record) if len(record.twin_losses) else float("nan")
    return "harmed" if lost >= HARMED else "clean" if lost < CLEAN else None


def severities(record: Record) -> set[str]:
    """The severities of the issues that the last reading gives."""
    (last,) = list(record.history())[-1:]
    return {issue.severity for issue in diagnose([replace(last, training=False)]).issues}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("records", nargs="+", type=Path)
    for path in parser.parse_args().records:
        count: Counter[tuple[str, str]] = Counter()
        for record in read([path]):
            if (kind := state(record)) is None:
                continue
            found = severities(record)
            count[kind, "models"] += 1
            count[kind, "with a warning"] += bool(found & {"warning", "error"})
            count[kind, "with an error"] += "error" in found
        for (kind, what), number in count.items():
            print(f"{path.name}: {number} {kind} {what}")


if __name__ == "__main__":
    main()
