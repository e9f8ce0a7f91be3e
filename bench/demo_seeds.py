"""Run the demo on several seeds, each beside a healthy control run, and record the results.

    python bench/demo_seeds.py OUT.json 0 1 2 3 4 5 6 7

Each seed is run as `hnf-attention demo` runs it; nothing is chosen per seed. Beside it train:

- the healthy twin of the untreated run: the same model, data, temperature and rate, with QK-norm from the start, as
  `start_qk_norm` starts it. It tells attention's share of the harm (docs/validation.md).
- the same twin at a quarter and an eighth of the rate: what that temperature reaches at better rates.
- the control: the same model on the same data, at the usual temperature and a tenth of the learning rate. The monitor
  should find no error in it, and its loss should show no sign of trouble.

Final losses are those on held-out text, the same windows for all. Exit code 1 if a seed breaks a promise of the demo,
if a treated run ends 0.05 nat or more above its twin, or if a control run has an error or a sign of trouble.
"""

import json
import logging
import sys
import tempfile
from dataclasses import asdict, replace
from io import StringIO
from pathlib import Path
from time import perf_counter

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import torch
from machine import machine
from rich.console import Console

from hnf_attention.cli.demo import Config, run_demo
from hnf_attention.cli.demo.loss import first_sign
from hnf_attention.cli.demo.training import Training, train
from hnf_attention.interventions import start_qk_norm

TWIN_RATES = (1.0, 0.25, 0.125)  # of the untreated run's own
HEALTHY_GAP = 0.05  # nats above the twin


def demo(seed: int) -> dict:
    start = perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        outcome, _ = run_demo(Config(seed=seed), Path(folder), Console(file=StringIO(), width=110))
    return {"seed": seed, **outcome.to_dict(), "seconds": round(perf_counter() - start, 1)}


def control(seed: int) -> dict:
    config = replace(Config(seed=seed), sharpness=1.0, peak_learning_rate=Config().peak_learning_rate / 10)
    snapshots = {"readings": 0, "with_warnings": 0, "with_errors": 0}

    def count(_, diagnosis):
        if diagnosis is not None:
            snapshots["readings"] += 1
            snapshots["with_warnings"] += bool(diagnosis.warnings)
            snapshots["with_errors"] += bool(diagnosis.errors)

    finished = train(config, False, count)
    sign = first_sign(finished.losses)
    shows = None if sign is None else asdict(sign)
    return {"seed": seed, "loss_shows": shows, "final_loss": finished.held_out_loss, **snapshots}


def twins(seed: int) -> dict:
    """The final loss of the twin at each rate."""
    found = {}
    for factor in TWIN_RATES:
        training = Training(
            replace(Config(seed=seed), peak_learning_rate=Config().peak_learning_rate * factor)
        )
        start_qk_norm(training.model, training.optimizer)
        for _ in range(training.config.steps):
            training.step()
        found[f"x {factor:g}"] = training.held_out_loss()
    return {"seed": seed, "final_loss": found[f"x {TWIN_RATES[0]:g}"], "by_rate": found}


def row(result: dict, twin: dict, healthy: dict) -> str:
    signs = [result["loss_shows"], result["treated_loss_shows"], healthy["loss_shows"]]
    losses = (result["untreated_final_loss"], result["treated_final_loss"], result["gap_nats"])
    cells = [
        result["seed"],
        result["warning_step"],
        result["alarm_step"],
        *(f"{sign['step']} ({sign['kind']})" if sign else "never" for sign in signs),
        result["hindsight_step"],
        *("not finite" if loss is None else f"{loss:.2f}" for loss in losses),
        *(f"{loss:.2f}" for loss in twin["by_rate"].values()),
        f"{healthy['final_loss']:.2f}",
        f"{healthy['with_warnings']}, {healthy['with_errors']} of {healthy['readings']}",
        f"{result['seconds']:.0f}",
    ]
    return f"| {' | '.join(map(str, cells))} |"


def main(path: str, seeds: list[int]) -> int:
    torch.set_num_threads(1)
    results, beside, controls = [], [], []
    logging.getLogger("hnf_attention").addHandler(logging.NullHandler())  # the control's issues are counted
    columns = (
        "seed",
        "warning",
        "first error",
        "loss shows it",
        "treated loss too",
        "control's too",
        "0.1 nat behind",
        "untreated",
        "treated",
        "gap",
    )
    columns += (*(f"twin at rate x {factor:g}" for factor in TWIN_RATES),)
    columns += ("control", "its snapshots with warnings, errors", "seconds")
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for seed in seeds:
        result, twin, healthy = demo(seed), twins(seed), control(seed)
        results.append(result)
        beside.append(twin)
        controls.append(healthy)
        print(row(result, twin, healthy), flush=True)
        document = {"machine": machine(), "results": results, "twins": beside, "controls": controls}
        Path(path).write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")
    kept = not any(result["broken_promises"] for result in results)
    well = not any(healthy["with_errors"] or healthy["loss_shows"] for healthy in controls)
    healed = all(
        result["treated_final_loss"] is not None
        and result["treated_final_loss"] < twin["final_loss"] + HEALTHY_GAP
        for result, twin in zip(results, beside)
    )
    return int(not (kept and healed and well))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1], [int(seed) for seed in sys.argv[2:]]))
