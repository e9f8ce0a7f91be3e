"""The figures of a diagnosis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ..statistics.heads import Snapshot
from ..theory import number_format
from .issue import StabilityIssue
from .thresholds import overridden, threshold

if TYPE_CHECKING:
    from os import PathLike

    from matplotlib.axes import Axes

    Path = str | PathLike[str] | None

#: Threshold to what it means, for scores: the rules judge half of a row's range.
_RANGES = {
    "clip_logit": "QK-clip acts (Kimi K2)",
    "deteriorating_logit": "loss suffers",
    "diverged_logit": "diverged",
}
_ENTROPIES = {"low_entropy": "low", "collapsed_entropy": "collapsed"}


class Plots:
    """Each method draws into `ax`, or into a figure of its own if that is None, and returns the axes.

    It saves the figure to `path` if that is given.
    """

    step: int
    issues: list[StabilityIssue]
    thresholds: Mapping[str, float]

    def _snapshots(self) -> Sequence[Snapshot]:
        raise NotImplementedError

    def plot_entropy_heatmap(self, path: Path = None, *, ax: Axes | None = None) -> Axes:
        """Draw the normalized entropy of every head at the latest snapshot."""
        from .. import figures

        with overridden(self.thresholds):
            sink = threshold("sink_mass")
        return _saved(figures.entropy_heatmap(self._snapshots()[-1], sink, ax=ax), path)

    def plot_entropy_evolution(
        self, path: Path = None, *, layer: str | None = None, ax: Axes | None = None
    ) -> Axes:
        """Draw the normalized entropy of every head of a layer over the snapshots.

        layer: its name; None takes the layer of the lowest head. Raises ValueError for another name.
        """
        from .. import figures

        limits = self._limits(_ENTROPIES, 1.0)
        return _saved(figures.entropy_evolution(self._snapshots(), limits, layer, ax=ax), path)

    def plot_score_range_evolution(self, path: Path = None, *, ax: Axes | None = None) -> Axes:
        """Draw the largest range of a row's scores over the snapshots, in nats, a line per layer."""
        from .. import figures

        limits = self._limits(_RANGES, 2.0)
        return _saved(figures.score_range_evolution(self._snapshots(), limits, ax=ax), path)

    def plot_curvature_evolution(self, path: Path = None, *, ax: Axes | None = None) -> Axes:
        """Draw log2 of the HNF curvature bound over the snapshots, a line per layer.

        A single snapshot, as of an analyzer, gives a point for every head.
        """
        from .. import figures

        return _saved(figures.curvature_evolution(self._snapshots(), ax=ax), path)

    def plot_bits_evolution(self, path: Path = None, *, ax: Axes | None = None) -> Axes:
        """Draw the significand bits that queries and keys need at worst over the snapshots, a line per layer.

        A dashed line is what the number format of a layer holds.
        """
        from .. import figures

        snapshots, limits = self._snapshots(), {}
        for dtype in dict.fromkeys(stats.dtype for stats in snapshots[-1].layers.values()):
            try:
                limits[dtype] = float(number_format(dtype).bits)
            except ValueError:  # a format that the theory does not know
                continue
        return _saved(figures.bits_evolution(snapshots, limits, ax=ax), path)

    def plot_before_after(self, step: int, path: Path = None, *, ax: Axes | None = None) -> Axes:
        """Draw the range of scores of every head before and after an intervention.

        step: the step after which it took place; the last snapshot up to there is "before", the latest one "after".
        Raises ValueError if there is no snapshot on either side.
        """
        from .. import figures

        snapshots = self._snapshots()
        before = [snapshot for snapshot in snapshots if snapshot.step <= step]
        if not before or snapshots[-1].step <= step:
            span = f"{snapshots[0].step} to {snapshots[-1].step}"
            raise ValueError(f"expected a step between the first and the last snapshot, {span}, got {step}")
        limits = self._limits(_RANGES, 2.0)
        return _saved(figures.before_after(before[-1], snapshots[-1], limits, ax=ax), path)

    def plot_forecast(
        self, issue: StabilityIssue | None = None, path: Path = None, *, ax: Axes | None = None
    ) -> Axes:
        """Draw when a head will break, with the interval, beside its history.

        issue: one of this diagnosis with a forecast; None takes the first. Raises ValueError if there is none, and
        TypeError for anything else.
        """
        from .. import figures

        if issue is not None and not isinstance(issue, StabilityIssue):
            raise TypeError(
                f"expected issue to be a StabilityIssue or None, got {type(issue).__name__}: give path="
            )
        if issue is None:
            issue = next((each for each in self.issues if each.forecast is not None), None)
        if issue is None or issue.forecast is None or issue.head is None:
            raise ValueError(
                f"expected an issue with a forecast, got {issue if issue else 'a diagnosis without one'}"
            )
        said = issue.forecast
        interval = None if said.low is None or said.high is None else (said.low, said.high)
        place = issue.layer, issue.head, said.statistic, said.value, said.step, interval
        return _saved(figures.forecast_figure(self._snapshots(), *place, ax=ax), path)

    def _limits(self, names: Mapping[str, str], factor: float) -> dict[str, float]:
        with overridden(self.thresholds):
            return {text: threshold(name) * factor for name, text in names.items()}


def _saved(axes: Axes, path: Path) -> Axes:
    from ..figures.canvas import save

    if path is not None:
        save(axes, path)
    return axes
