"""A table of layers and a list of issues for a terminal, as rich renderables."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from ..diagnosis import StabilityIssue
from ..diagnosis.issue import grouped, heads_text
from ..figures.labels import layer_labels
from ..names import display_name
from ..statistics.heads import HeadStats
from .fitted import Column, FittedTable
from .numbers import number

STYLES = {"error": "bold red", "warning": "yellow", "note": "cyan"}


@dataclass(frozen=True)
class _Quantity:
    """A column of numbers: its title, the number of one layer, and its rank (`Column`)."""

    title: str
    read: Callable[[HeadStats], str]
    rank: int


_QUANTITIES = (
    _Quantity("heads", lambda layer: str(layer.num_heads), 5),
    _Quantity("normalized\nentropy", lambda layer: _reduced(layer.normalized_entropy, np.mean, "{:.2f}"), 2),
    _Quantity(
        "lowest head\n(p10)", lambda layer: _reduced(layer.normalized_entropy_p10, np.min, "{:.2f}"), 4
    ),
    _Quantity("max\nweight", lambda layer: _reduced(layer.max_weight, np.max, "{:.2f}"), 3),
    _Quantity("sink\nmass", lambda layer: _reduced(layer.sink_mass, np.max, "{:.2f}"), 6),
    _Quantity("max\n|score|", lambda layer: _reduced(layer.max_abs_logit, np.max, None), 1),
    _Quantity("log2\ncurvature", lambda layer: _reduced(layer.log2_curvature, np.max, None), 7),
    _Quantity("error\nbound", lambda layer: _reduced(layer.error_bound, np.max, "{:.2g}"), 9),
    _Quantity("bits\nneeded", lambda layer: _reduced(layer.required_bits, np.max, "{:.0f}"), 8),
)


def layer_table(stats: Mapping[str, HeadStats], issues: Sequence[StabilityIssue], title: str) -> FittedTable:
    """One row per layer: the mean head's normalized entropy, the worst head's other numbers, the issues.

    A narrow console shows the columns that matter most; the names of layers and of issues are always whole.
    """
    # Cells are texts, not strings: a layer's name may hold brackets, which rich would take for markup.
    columns = [Column("layer", [Text(label) for label in layer_labels(stats)], justify="left")]
    for quantity in _QUANTITIES:
        cells = [Text(quantity.read(layer)) for layer in stats.values()]
        columns.append(Column(quantity.title, cells, quantity.rank))
    states = [
        _state([issue for issue in issues if issue.layer == name], layer) for name, layer in stats.items()
    ]
    return FittedTable(title, [*columns, Column("issues", states, justify="left")])


def issue_list(
    issues: Sequence[StabilityIssue], limit: int | None = None, training: bool = False
) -> RenderableType:
    """The groups of issues, worst first, at most `limit`: where, the worst head's evidence, what to do.

    training: of a model in training, of which the laboratory counted how often such an issue meant harm.
    """
    if not issues:
        return Text("no issues", style="green")
    lines: list[RenderableType] = []
    groups = grouped(issues)
    for group in groups[:limit]:
        worst = group[0]
        lines.append(Text(headline(group), style=STYLES[worst.severity]))
        lines.append(indented(worst.evidence))
        if training and worst.measured:
            lines.append(indented(worst.measured))
        lines.append(indented(f"threshold {number(worst.threshold)}: {worst.source}", style="dim"))
        lines.append(indented(f"-> {worst.suggestion}"))
    if limit is not None and len(groups) > limit:
        more = len(groups) - limit
        lines.append(Text(f"... and {more} more group{'s' * (more != 1)} of issues", style="dim"))
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


def _reduced(values: np.ndarray, reduce: Callable[[np.ndarray], float], form: str | None) -> str:
    """One number of all heads' finite ones. form: None writes it as `number` does."""
    finite = values[np.isfinite(values)]
    if not finite.size:
        return "-"
    found = float(reduce(finite))
    return number(found) if form is None else form.format(found)
