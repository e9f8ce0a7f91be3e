"""The check before training, for a terminal."""

from __future__ import annotations

import math

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ..precheck.report import StabilityReport
from ..precheck.rounding import rounded_down, rounded_up
from .tables import indented

_STYLES = {
    "stable": "bold green",
    "marginal": "bold yellow",
    "unstable": "bold red",
    "not known": "bold yellow",
}
_STATUS = {"safe": "green", "usually safe": "yellow", "unsafe": "red", "not known": "yellow"}
_LAYERS = 6  # rows of the table of layers; layers with the same numbers share a row
_COLUMNS = {  # key of a layer's numbers -> column
    "keys": "keys",
    "score_std": "score\nstd",
    "sigma_ratio": "sigma /\nsigma_c",
    "expected_logit_max": "row max",
    "max_abs_logit": "max\n|score|",
    "normalized_entropy": "normalized\nentropy",
    "log2_curvature": "log2\ncurvature",
    "weight_logit_typical": "random tokens\nmax |score|",
    "weight_logit_bound": "any input\n|score| <=",
}


def verdict(report: StabilityReport, name: str) -> RenderableType:
    """Layers, number formats, margins, advice, and the verdict last. name: of the design."""
    parts: list[RenderableType] = [_layers(report, name), _formats(report)]
    parts += [Text(line, style="dim") for line in report.overflows_elsewhere()]
    if report["margins"]:
        parts.append(_margins(report))
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
    ratio = f"sigma / sigma_c {report['sigma_ratio']:.2f}, margin {report['margin']:.2f}"
    source = report["sources"]["sigma_ratio"]
    parts.append(Text(f"\n{report['verdict']}: {ratio} ({source})", style=_STYLES[report["verdict"]]))
    return Group(*parts)


def _layers(report: StabilityReport, name: str) -> Table:
    table = Table(title=Text(name), title_justify="left", header_style="bold", title_style="bold")
    table.add_column("layer", overflow="fold")
    rows = report["layers"]
    columns = {key: title for key, title in _COLUMNS.items() if any(key in row for row in rows)}
    for title in columns.values():
        table.add_column(title, justify="right")
    alike: dict[tuple[str, ...], list[str]] = {}
    for row in rows:
        numbers = tuple(f"{row[key]:.4g}" if key in row else "" for key in columns)
        alike.setdefault(numbers, []).append(row["layer"])
    for numbers, layers in list(alike.items())[:_LAYERS]:
        label = layers[0] if len(layers) == 1 else f"{layers[0]} and {len(layers) - 1} like it"
        table.add_row(Text(label), *numbers)
    if len(alike) > _LAYERS:
        table.add_row(f"... {len(alike) - _LAYERS} more", *[""] * len(columns))
    return table


def _formats(report: StabilityReport) -> Table:
    title = f"q, k, v and weights stored in a format, for an error of {report['tolerance']:g} of the values' spread"
    table = Table(title=title, title_justify="left", header_style="bold")
    for column in ("format", "status", "bits", "usual need", "proved need", "error at most", "overflows"):
        table.add_column(column, justify="left" if column in ("format", "status", "overflows") else "right")
    for name, found in report["dtypes"].items():
        table.add_row(
            name,
            Text(found["status"], style=_STATUS[found["status"]]),
            str(found["bits"]),
            f"{found['typical_bits']:.0f}",
            f"{found['sound_bits']:.0f}",
            f"{found['error_bound']:.2g}",
            "\n".join(found["overflows"]),
        )
    return table


def _margins(report: StabilityReport) -> Text:
    words = {
        "temperature": lambda x: f"temperature down to {rounded_up(x):.3g} sqrt(head_dim)",
        "init_std": lambda x: f"query and key weights up to std {rounded_down(x):.3g}",
        "d_model": lambda x: f"d_model up to {math.floor(x)}",
        "seq_len": lambda x: f"at least {math.ceil(x)} keys",
    }
    texts = [words[knob](x) for knob, x in report["margins"].items() if math.isfinite(x) and x < 1e9]
    return Text(f"each alone keeps the spread of scores stable: {', '.join(texts)}")
