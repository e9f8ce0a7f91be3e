"""A diagnosis as named numbers and pictures: every writer takes them from here, under the same names.

A name ends in what was taken over the heads. `attn/layer_03/normalized_entropy_min` is the normalized entropy of the
layer's lowest head; each head's is its mean over rows. `attn/normalized_entropy_min` is that of the whole model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np

from ..diagnosis import AttentionDiagnosis

PREFIX = "attn"

_Reduce = Callable[[np.ndarray], np.floating]
# Of every layer. They are few: a model has up to a hundred layers, and a dashboard lists every series.
SCALARS: dict[str, tuple[str, _Reduce]] = {
    "normalized_entropy_min": ("normalized_entropy", np.min),
    "normalized_entropy_mean": ("normalized_entropy", np.mean),
    "max_abs_logit_max": ("max_abs_logit", np.max),
    "saturated_share_max": ("saturated_share", np.max),
    "log2_curvature_max": ("log2_curvature", np.max),
}
# Of the whole model, these too.
MODEL_SCALARS = SCALARS | {
    "error_bound_max": ("error_bound", np.max),
    "required_bits_max": ("required_bits", np.max),
}
# One value per head, as one histogram per layer.
HISTOGRAMS = ("normalized_entropy", "max_abs_logit")
# One value per head, as one picture of all layers. A fixed scale brings each to [0, 1], so that pictures of
# two steps can be compared. Scores are shown in decades, from 1 nat to where published runs diverged.
HEATMAPS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "normalized_entropy": lambda values: values,
    "sink_mass": lambda values: values,
    "max_abs_logit": lambda values: np.log10(np.maximum(values, 1.0)) / 4.0,
}
_PICTURE_SIZE = 1024  # pixels; more only if a model has more heads than fit
_CELLS = 4, 16  # pixels of a head's square, least and most


class LayerKeys(Mapping[str, str]):
    """Layer names to `layer_00`, `layer_01`, ...: numbered in the order they first ran. A number never changes."""

    def __init__(self) -> None:
        self._keys: dict[str, str] = {}
        self._digits = 2

    def add(self, layers: Iterable[str]) -> bool:
        """Number the layers that are new. Returns whether there were any."""
        new = [layer for layer in layers if layer not in self._keys]
        if not self._keys:  # the first layers fix the digits, because a series has to keep its name
            self._digits = max(2, len(str(len(new) - 1)))
        for layer in new:
            self._keys[layer] = f"layer_{len(self._keys):0{self._digits}d}"
        return bool(new)

    def names(self) -> dict[str, str]:
        """Keys to layer names."""
        return {key: layer for layer, key in self._keys.items()}

    def __getitem__(self, layer: str) -> str:
        return self._keys[layer]

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


def overall(diagnosis: AttentionDiagnosis) -> dict[str, float]:
    """The whole model in a few numbers: its worst heads, and how many issues there are."""
    numbers = {}
    for name, (field, reduce) in MODEL_SCALARS.items():
        values = _finite(np.concatenate([getattr(stats, field) for stats in diagnosis.stats.values()]))
        if values.size:
            numbers[f"{PREFIX}/{name}"] = float(reduce(values))
    numbers[f"{PREFIX}/errors"] = float(len(diagnosis.errors))
    numbers[f"{PREFIX}/warnings"] = float(len(diagnosis.warnings))
    return numbers


def scalars(diagnosis: AttentionDiagnosis, keys: Mapping[str, str]) -> dict[str, float]:
    """`overall`, and the same for every layer. A number that no head has is left out."""
    numbers = overall(diagnosis)
    for layer, stats in diagnosis.stats.items():
        for name, (field, reduce) in SCALARS.items():
            values = _finite(getattr(stats, field))
            if values.size:
                numbers[f"{PREFIX}/{keys[layer]}/{name}"] = float(reduce(values))
    return numbers


def histograms(diagnosis: AttentionDiagnosis, keys: Mapping[str, str]) -> dict[str, np.ndarray]:
    """`attn/layer_03/normalized_entropy` and the like: the finite values of a layer's heads.

    A layer without a finite value is left out.
    """
    arrays = {
        f"{PREFIX}/{keys[layer]}/{name}": _finite(getattr(stats, name))
        for layer, stats in diagnosis.stats.items()
        for name in HISTOGRAMS
    }
    return {name: values for name, values in arrays.items() if values.size}


def heatmaps(diagnosis: AttentionDiagnosis, keys: Mapping[str, str]) -> dict[str, np.ndarray]:
    """`attn/normalized_entropy_heatmap` and the like: uint8 (height, width, 3), a square per head.

    Layers go from 0 downwards, heads to the right. Dark is low, grey was not measured. These are plain pixels,
    because a labelled figure (`plot_entropy_heatmap`) takes a second to draw.
    """
    return {f"{PREFIX}/{name}_heatmap": _heatmap(diagnosis, keys, name) for name in HEATMAPS}


def _heatmap(diagnosis: AttentionDiagnosis, keys: Mapping[str, str], name: str) -> np.ndarray:
    import matplotlib

    heads = max(stats.num_heads for stats in diagnosis.stats.values())
    table = np.full((len(keys), heads), np.nan)
    for row, layer in zip(table, keys, strict=True):
        if layer in diagnosis.stats:
            values = HEATMAPS[name](getattr(diagnosis.stats[layer], name))
            row[: len(values)] = values
    colours = matplotlib.colormaps["viridis"].with_extremes(bad="#bbbbbb")
    cell = int(np.clip(_PICTURE_SIZE // max(table.shape), *_CELLS))
    pixels = colours(np.ma.masked_invalid(table), bytes=True)[:, :, :3]
    return np.ascontiguousarray(pixels.repeat(cell, 0).repeat(cell, 1))


def kinds(diagnosis: AttentionDiagnosis) -> frozenset[tuple[str, int | None, str, str]]:
    """Which issues there are, without their numbers: this changes only if an issue or its severity does."""
    return frozenset((i.layer, i.head, i.issue_type, i.severity) for i in diagnosis.issues)


def _finite(values: np.ndarray) -> np.ndarray:
    return values[np.isfinite(values)]
