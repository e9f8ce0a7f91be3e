"""What all figures share: the canvas, and the look of the axes."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

_DPI = 150
_GRID = "#d8d8d8"


def new_figure(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure of that size in inches, and its one axes."""
    figure = Figure(figsize=(width, height), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def dress(axes: Axes, xlabel: str, ylabel: str, title: str, title_size: float = 10) -> None:
    """Labels, a title at the left, a light grid, and no frame at the top and right."""
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.set_title(title, loc="left", fontsize=title_size)
    axes.grid(True, color=_GRID, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
