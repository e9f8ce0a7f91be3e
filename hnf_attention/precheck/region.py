"""The region of temperature, width and length in which a design's attention starts out stable."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from .design import Design, positive
from .model_class import known_design
from .predict import SAFE_RATIO, predict_layer, sigma_ratio

if TYPE_CHECKING:
    from os import PathLike

    from matplotlib.axes import Axes

# Bits. Own choice: GPT-2 starts at 7 to 14, LLaMA 7B at 34, GPT-NeoX 20B, whose spread is marginal, at 50.
CURVATURE_LIMIT = 64.0
_HOLDS = ("head_dim", "n_heads")
_FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)  # of d_model, for the default widths
_BISECTIONS = 60
_BITS_A_NAT = 2.0 / math.log(2.0)  # bits of curvature that a nat of the largest score costs


@dataclass(frozen=True, repr=False)
class StabilityRegion:
    """Where sigma / sigma_c and the curvature stay under their limits: every temperature from a least one on.

    Temperatures are T / sqrt(head_dim); 1 is usual.
    dims: values of d_model, (D,).
    lengths: visible keys, (L,).
    temperatures: (T,).
    ratio_limit: of sigma / sigma_c.
    curvature_limit: of HNF's bound, bits.
    by_spread, by_curvature: (D, L), the least temperature that keeps each limit.
    boundary: (D, L), the larger of the two.
    stable: (T, D, L), whether a temperature is in the region.
    exact: whether the boundary is a closed form rather than the result of a bisection.
    """

    design: Design
    dims: np.ndarray
    lengths: np.ndarray
    temperatures: np.ndarray
    ratio_limit: float
    curvature_limit: float
    by_spread: np.ndarray
    by_curvature: np.ndarray
    exact: bool

    def __repr__(self) -> str:
        axes = {"d_model": self.dims, "length": self.lengths, "temperature": self.temperatures}
        spans = [f"{name} {values.min():g} to {values.max():g}" for name, values in axes.items()]
        return f"StabilityRegion({', '.join(spans)}: {self.stable.mean():.0%} of {self.stable.size} stable)"

    @property
    def boundary(self) -> np.ndarray:
        return np.maximum(self.by_spread, self.by_curvature)

    @property
    def stable(self) -> np.ndarray:
        return self.temperatures[:, None, None] >= self.boundary

    def table(self) -> str:
        """The lowest stable temperature of every width and length, as Markdown."""
        header = ["d_model", *(str(int(n)) for n in self.lengths)]
        rows = [[str(int(d)), *(f"{t:.3g}" for t in row)] for d, row in zip(self.dims, self.boundary)]
        lines = [header, ["---"] * len(header), *rows]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

    def plot(self, path: str | PathLike[str] | None = None, *, ax: Axes | None = None) -> Axes:
        """The lowest stable temperature over the lengths, one line a width; saved to `path` if given.

        ax: where to draw; None makes a figure. Returns the axes.
        """
        from ..figures.canvas import save
        from ..figures.region import Mark, stability_figure

        design = self.design
        axes = stability_figure(
            self.dims,
            self.lengths,
            self.by_spread,
            self.by_curvature,
            ratio_limit=self.ratio_limit,
            curvature_limit=self.curvature_limit,
            mark=Mark(design.d_model, design.seq_len, design.relative_temperature),
            ax=ax,
        )
        if path is not None:
            save(axes, path)
        return axes

    def to_dict(self) -> dict[str, Any]:
        """Strict JSON types; None stands for a limit that no temperature keeps."""
        grids = {"by_spread": self.by_spread, "by_curvature": self.by_curvature, "boundary": self.boundary}
        return {
            "dims": self.dims.tolist(),
            "lengths": self.lengths.tolist(),
            "temperatures": self.temperatures.tolist(),
            "ratio_limit": self.ratio_limit,
            "curvature_limit": self.curvature_limit,
            "exact": self.exact,
            "stable": self.stable.tolist(),
            **{name: _finite(grid) for name, grid in grids.items()},
        }


def stability_region(
    config: Any,
    *,
    dims: Sequence[int] | None = None,
    lengths: Sequence[int] | None = None,
    temperatures: Sequence[float] | None = None,
    hold: str = "head_dim",
    ratio_limit: float = SAFE_RATIO,
    curvature_limit: float = CURVATURE_LIMIT,
) -> StabilityRegion:
    """The stable region of designs like this one, at initialisation.

    config: as for `check_attention_stability`, or a `Design`.
    dims: values of d_model; by default 1/4 to 4 times the design's, or the design's own if its class was measured
        because no formula explains its scores.
    lengths: visible keys; by default 1/8 to 8 times the design's.
    temperatures: T / sqrt(head_dim), of the grid `stable`; by default 1/4 to 8. The boundary does not depend on it.
    hold: what stays if d_model changes, "head_dim" or "n_heads".
    ratio_limit: of sigma / sigma_c in the sharpest row of a hundred.
    curvature_limit: of HNF's bound, bits.

    Scores are proportional to 1 / T. So these boundaries are exact:

        T >= T_0 (sigma / sigma_c at T_0) / limit,    T >= T_0 2 log2(e) max|s| / (limit - log2(|Q| |K| / d))

    No temperature is enough if the norms alone pass the curvature's limit. With a soft-cap, spread and maximum are
    not proportional to 1 / T, and both boundaries are found by bisection.
    Raises ValueError as `read_design`, for limits, sizes and temperatures that are not above 0, and for dims that
    do not divide into heads.
    """
    design = config if isinstance(config, Design) else known_design(config)
    if hold not in _HOLDS:
        raise ValueError(f"expected hold in {_HOLDS}, got {hold!r}")
    for name, value in (("ratio_limit", ratio_limit), ("curvature_limit", curvature_limit)):
        positive(name, value)
    design = replace(
        design, windows=(), layer_scale=(), n_layers=1, spread=design.spread and (max(design.spread),)
    )
    unit = design.n_heads if hold == "n_heads" else design.head_dim
    around = [max(1, round(design.d_model * f / unit)) * unit for f in _FACTORS]
    widths = _sizes("dims", dims, [design.d_model] if design.spread else around)
    if design.spread and widths.tolist() != [design.d_model]:
        raise ValueError(
            f"expected dims [{design.d_model}], at which its class was measured, got {widths.tolist()}"
        )
    keys = _sizes("lengths", lengths, [round(design.seq_len * 2.0**i) for i in range(-3, 4)])
    if temperatures is None:
        temperatures = np.geomspace(0.25, 8.0, 11).tolist()
    levels = np.array([positive("temperatures", float(t)) for t in temperatures])
    bounds = np.empty((2, len(widths), len(keys)))
    for i, d_model in enumerate(widths):
        wide = _widened(design, int(d_model), hold)
        for j, length in enumerate(keys):
            bounds[:, i, j] = _least(replace(wide, seq_len=int(length)), ratio_limit, curvature_limit)
    return StabilityRegion(
        design=design,
        dims=widths,
        lengths=keys,
        temperatures=levels,
        ratio_limit=float(ratio_limit),
        curvature_limit=float(curvature_limit),
        by_spread=bounds[0],
        by_curvature=bounds[1],
        exact=design.softcap is None,
    )


def _sizes(name: str, given: Sequence[int] | None, default: list[int]) -> np.ndarray:
    values = sorted({max(1, n) for n in default}) if given is None else list(given)
    if not values or any(isinstance(n, bool) or int(n) != n or n < 1 for n in values):
        raise ValueError(f"expected {name} to be integers of at least 1, got {values}")
    return np.array(values, dtype=np.int64)


def _widened(design: Design, d_model: int, hold: str) -> Design:
    if d_model == design.d_model:
        return design
    if hold == "n_heads":
        if d_model % design.n_heads:
            raise ValueError(f"expected dims that divide into {design.n_heads} heads, got {d_model}")
        return design.with_width(d_model)
    if d_model % design.head_dim:
        raise ValueError(f"expected dims that divide into heads of {design.head_dim}, got {d_model}")
    heads = d_model // design.head_dim
    return replace(design, d_model=d_model, n_heads=heads, n_kv_heads=heads)


def _least(design: Design, ratio_limit: float, curvature_limit: float) -> tuple[float, float]:
    """The least temperatures by spread and by curvature."""
    if design.softcap is not None:
        return (
            _bisect(lambda t: sigma_ratio(design.at_temperature(t)) <= ratio_limit),
            _bisect(lambda t: predict_layer(design.at_temperature(t), 0).log2_curvature <= curvature_limit),
        )
    usual = design.at_temperature(1.0)
    exponent = _BITS_A_NAT * predict_layer(usual, 0).max_abs_logit
    # The share of the norms alone. It is read where the scores are small: beside large ones its digits are lost.
    warm = predict_layer(design.at_temperature(max(1.0, exponent)), 0)
    room = curvature_limit - (warm.log2_curvature - _BITS_A_NAT * warm.max_abs_logit)
    by_curvature = exponent / room if room > 0 else math.inf
    return sigma_ratio(usual) / ratio_limit, by_curvature


def _bisect(holds: Callable[[float], bool]) -> float:
    """The least temperature from which on the monotone `holds` is true; 0 if it always is, inf if it never is."""
    low, high = math.log(1e-6), math.log(1e6)
    if holds(math.exp(low)):
        return 0.0
    if not holds(math.exp(high)):
        return math.inf
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2.0
        low, high = (low, middle) if holds(math.exp(middle)) else (middle, high)
    return math.exp(high)


def _finite(grid: np.ndarray) -> list[list[float | None]]:
    return [[x if math.isfinite(x) else None for x in row] for row in grid.tolist()]
