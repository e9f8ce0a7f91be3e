"""A table of layers and a list of issues for a terminal, as rich renderables."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from ..diagnosis import StabilityIssue
from ..diagnosis.issue import grouped, heads_text
from ..figures.labels import layer_labels
from ..names import display_name
from ..statistics.heads import HeadStats

STYLES = {"error": "bold red", "warning": "yellow", "note": "cyan"}
_COLUMNS = (
    "heads",
    "normalized\nentropy",
    "lowest head\n(p10)",
    "max\nweight",
    "sink\nmass",
    "max\n|score|",
    "log2\ncurvature",
    "error\nbound",
    "bits\nneeded",
)


def layer_table(stats: Mapping[str, HeadStats], issues: Sequence[StabilityIssue], title: str) -> Table:
    """One row per layer: the mean head's normalized entropy, the worst head's other numbers, the issues."""
    table = Table(title=Text(title), title_justify="left", header_style="bold", title_style="bold")
    table.add_column("layer", overflow="fold")
    for name in _COLUMNS:
        table.add_column(name, justify="right")
    table.add_column("issues", overflow="fold")
    for (name, layer), label in zip(stats.items(), layer_labels(stats), strict=True):
        table.add_row(
            Text(label),  # as text: a layer's name may hold brackets, which rich would take for markup
            str(layer.num_heads),
            _number(layer.normalized_entropy, np.mean, "{:.2f}"),
            _number(layer.normalized_entropy_p10, np.min, "{:.2f}"),
            _number(layer.max_weight, np.max, "{:.2f}"),
            _number(layer.sink_mass, np.max, "{:.2f}"),
            _number(layer.max_abs_logit, np.max, "{:.4g}"),
            _number(layer.log2_curvature, np.max, "{:.4g}"),
            _number(layer.error_bound, np.max, "{:.2g}"),
            _number(layer.required_bits, np.max, "{:.0f}"),
            _state([issue for issue in issues if issue.layer == name], layer),
        )
    return table


def issue_list(issues: Sequence[StabilityIssue], limit: int | None = None) -> RenderableType:
    """The groups of issues, worst first, at most `limit`: where, the worst head's evidence, what to do."""
    if not issues:
        return Text("no issues", style="green")
    lines: list[RenderableType] = []
    groups = grouped(issues)
    for group in groups[:limit]:
        worst = group[0]
        lines.append(Text(headline(group), style=STYLES[worst.severity]))
        lines.append(indented(worst.evidence))
        lines.append(indented(f"threshold {worst.threshold:g}: {worst.source}", style="dim"))
        lines.append(indented(f"-> {worst.suggestion}"))
    if limit is not None and len(groups) > limit:
        lines.append(Text(f"... and {len(groups) - limit} more groups of issues", style="dim"))
    return Group(*lines)


def indented(text: str, style: str = "") -> Padding:
    """A paragraph under a headline; wrapped lines keep the indent."""
    return Padding(Text(text, style=style), (0, 0, 0, 4), expand=False)


def headline(group: Sequence[StabilityIssue]) -> str:
    """One line for a group of issues: 'error: entropy_collapse in blocks.0.attention heads 0-3'."""
    worst = group[0]
    return f"{worst.severity}: {worst.issue_type} in {display_name(worst.layer)}{heads_text(group)}"


def _state(issues: Sequence[StabilityIssue], layer: HeadStats) -> Text:
    if not issues:
        if (layer.nonfinite_rows + layer.nonfinite_out).any():  # one issue of the model tells of such layers
            return Text("NaN or inf", style=STYLES["error"])
        judged = (layer.judged_rows > 0).all()
        return Text("ok", style="green") if judged else Text("not judged", style="dim")
    worst, kinds = issues[0], {issue.issue_type for issue in issues}
    more = f" +{len(kinds) - 1}" if len(kinds) > 1 else ""
    return Text(f"{worst.severity}: {worst.issue_type}{more}", style=STYLES[worst.severity])


def _number(values: np.ndarray, reduce: Callable[[np.ndarray], float], form: str) -> str:
    finite = values[np.isfinite(values)]
    return form.format(reduce(finite)) if finite.size else "-"
