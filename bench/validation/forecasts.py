"""Forecasts of saturation over recorded runs: how often the interval holds what happened, by cadence.

    python -m bench.validation.forecasts RECORDS... [--cadences 1 10 100] [--split held-out] [--out FILE]

RECORDS: archives of records, or folders of them. Judged is each head of an alarm at each reading before its scores pass
`alarm_logit`: the steps until a reading of the run's own cadence shows them above it. A head that has not passed by the
end of its run is left out if the interval ends later, and counts as a miss otherwise.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from hnf_attention.diagnosis.heads import concatenate_heads
from hnf_attention.diagnosis.thresholds import threshold
from hnf_attention.diagnosis.trends import score_size
from hnf_attention.statistics.heads import Snapshot

from .metrics import Share
from .recipes import SPLITS
from .record import Record, read


class Case(NamedTuple):
    """One forecast. wait: the steps that it took, inf for never. left: the steps that the run had left."""

    run: str
    steps: float
    low: float
    high: float
    wait: float
    left: int

    @property
    def known(self) -> bool:
        return np.isfinite(self.wait) or self.left >= self.high

    @property
    def held(self) -> bool:
        return self.low <= self.wait <= self.high


def cases(record: Record, every: int | None) -> Iterator[Case]:
    """The forecasts of one run, as a monitor at that cadence would have given them; None: the run's own."""
    own = list(record.history())
    sizes = np.stack([_sizes(snapshot) for snapshot in own])
    above = sizes >= threshold("alarm_logit")
    steps = np.array([snapshot.step for snapshot in own], dtype=np.float64)
    passed = np.where(above.any(0), steps[above.argmax(0)], np.inf)
    history: list[Snapshot] = []
    for snapshot in record.history(every):
        history.append(snapshot)
        starts = dict(zip(snapshot.layers, np.cumsum([0, *(x.num_heads for x in snapshot.layers.values())])))
        for heads in concatenate_heads(history, snapshot.layers):
            coming = heads.saturation
            for head in np.flatnonzero(heads.alarming & np.isfinite(coming.steps)).tolist():
                layer, number = heads.places[head]
                wait = passed[starts[layer] + number] - snapshot.step
                if wait > 0:
                    numbers = (float(x[head]) for x in coming)
                    yield Case(record.recipe.name, *numbers, float(wait), len(record.losses) - snapshot.step)


def _sizes(snapshot: Snapshot) -> np.ndarray:
    return np.concatenate([score_size(stats) for stats in snapshot.layers.values()])


def row(found: Sequence[Case]) -> dict[str, float]:
    """Coverage over forecasts, the mean over runs of each run's coverage, and where the misses lie."""
    known = [case for case in found if case.known]
    runs: dict[str, list[bool]] = {}
    for case in known:
        runs.setdefault(case.run, []).append(case.held)
    held = Share(sum(case.held for case in known), len(known))
    waits = np.array([case.wait / case.steps for case in known])
    return {
        "forecasts": len(known),
        "left out": len(found) - len(known),
        "runs": len(runs),
        "coverage": held.value,
        "coverage, mean of runs": float(np.mean([np.mean(x) for x in runs.values()])) if runs else np.nan,
        "sooner": float(np.mean([case.wait < case.low for case in known])) if known else np.nan,
        "later": float(np.mean([case.wait > case.high for case in known])) if known else np.nan,
        "median wait / forecast": float(np.median(waits)) if known else np.nan,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("records", type=Path, nargs="+")
    parser.add_argument("--cadences", type=int, nargs="+", default=[10, 100])
    parser.add_argument("--split", choices=SPLITS)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    found: dict[int, list[Case]] = {every: [] for every in given.cadences}
    for record in read(given.records):
        if record.recipe.kind != "sweep" or given.split not in (None, record.recipe.split):
            continue
        for every in given.cadences:
            if every % record.recipe.log_every == 0:
                found[every] += cases(record, every)
    table = {every: row(of) for every, of in found.items()}
    for every, numbers in table.items():
        said = ", ".join(f"{name} {value:.3g}" for name, value in numbers.items())
        print(f"log_every {every}: {said}", flush=True)
    if given.out:
        given.out.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
