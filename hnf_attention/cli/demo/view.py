"""What the demo shows while it trains: a live table and a progress bar, or plain lines without a terminal."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from ...diagnosis import AttentionDiagnosis
from ...diagnosis.issue import grouped
from ...names import display_name
from ...report.tables import STYLES, headline, indented, layer_table
from .loss import LossSign, sign_now
from .training import Config, Run

_PLAIN_EVERY = 40  # steps between two lines, without a terminal


class View:
    """One run on a console: call `observe` after each step, inside `with view.live():`.

    table: the latest table of layers.
    """

    def __init__(self, console: Console, config: Config, title: str):
        self._console = console
        self._steps = config.steps
        self._title = title
        self._sign: LossSign | None = None
        self._interventions = 0
        self._described: set[str] = set()
        self.table: RenderableType = Text("")
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),  # what the width of the terminal leaves
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            expand=True,
        )
        self._task = self._progress.add_task("training", total=config.steps)
        self._live: Live | None = None

    def live(self) -> AbstractContextManager[object]:
        """The live display; without a terminal there is none, and `observe` prints lines."""
        if not self._console.is_terminal:
            return nullcontext()
        self._live = Live(console=self._console, refresh_per_second=4)
        return self._live

    def observe(self, run: Run, diagnosis: AttentionDiagnosis | None) -> None:
        step, loss = len(run.losses), run.losses[-1]
        if diagnosis is not None:
            self.table = layer_table(diagnosis.stats, diagnosis.issues, f"{self._title}, step {step}")
        if diagnosis is not None and diagnosis is run.first_issue:
            self._print_issue(run, "EARLY WARNING", diagnosis)
        if diagnosis is not None and diagnosis is run.first_error:
            self._print_issue(run, "ALARM", diagnosis)
        if len(run.interventions) > self._interventions:
            self._print_intervention(run)
        if self._sign is None:
            self._sign = sign_now(run.losses)
            if self._sign is not None:
                self._print_sign(run, self._sign)
        total = self._steps + run.lost_steps
        self._progress.update(self._task, total=total, completed=step, description=f"loss {loss:.3f}")
        if self._live is not None:
            self._live.update(Group(self.table, self._progress))
        elif run.last_diagnosis is not None and (step % _PLAIN_EVERY == 0 or step == total):
            scores = [stats.max_abs_logit.max() for stats in run.last_diagnosis.stats.values()]
            self._console.print(
                f"step {step:4d}  loss {loss:.3f}  largest |score| of any head {max(scores):.4g}"
            )

    def _print_issue(self, run: Run, title: str, diagnosis: AttentionDiagnosis) -> None:
        worst = grouped(diagnosis.issues)[0]
        self._console.print(Text(f"step {diagnosis.step}: {title} (loss {run.losses[-1]:.2f})", style="bold"))
        self._console.print(indented(headline(worst), style=STYLES[worst[0].severity]))
        self._console.print(indented(worst[0].evidence))
        if worst[0].measured:
            self._console.print(indented(worst[0].measured))

    def _print_intervention(self, run: Run) -> None:
        step, intervention = run.interventions[-1]
        text = describe(intervention)
        self._interventions = len(run.interventions)
        if text not in self._described:  # QK-clip acts at every snapshot; it is printed once
            self._described.add(text)
            self._console.print(Text(f"step {step}: applied {text}", style="bold green"))

    def _print_sign(self, run: Run, sign: LossSign) -> None:
        warned = run.first_issue
        lead = "without a warning" if warned is None else f"{sign.step - warned.step} steps after the warning"
        self._console.print(
            Text(f"step {sign.step}: THE LOSS SHOWS IT, {lead} ({sign.kind}: {sign.text})", style="bold")
        )


def describe(intervention: dict[str, Any]) -> str:
    """An intervention in a few words."""
    return ", ".join(map(_describe_one, [intervention, *intervention.get("then", [])]))


def _describe_one(intervention: dict[str, Any]) -> str:
    action = intervention["action"]
    if action == "rewind":
        return "a rewind"
    if action == "qk_norm":
        return "QK-norm"
    if action == "qk_clip":
        slower = f", learning rate x {intervention['lr_factor']:g}" if "lr_factor" in intervention else ""
        return f"QK-clip at {intervention['threshold']:g}{slower}"
    if action == "temperature":
        return "a higher attention temperature on the heads that collapse"
    if action == "reduce_lr":
        return f"learning rate x {intervention['factor']:g}"
    return f"{action} in {display_name(intervention['layer'])}"
