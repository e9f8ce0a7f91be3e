"""What all figures share: the canvas, the look of the axes, and lines that mark a limit."""

from __future__ import annotations

from collections.abc import Mapping
from io import BytesIO
from os import PathLike

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

_DPI = 150
_GRID = "#d8d8d8"
#: Okabe and Ito's colours, which the colour-blind tell apart: Okabe & Ito, Color Universal Design (2008).
BLUE, ORANGE, GREEN, VERMILION, PURPLE = "#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7"


class ShownAxes(Axes):
    """The axes of a figure of their own. As the last value of a notebook's cell they show it, once."""

    def _repr_png_(self) -> bytes:
        return png(self)


def new_figure(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure of that size in inches, and its one axes."""
    figure = Figure(figsize=(width, height), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot(axes_class=ShownAxes)


def new_row(count: int, width: float, height: float) -> list[Axes]:
    """So many axes beside each other in one figure, each of that size in inches, with shared scales."""
    figure = Figure(figsize=(count * width, height), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return list(figure.subplots(1, count, sharex=True, sharey=True, squeeze=False)[0])


def axes_for(ax: Axes | None, width: float, height: float) -> Axes:
    """The axes that a caller gave, or those of a new figure of that size in inches.

    Raises TypeError for anything but axes.
    """
    if ax is not None and not isinstance(ax, Axes):
        raise TypeError(f"expected ax to be None or matplotlib's Axes, got {type(ax).__name__}")
    return new_figure(width, height)[1] if ax is None else ax


def save(axes: Axes, target: str | PathLike[str]) -> None:
    """Write the whole figure of these axes to a file, in the format of its name."""
    _figure_of(axes).savefig(target)


def png(axes: Axes) -> bytes:
    """The whole figure of these axes as a PNG file."""
    stream = BytesIO()
    _figure_of(axes).savefig(stream, format="png")
    return stream.getvalue()


def _figure_of(axes: Axes) -> Figure:
    figure = axes.get_figure(root=True)
    if figure is None:
        raise ValueError("expected axes of a figure, got axes that were removed from theirs")
    return figure


def dress(axes: Axes, xlabel: str, ylabel: str, title: str, title_size: float = 10) -> None:
    """Labels, a title at the left, a light grid, and no frame at the top and right."""
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.set_title(title, loc="left", fontsize=title_size)
    axes.grid(True, color=_GRID, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def draw_limits(axes: Axes, limits: Mapping[str, float], always: bool = False) -> None:
    """A dashed horizontal line for each limit, with its meaning.

    always: also where no number comes within a factor of three of it from below.
    """
    for text, value in limits.items():
        if not always and axes.dataLim.y1 < value / 3:
            continue
        axes.axhline(value, color="#777777", linewidth=0.9, linestyle="--", zorder=1)
        axes.annotate(
            f"{value:g}: {text}",
            (0.0, value),  # at the left, where numbers that grow are still small
            xycoords=("axes fraction", "data"),
            xytext=(4, 2),
            textcoords="offset points",
            va="bottom",
            fontsize=7,
            color="#555555",
            bbox={"facecolor": "white", "alpha": 0.7, "edgecolor": "none", "pad": 0.5},
            zorder=4,
        )
