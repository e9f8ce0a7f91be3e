"""Designs that `check` calls unstable, trained as they are and at the largest rate that it expects to stay clean.

    python -m bench.validation.advised OUT.json [--ensembles 8] [--designs 24] [--seconds 600]
    python -m bench.validation.advised OUT.json --small            # on a CPU, in minutes

A run is clean if it ends less than 0.05 nat above the same run with QK-norm, as in `harm`. Designs are drawn from seeds
of their own: nothing was fitted to them.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hnf_attention import check_attention_stability

from . import runs
from .harm import CLEAN, HARMED, final, harm
from .metrics import share
from .recipes import Recipe

SMALL = {"width": 64, "depth": 2, "heads": 2, "kv_heads": 2, "context": 64, "batch": 8, "steps": 200}
LARGE = {"width": 128, "depth": 4, "heads": 4, "kv_heads": 4, "context": 128, "batch": 16, "steps": 500}


def designs(seed: int, count: int, shape: dict[str, int]) -> Iterator[tuple[Recipe, Recipe]]:
    """Unstable designs, each with what the check advises."""
    draw = np.random.default_rng([17, 5, seed])
    shared = shape | {"positions": str(draw.choice(["learned", "rope"])), "norm": "layer"}
    found = 0
    while found < count:
        recipe = Recipe(
            f"advised-{seed:02d}-{found:02d}",
            int(draw.integers(2**31)),
            **shared,
            sharpness=float(draw.choice([1.0, 2.0, 4.0, 8.0])),
            init=float(draw.choice([0.5, 1.0, 2.0])),
            rate=float(np.exp(draw.uniform(np.log(2e-3), np.log(4e-2)))),
            warmup=int(draw.choice([20, 100, 200])),
            clip=float(draw.choice([0.0, 1.0])),
        )
        said = check_attention_stability(
            config=recipe.design(), learning_rate=recipe.rate, warmup=recipe.warmup
        )
        if said["verdict"] == "unstable" and said["largest_clean_rate"]:
            found += 1
            advised = replace(recipe, name=f"{recipe.name}-advised", rate=said["largest_clean_rate"])
            yield recipe, advised


def judged(
    seed: int, count: int, shape: dict[str, int], device: str, deadline: float
) -> list[dict[str, Any]]:
    """One ensemble: its designs, as they are and as advised, with their twins."""
    pairs = list(designs(seed, count, shape))
    records = runs.train([recipe for pair in pairs for recipe in pair], device, deadline)
    of = {record.recipe.name: record for record in records}
    rows = []
    for recipe, advised in pairs:
        own, better = of[recipe.name], of[advised.name]
        rows.append(
            {
                "recipe": recipe.to_dict(),
                "advised rate": advised.rate,
                "harm": _number(harm(own)),
                "harm as advised": _number(harm(better)),
                "final": _number(final(own.losses)),
                "final as advised": _number(final(better.losses)),
            }
        )
    return rows


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def table(rows: list[dict[str, Any]]) -> list[str]:
    """How many designs were harmed as they are, and how many end clean as advised. None stands for not finite."""
    harmed = [row["harm"] is None or row["harm"] >= HARMED for row in rows]
    clean = [row["harm as advised"] is not None and row["harm as advised"] < CLEAN for row in rows]
    both = [c for c, h in zip(clean, harmed) if h]
    lower = [(row["final as advised"] or np.inf) < (row["final"] or np.inf) for row in rows]
    return [
        f"{len(rows)} designs that the check calls unstable: harmed as they are {share(harmed)}",
        f"clean as advised {share(clean)}; of those that were harmed {share(both)}",
        f"as advised they end lower {share(lower)}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--ensembles", type=int, default=8)
    parser.add_argument("--designs", type=int, default=24)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--small", action="store_true")
    given = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() and not given.small else "cpu"
    shape = SMALL if given.small else LARGE
    numbers = (2, 4) if given.small else (given.ensembles, given.designs)
    deadline, rows = time.monotonic() + given.seconds, []
    for seed in range(numbers[0]):
        try:
            rows += judged(seed, numbers[1], shape, device, deadline)
        except runs.OutOfTime:
            break
        given.out.write_text(json.dumps(rows, indent=1) + "\n")
        print("\n".join(table(rows)), flush=True)


if __name__ == "__main__":
    main()
