"""Judge recorded runs: the tables of docs/validation.md, for the rules as they are now.

    python -m bench.validation.judge RECORDS... [--check] [--misses] [--set name=number] [--out FILE]
    python -m bench.validation.judge RECORDS... --cadences 1 10 100

RECORDS: archives of records, or folders of them. --set: another value for a threshold of the diagnosis.
--check: judge the check before step 0 as well, which takes a second a run.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path

from . import before
from .baselines import BASELINES
from .harm import CLEAN, HARMED
from .metrics import auroc, median, share
from .recipes import SPLITS
from .record import read
from .replay import TIERS, Verdict, judged

FAILURE = 0.25  # nats of harm that a fix can undo


def table(verdicts: Sequence[Verdict]) -> list[str]:
    """Recall, precision, false alarms and lead, of each tier."""
    harmed = [v for v in verdicts if v.harm >= HARMED]
    clean = [v for v in verdicts if v.harm < CLEAN]
    broken = sum(v.harm != v.harm for v in verdicts)
    lines = [
        f"{len(verdicts)} runs: {len(harmed)} harmed, {len(clean)} clean, {broken} not finite like their twins"
    ]
    for tier in TIERS:
        fired = [v for v in verdicts if v.first[tier] is not None and v.harm == v.harm]
        leads = [lead for v in harmed if (lead := v.lead(tier)) is not None]
        steps = sum(v.last for v in clean)
        lines += [
            f"{tier:8} recall    {share([v.first[tier] is not None for v in harmed])}",
            f"{'':8} precision {share([v.harm >= HARMED for v in fired])}",
            f"{'':8} clean runs that fire {share([v.first[tier] is not None for v in clean])}, "
            f"{1000 * sum(v.alarms[tier] for v in clean) / max(1, steps):.2f} alarms per 1,000 clean steps",
            f"{'':8} lead: median {median(leads):.0f} steps, positive {share([lead > 0 for lead in leads])}",
        ]
    return lines


def baseline_table(verdicts: Sequence[Verdict]) -> list[str]:
    """The same for the simple rules, in short."""
    harmed, clean = [v.harm >= HARMED for v in verdicts], [v for v in verdicts if v.harm < CLEAN]
    alarms: dict[str, Callable[[Verdict], int | None]] = {
        f"diagnosis, {tier}": partial(lambda v, tier: v.first[tier], tier=tier) for tier in TIERS
    }
    alarms |= {name: partial(lambda v, name: v.baselines[name], name=name) for name in BASELINES}
    lines = []
    for name, step in alarms.items():
        found = [v for v in verdicts if v.harm >= HARMED and step(v) is not None]
        leads = [v.onset - step(v) for v in found if v.onset is not None]
        lines.append(
            f"{name:24} recall {len(found) / max(1, sum(harmed)):.2f}, precision "
            f"{share([v.harm >= HARMED for v in verdicts if step(v) is not None and v.harm == v.harm]).value:.2f}, "
            f"clean {share([step(v) is not None for v in clean]).value:.2f}, "
            f"lead {median(leads):.0f}, positive {share([x > 0 for x in leads]).value:.2f}"
        )
    scores = {
        "rate x sharpness": lambda v: v.recipe.rate * v.recipe.sharpness,
        "rate": lambda v: v.recipe.rate,
        "largest score of the run": lambda v: v.largest_score,
        "tier of the diagnosis": lambda v: sum(v.first[tier] is not None for tier in TIERS),
    }
    lines += [f"AUROC of {name}: {auroc(list(map(of, verdicts)), harmed):.3f}" for name, of in scores.items()]
    return lines


def misses(verdicts: Sequence[Verdict]) -> list[str]:
    """Every run that was judged wrongly, with its recipe."""
    lines = []
    for v in sorted((v for v in verdicts if v.harm == v.harm), key=lambda v: -v.harm):
        wrong = []
        if v.harm >= HARMED and v.first["error"] is None:
            wrong.append("harm without an error" if v.first["warning"] else "harm without a warning")
        if v.harm < HARMED and v.first["error"] is not None:
            wrong.append(f"error at {v.first['error']} without harm")
        elif v.harm < HARMED and v.first["warning"] is not None:
            wrong.append(f"warning at {v.first['warning']} without harm")
        if v.onset is not None and any((v.lead(tier) or 1) <= 0 for tier in TIERS):
            wrong.append("late")
        if wrong:
            r = v.recipe
            lines.append(
                f"{r.name} {r.kind}: {', '.join(wrong)}; harm {v.harm:.2f}, onset {v.onset}, largest score "
                f"{v.largest_score:.0f}; {r.depth}x{r.width}/{r.heads} {r.norm} {r.positions} {r.precision} "
                f"{r.optimizer} sharpness {r.sharpness:g} init {r.init:g} rate {r.rate:.1e} warmup {r.warmup} "
                f"logits x{r.logit_scale:g} {r.data} {r.event}; {v.first}; {v.kinds}"
            )
    return lines


def by_kind(verdicts: Sequence[Verdict]) -> list[str]:
    lines = []
    for kind in dict.fromkeys(v.recipe.kind for v in verdicts):
        own = [v for v in verdicts if v.recipe.kind == kind]
        harmed = sum(v.harm >= HARMED for v in own)
        fired = {tier: Counter(v.harm >= HARMED for v in own if v.first[tier] is not None) for tier in TIERS}
        shown = "; ".join(
            f"{tier} in {fired[tier][True]} harmed, {fired[tier][False]} other" for tier in TIERS
        )
        lines.append(f"{kind:12} {len(own)} runs, {harmed} harmed: {shown}")
    return lines


def fault_table(verdicts: Sequence[Verdict]) -> list[str]:
    """Injected faults: which are found by the next reading."""
    lines = []
    for event in dict.fromkeys(v.recipe.event for v in verdicts):
        own = [v for v in verdicts if v.recipe.event == event]
        found = [_found_soon(v) for v in own]
        harmed = sum(v.harm >= HARMED for v in own)
        lines.append(
            f"fault, {event}: an error within two readings {share(found)}; {harmed} end behind their twins"
        )
    return lines


def _found_soon(verdict: Verdict) -> bool:
    start, end = verdict.recipe.event_step, verdict.recipe.event_step + 2 * verdict.recipe.log_every
    return any(start <= step <= end for kind, step in verdict.kinds.items() if kind.startswith("error"))


def cadence_table(paths: Sequence[Path], thresholds: dict[str, float], cadences: Sequence[int]) -> list[str]:
    """When a monitor at slower cadences would have spoken, of the runs that were read at every step."""
    records = [
        record for record in read(paths) if record.recipe.log_every == 1 and record.recipe.kind == "sweep"
    ]
    found = {every: [judged(record, thresholds, every) for record in records] for every in cadences}
    lines = []
    for tier in TIERS:
        for every, verdicts in found.items():
            harmed = [v for v in verdicts if v.harm >= HARMED]
            clean = [v for v in verdicts if v.harm < CLEAN]
            steps = [v.first[tier] for v in harmed if v.first[tier] is not None]
            both = [
                abs(v.first[tier] - first.first[tier])
                for v, first in zip(verdicts, found[cadences[0]])
                if v.first[tier] is not None and first.first[tier] is not None
            ]
            lines.append(
                f"log_every {every:3} {tier:8} in {len(steps)} of {len(harmed)} harmed runs, first at step "
                f"{median(steps):.0f} (median), {median(both):.0f} steps from log_every {cadences[0]}; in "
                f"{sum(v.first[tier] is not None for v in clean)} of {len(clean)} clean runs"
            )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("records", type=Path, nargs="+")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=NUMBER")
    parser.add_argument("--misses", action="store_true")
    parser.add_argument(
        "--cadences", type=int, nargs="+", help="compare these, of the runs read at every step"
    )
    parser.add_argument("--split", choices=SPLITS, help="judge the runs of this split alone")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument(
        "--failures", type=Path, help="write the recipes of failures that got an error, for fixes"
    )
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    thresholds = {name: float(number) for name, _, number in (text.partition("=") for text in given.set)}
    if given.cadences:
        print("\n".join(cadence_table(given.records, thresholds, given.cadences)))
        return
    verdicts = verdicts_of(given.records, thresholds, given.processes, given.split)
    faults = [v for v in verdicts if v.recipe.kind == "fault"]
    others = [v for v in verdicts if v.recipe.kind != "fault"]
    # A batch or an output that breaks may leave the run behind its twin by chance: attention has no part in it.
    own = [v for v in others if v.recipe.kind not in ("output", "bad batch")]
    print("\n".join(table(own)))
    print("\n".join(by_kind(others)))
    print("\n".join(baseline_table(own)))
    print("\n".join(fault_table(faults)))
    if given.check:
        print("\n".join(before.table([v.recipe for v in own], [v.harm for v in own])))
    if given.misses:
        print("\n".join(misses(others)))
    if given.failures:
        failures = [v.recipe.to_dict() for v in own if v.harm >= FAILURE and v.first["error"] is not None]
        given.failures.write_text(json.dumps(failures, indent=1) + "\n")
    if given.out:
        given.out.write_text(json.dumps([asdict(v) for v in verdicts], indent=1) + "\n")


def verdicts_of(
    paths: Sequence[Path], thresholds: dict[str, float], processes: int = 1, split: str | None = None
) -> list[Verdict]:
    """The verdicts of all records, or of those of one split, with the baselines'."""
    judge = partial(judged, thresholds=thresholds, baselines=True)
    chosen = (record for record in read(paths) if split in (None, record.recipe.split))
    if processes == 1:
        return list(map(judge, chosen))
    with ProcessPoolExecutor(processes) as workers:
        return list(workers.map(judge, chosen, chunksize=4))


if __name__ == "__main__":
    main()
