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

    target: a folder for event files, or a `SummaryWriter`, which is flushed and left to the caller to close.
    Layers are numbered in the order they ran, `attn/layer_03/...`; the text `attn/layers` says which is which.
    The text `attn/issues` is written whenever the issues changed.
    Raises ImportError if tensorboard is not installed.
    """

    def __init__(self, target: str | PathLike[str] | SummaryWriter):
        self._module = require("torch.utils.tensorboard", "tensorboard")
        self._folder = fspath(target) if isinstance(target, (str, PathLike)) else None
        self._events = None if isinstance(target, (str, PathLike)) else target
        self._keys = LayerKeys()
        self._issues: frozenset = frozenset()  # `kinds` of the diagnosis before

    def write(self, diagnosis: AttentionDiagnosis) -> None:
        """Write a diagnosis, and flush."""
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
        issues = kinds(diagnosis)
        if issues != self._issues:
            events.add_text(f"{PREFIX}/issues", indent(diagnosis.summary(), "    "), step)
            self._issues = issues
        events.flush()

    def close(self) -> None:
        """Close the event file if it is the writer's own; a later snapshot starts another one."""
        if self._folder is not None and self._events is not None:
            self._events.close()
            self._events = None
