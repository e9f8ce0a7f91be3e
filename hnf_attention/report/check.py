"""The check before training, for a terminal."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from ..precheck.report import StabilityReport
from ..precheck.rounding import rounded_down, rounded_up
from .fitted import Column, FittedTable
from .numbers import number
from .tables import indented

VERDICT_STYLES = {
    "stable": "bold green",
    "marginal": "bold yellow",
    "unstable": "bold red",
    "not known": "bold yellow",
}
_STATUS = {"safe": "green", "usually safe": "yellow", "unsafe": "red", "not known": "yellow"}
_LAYERS = 6  # rows of the table of layers; layers with the same numbers share a row
_COLUMNS = {  # key of a layer's numbers -> title and rank of its column
    "keys": ("keys", 2),
    "score_std": ("score\nstd", 6),
    "sigma_ratio": ("sigma /\nsigma_c", 1),
    "expected_logit_max": ("row max", 9),
    "max_abs_logit": ("max\n|score|", 7),
    "normalized_entropy": ("normalized\nentropy", 5),
    "log2_curvature": ("log2\ncurvature", 8),
    "weight_logit_typical": ("random tokens\nmax |score|", 4),
    "weight_logit_bound": ("any input\n|score| <=", 3),
}


def verdict(report: StabilityReport, name: str) -> RenderableType:
    """Layers, number formats, margins, advice, and the verdict last. name: of the design."""
    parts: list[RenderableType] = [_layers(report, name), _formats(report)]
    parts += [Text(line, style="dim") for line in report.overflows_elsewhere()]
    if report["margins"]:
        parts.append(_margins(report))
    if report.about_rate():
        parts.append(Text(report.about_rate()))
    for text in report["recommendations"]:
        parts.append(indented(f"-> {text}"))
    assumed = [
        f"{key.removeprefix('design.')} ({why})"
        for key, why in report["sources"].items()
        if why.startswith("assumed")
    ]
    if assumed:
        parts.append(Text(f"assumed: {', '.join(assumed)}", style="dim"))
    parts += [Text(f"note: {note}", style="yellow") for note in report["notes"]]
    said, source = report["verdict"], report["sources"]["sigma_ratio"]
    parts.append(Text(f"\n{said}: {report.reason()} ({source})", style=VERDICT_STYLES[said]))
    return Group(*parts)


def _layers(report: StabilityReport, name: str) -> FittedTable:
    rows = report["layers"]
    shown = {key: column for key, column in _COLUMNS.items() if any(key in row for row in rows)}
    alike: dict[tuple[str, ...], list[str]] = {}
    for row in rows:
        numbers = tuple(number(row[key]) if key in row else "" for key in shown)
        alike.setdefault(numbers, []).append(row["layer"])
    lines = list(alike.items())[:_LAYERS]
    labels = [
        layers[0] if len(layers) == 1 else f"{layers[0]} and {len(layers) - 1} like it" for _, layers in lines
    ]
    cells = [numbers for numbers, _ in lines]
    if len(alike) > _LAYERS:
        labels.append(f"... {len(alike) - _LAYERS} more")
        cells.append(("",) * len(shown))
    columns = [Column("layer", [Text(label) for label in labels], justify="left")]
    for place, (title, rank) in enumerate(shown.values()):
        columns.append(Column(title, [Text(row[place]) for row in cells], rank))
    return FittedTable(name, columns)


def _formats(report: StabilityReport) -> FittedTable:
    title = f"q, k, v and weights stored in a format, for an error of {report['tolerance']:g} of the values' spread"
    found = report["dtypes"]

    def column(title: str, read: Callable[[dict[str, Any]], str], rank: int) -> Column:
        return Column(title, [Text(read(each)) for each in found.values()], rank)

    return FittedTable(
        title,
        [
            Column("format", [Text(name) for name in found], justify="left"),
            Column(
                "status",
                [Text(each["status"], style=_STATUS[each["status"]]) for each in found.values()],
                justify="left",
            ),
            column("bits", lambda each: str(each["bits"]), 2),
            column("usual need", lambda each: f"{each['typical_bits']:.0f}", 3),
            column("proved need", lambda each: f"{each['sound_bits']:.0f}", 4),
            column("error at most", lambda each: f"{each['error_bound']:.2g}", 5),
            Column(
                "overflows",
                [Text("\n".join(each["overflows"])) for each in found.values()],
                rank=1,
                justify="left",
            ),
        ],
    )


def _margins(report: StabilityReport) -> Text:
    words = {
        "temperature": lambda x: f"temperature down to {rounded_up(x):.3g} sqrt(head_dim)",
        "init_std": lambda x: f"query and key weights up to std {rounded_down(x):.3g}",
        "d_model": lambda x: f"d_model up to {math.floor(x):,}",
        "seq_len": lambda x: f"at least {math.ceil(x):,} keys",
    }
    texts = [words[knob](x) for knob, x in report["margins"].items() if math.isfinite(x) and x < 1e9]
    return Text(f"each alone keeps the spread of scores stable: {', '.join(texts)}")
