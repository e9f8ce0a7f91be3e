"""Several designs side by side, for a terminal."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from rich.console import Group, RenderableType
from rich.text import Text

from ..precheck import StabilityReport
from ..precheck.costs import Cost
from ..precheck.predict import STABLE
from ..precheck.rates import printed
from .check import VERDICT_STYLES
from .fitted import Column, FittedTable
from .numbers import number

_CHANGES = 3  # of each design
_SHARES = {"an eighth of\nits keys": 1 / 8, "its keys": 1.0, "eight times\nits keys": 8.0}


class CheckedDesign(NamedTuple):
    """A design with its report. stable: visible keys -> the lowest stable T / sqrt(head_dim); empty if not known."""

    name: str
    report: StabilityReport
    stable: dict[int, float]

    @property
    def temperature(self) -> float:
        """T / sqrt(head_dim) of the design."""
        design = self.report["design"]
        return 1.0 / (float(design["scale"]) * math.sqrt(design["head_dim"]))

    def to_dict(self) -> dict[str, Any]:
        """Strict JSON types."""
        lowest = {str(keys): value if math.isfinite(value) else None for keys, value in self.stable.items()}
        return {"name": self.name, "lowest_stable_temperature": lowest} | self.report.to_dict()


def side_by_side(designs: Sequence[CheckedDesign]) -> RenderableType:
    """Margins and bits, the temperatures that are stable, what each advised change costs, and the verdicts last."""
    labels = short_names([each.name for each in designs])
    designs = [each._replace(name=label) for each, label in zip(designs, labels)]
    parts: list[RenderableType] = [_margins(designs), _stable(designs)]
    advised = [each for each in designs if each.report["verdict"] != STABLE and each.report["neighbours"]]
    if advised:
        parts.append(_changes(advised))
    for each in designs:
        parts += [Text(f"note: {each.name}: {note}", style="yellow") for note in each.report["notes"]]
    known = [each for each in designs if each.report["verdict"] != "not known"]
    best = max(known, key=lambda each: each.report["margin"], default=None)
    parts.append(Text(""))
    for each in designs:
        verdict, mark = each.report["verdict"], " (largest margin)" if each is best else ""
        parts.append(
            Text(f"{verdict}: {each.name}, {each.report.reason()}{mark}", style=VERDICT_STYLES[verdict])
        )
    return Group(*parts)


def lengths(seq_len: int) -> list[int]:
    """The visible keys that a design's temperatures are told at: an eighth of its own, its own, eight times as many."""
    return [max(2, round(seq_len * share)) for share in _SHARES.values()]


def short_names(names: Sequence[str]) -> list[str]:
    """Each name without the folders that nobody needs to tell it from the others: 'b/x.json' of 'a/b/x.json'."""
    parts = [name.rstrip("/").split("/") for name in names]
    for count in range(1, max(map(len, parts)) + 1):
        found = ["/".join(each[-count:]) for each in parts]
        if len(set(found)) == len(set(names)):
            return found
    return list(names)


def _names(designs: Sequence[CheckedDesign]) -> Column:
    return Column("design", [Text(each.name) for each in designs], justify="left")


def _margins(designs: Sequence[CheckedDesign]) -> FittedTable:
    def column(title: str, read: Callable[[StabilityReport], str], rank: int) -> Column:
        return Column(title, [Text(read(each.report)) for each in designs], rank)

    def shape(report: StabilityReport) -> str:
        design = report["design"]
        return f"{design['n_layers']} x {design['n_heads']} x {design['head_dim']}"

    def rate(report: StabilityReport) -> str:
        found = report["largest_clean_rate"]
        return "" if found is None else printed(found)

    rated = any(each.report["harm_probability"] is not None for each in designs)
    verdicts = [
        Text(each.report["verdict"], style=VERDICT_STYLES[each.report["verdict"]]) for each in designs
    ]
    return FittedTable(
        "Margins and required bits",
        [
            _names(designs),
            Column("verdict", verdicts, justify="left"),
            column("sigma /\nsigma_c", lambda report: number(report["sigma_ratio"]), 1),
            column("margin", lambda report: f"{report['margin']:.2f}", 2),
            column("layers x heads\nx head_dim", shape, 8),
            column("keys", lambda report: f"{report['design']['seq_len']:,}", 6),
            column("max\n|score|", lambda report: number(report["max_abs_logit"]), 7),
            column("bits,\nusual", lambda report: f"{report['typical_bits_needed']:.0f}", 3),
            column("bits,\nproved", lambda report: f"{report['precision_bits_needed']:.0f}", 4),
            column("largest\nclean rate", rate, 5),
            *(
                [column("harm at\nthe rate", lambda report: _harm(report["harm_probability"]), 5)]
                if rated
                else []
            ),
        ],
    )


def _stable(designs: Sequence[CheckedDesign]) -> FittedTable:
    """A column for each share of the design's own length."""
    columns = [_names(designs), Column("its own", [Text(f"{each.temperature:.3g}") for each in designs], 1)]
    for place, title in enumerate(_SHARES):
        cells = []
        for each in designs:
            keys = lengths(each.report["design"]["seq_len"])[place]
            lowest = each.stable.get(keys)
            if lowest is None:
                cells.append(Text("not known", style="yellow"))
                continue
            text = "none" if not math.isfinite(lowest) else f"from {lowest:.3g}"
            cells.append(Text(f"{text} ({keys:,})", style="green" if each.temperature >= lowest else "red"))
        columns.append(Column(title, cells, 0 if place == 1 else 2))
    return FittedTable(
        "Temperatures T / sqrt(head_dim) with a stable spread of scores, by visible keys", columns
    )


def _changes(designs: Sequence[CheckedDesign]) -> FittedTable:
    rows = [(each.name, change) for each in designs for change in each.report["neighbours"][:_CHANGES]]
    verdicts = [Text(change["verdict"], style=VERDICT_STYLES[change["verdict"]]) for _, change in rows]
    harms = [change["harm_probability"] for _, change in rows]
    rated = any(harm is not None for harm in harms)
    return FittedTable(
        "Advised changes, and what they cost",
        [
            Column("design", [Text(name) for name, _ in rows], justify="left"),
            Column("change", [Text(change["change"]) for _, change in rows], justify="left"),
            Column("then", verdicts, 1, justify="left"),
            Column("sigma /\nsigma_c", [Text(number(change["sigma_ratio"])) for _, change in rows], 2),
            *([Column("harm at\nthe rate", [Text(_harm(harm)) for harm in harms], 2)] if rated else []),
            Column("cost", [Text(str(Cost(**change["cost"]))) for _, change in rows], justify="left"),
        ],
    )


def _harm(probability: float | None) -> str:
    return "" if probability is None else f"{probability:.0%}"
