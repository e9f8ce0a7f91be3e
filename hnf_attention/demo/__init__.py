"""The demo: break a small transformer, see it coming, and treat it."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.text import Text

from ..report.tables import STYLES, findings
from . import artifacts
from .loss import FINAL_WINDOW
from .outcome import HINDSIGHT_GAP, Outcome, judge
from .training import Config, train
from .view import View, describe

_SHOWN_FINDINGS = 4

__all__ = ["Config", "Outcome", "run_demo"]


def run_demo(config: Config, out: Path, console: Console) -> Outcome:
    """Train twice from one seed, untreated and treated; show it, save figures and JSON into `out`.

    Raises ValueError where the interpreter has no standard library sources, OSError where `out`
    cannot be written.
    """
    out.mkdir(parents=True, exist_ok=True)
    console.print(
        f"A {config.layers}-layer byte-level GPT learns this Python's standard library. Its learning rate "
        f"warms up to {config.peak_learning_rate:g} and its attention runs at 1/{config.sharpness:g} of the "
        f"usual temperature. Seed {config.seed}, {config.steps} steps, twice."
    )
    runs = []
    for number, title in enumerate(("untreated", "treated"), start=1):
        console.print(Text(f"\n{number}. {title}", style="bold"))
        view = View(console, config, title)
        with view.live():
            runs.append(train(config, treated=title == "treated", observe=view.observe))
        if not console.is_terminal:
            console.print(view.table)
    untreated, treated = runs
    console.print(Text("\nFindings at the end of the untreated run", style="bold"))
    console.print(findings(untreated.last_diagnosis.issues, limit=_SHOWN_FINDINGS))
    outcome = judge(untreated, treated)
    paths = artifacts.save(out, config, untreated, treated, outcome)
    _print_verdict(console, outcome, treated.interventions)
    console.print(f"\nSaved in {out}: {', '.join(path.name for path in paths)}", highlight=False)
    return outcome


def _print_verdict(console: Console, outcome: Outcome, interventions: list) -> None:
    console.print(Text("\nVerdict", style="bold"))
    if outcome.warning_step is not None:
        console.print(f"warning at step {outcome.warning_step}")
    if outcome.sign is not None:
        lead = "" if outcome.lead is None else f": {outcome.lead} steps after the warning"
        console.print(f"the loss shows it at step {outcome.sign.step} ({outcome.sign.kind}: {outcome.sign.text}){lead}")
    if outcome.hindsight_step is not None:
        console.print(
            f"with hindsight, beside the treated run: {HINDSIGHT_GAP} nat behind from step {outcome.hindsight_step} on"
        )
    if interventions:
        step, first = interventions[0]
        console.print(f"treated from step {step} on, {len(interventions)} times; first {describe(first)}")
    console.print(
        f"final loss: untreated {outcome.untreated_loss:.2f}, treated {outcome.treated_loss:.2f} nats per byte "
        f"(means of the last {FINAL_WINDOW} steps)"
    )
    for broken in outcome.broken_promises:
        console.print(Text(f"NOT as promised: {broken}", style=STYLES["error"]))
    if not outcome.broken_promises:
        console.print(Text("seen before the loss showed it, and treated", style="bold green"))
