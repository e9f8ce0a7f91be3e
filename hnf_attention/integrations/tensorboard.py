"""Snapshots in TensorBoard."""

from __future__ import annotations

from os import PathLike, fspath
from textwrap import indent
from typing import TYPE_CHECKING

from ..diagnosis import AttentionDiagnosis
from ..names import display_name
from .extras import require
from .series import PREFIX, LayerKeys, heatmaps, histograms, kinds, scalars

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class TensorBoardWriter:
    """Writes each snapshot as scalars, histograms over heads, and heatmaps of all heads.

    target: a folder for event files, or a `SummaryWriter`, which is flushed but stays the caller's to close.
    Layers are numbered in the order they ran, `attn/layer_03/...`; the text `attn/layers` says which is
    which, and `attn/issues` holds the issues whenever others were found than before.
    Raises ImportError where tensorboard is not installed.
    """

    def __init__(self, target: str | PathLike[str] | SummaryWriter):
        self._module = require("torch.utils.tensorboard", "tensorboard")
        own = isinstance(target, (str, PathLike))
        self._folder = fspath(target) if own else None
        self._events: SummaryWriter | None = None if own else target
        self._keys = LayerKeys()
        self._found: frozenset = frozenset()

    def write(self, diagnosis: AttentionDiagnosis) -> None:
        if self._events is None:
            self._events = self._module.SummaryWriter(self._folder)
        events, step = self._events, diagnosis.step
        if self._keys.add(diagnosis.stats):
            rows = [f"| {key} | {display_name(layer)} |" for layer, key in self._keys.items()]
            events.add_text(f"{PREFIX}/layers", "\n".join(["| key | layer |", "|---|---|", *rows]), step)
        for name, value in scalars(diagnosis, self._keys).items():
            events.add_scalar(name, value, step)
        for name, values in histograms(diagnosis, self._keys).items():
            events.add_histogram(name, values, step)
        for name, pixels in heatmaps(diagnosis, self._keys).items():
            events.add_image(name, pixels, step, dataformats="HWC")
        found = kinds(diagnosis)
        if found != self._found:
            events.add_text(f"{PREFIX}/issues", indent(diagnosis.summary(), "    "), step)
            self._found = found
        events.flush()

    def close(self) -> None:
        """Close the event file, if it is the writer's own; a later snapshot starts another one."""
        if self._folder is not None and self._events is not None:
            self._events.close()
            self._events = None
