"""The two charts of bench/whole_step.py's results: overhead and peak memory by sequence length."""

from collections.abc import Callable
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator
from tables import MODELS, VARIANTS

COLOURS = {
    "plain": "#444444",
    "log_every=100": "#0072b2",
    "record_every=1": "#009e73",
    "log_every=1": "#e69f00",
    "eager": "#d55e00",
}
LINE = {"marker": "o", "markersize": 4, "linewidth": 1.6, "clip_on": False}
Value = Callable[[dict], float | None]


def draw(document: dict, folder: Path, suffix: str) -> list[Path]:
    """Write overhead_SUFFIX.svg, and memory_SUFFIX.svg where memory was recorded; return what was written."""
    rows = [row for row in document["steps"] if not isinstance(row["variants"]["plain"], str)]
    written = []
    if rows:
        figure = _chart(rows, _percent, "step time over plain", "overhead")
        for axes in figure.axes:
            # Linear up to 1%, because noise has either sign; logarithmic above, where eager attention is.
            axes.set_yscale("symlog", linthresh=1.0)
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}%"))
            axes.axhline(0, color="#777777", linewidth=0.8)
        written.append(_save(figure, folder / f"overhead_{suffix}.svg"))
    if any(_gibibytes(row["variants"]["plain"]) for row in rows):
        figure = _chart(rows, _gibibytes, "peak memory of a step (GiB)", "peak memory")
        for axes in figure.axes:
            axes.set_ylim(bottom=0)
        written.append(_save(figure, folder / f"memory_{suffix}.svg"))
    return written


def _percent(found: dict) -> float | None:
    return 100 * found["overhead"] if "overhead" in found else None


def _gibibytes(found: dict) -> float | None:
    peak = found["peak_bytes"]
    return None if peak is None else peak / 2**30


def _chart(rows: list[dict], value: Value, ylabel: str, title: str) -> Figure:
    """One panel a model, one line a variant, over the tokens of a step."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    figure = Figure(figsize=(1.6 + 3.6 * len(models), 3.6), layout="constrained")
    FigureCanvasSVG(figure)
    panels = figure.subplots(1, len(models), squeeze=False, sharey=True)[0]
    for axes, model in zip(panels, models):
        _panel(axes, [row for row in rows if row["model"] == model], value)
        axes.set_title(f"{MODELS.get(model, model)}: {title}", loc="left", fontsize=10)
        axes.set_xlabel("tokens a step, one sequence")
    panels[0].set_ylabel(ylabel)
    lines = {line.get_label(): line for axes in panels for line in axes.get_lines()}
    figure.legend(
        lines.values(), lines.keys(), loc="outside lower center", ncols=2, fontsize=8, frameon=False
    )
    return figure


def _panel(axes: Axes, rows: list[dict], value: Value) -> None:
    lost = []
    for name, colour in COLOURS.items():
        found = [(row["tokens"], row["variants"].get(name)) for row in rows]
        points = [(x, y) for x, f in found if isinstance(f, dict) and (y := value(f)) is not None]
        if points:
            text = VARIANTS.get(name, name)
            axes.plot(*zip(*points), color=colour, label=text, **LINE)
        lost += [(x, name, colour) for x, f in found if isinstance(f, str)]
    below: dict[int, int] = {}  # tokens -> labels above the next one
    for x, name, colour in lost:
        below[x] = below.get(x, -1) + 1
        place = {"xycoords": ("data", "axes fraction"), "ha": "right", "va": "top", "fontsize": 7}
        axes.annotate(f"{name}: out of memory", (x, 0.97 - 0.06 * below[x]), color=colour, **place)
    axes.set_xscale("log", base=2)
    axes.set_xticks([row["tokens"] for row in rows], [f"{row['tokens'] / 1024:g}k" for row in rows])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(True, color="#d8d8d8", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def _save(figure: Figure, path: Path) -> Path:
    """The same results give the same bytes: without a date, and without random names of clip paths."""
    with matplotlib.rc_context({"svg.hashsalt": "hnf-attention", "svg.fonttype": "none"}):
        figure.savefig(path, metadata={"Date": None})
    return path
