"""Snapshots in TensorBoard."""

from __future__ import annotations

from os import PathLike, fspath
from textwrap import indent
from typing import TYPE_CHECKING

from .extras import require
from .series import PREFIX
from .tracker import Page, TrackerWriter

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class TensorBoardWriter(TrackerWriter["SummaryWriter"]):
    """Writes each snapshot as scalars, histograms over heads, and heatmaps of all heads, from a thread of its own.

    target: a folder for event files, or a `SummaryWriter`, which is flushed and left to the caller to close.
    Layers are numbered in the order they ran, `attn/layer_03/...`; the text `attn/layers` says which is which.
    The text `attn/issues` is written whenever the issues changed.
    Raises ImportError if tensorboard is not installed.
    """

    def __init__(self, target: str | PathLike[str] | SummaryWriter):
        self._module = require("torch.utils.tensorboard", "tensorboard")
        super().__init__(None if isinstance(target, (str, PathLike)) else target)
        self._folder = fspath(target) if isinstance(target, (str, PathLike)) else None

    def _start(self) -> SummaryWriter:
        return self._module.SummaryWriter(self._folder)

    def _send(self, run: SummaryWriter, page: Page) -> None:
        step = page.diagnosis.step
        if page.layers is not None:
            rows = [f"| {key} | {name} |" for key, name in page.layers.items()]
            run.add_text(f"{PREFIX}/layers", "\n".join(["| key | layer |", "|---|---|", *rows]), step)
        for name, value in page.scalars.items():
            run.add_scalar(name, value, step)
        for name, values in page.histograms.items():
            run.add_histogram(name, values, step)
        for name, pixels in page.heatmaps.items():
            run.add_image(name, pixels, step, dataformats="HWC")
        if page.issues is not None:
            run.add_text(f"{PREFIX}/issues", indent(page.diagnosis.summary(), "    "), step)
        run.flush()

    def _finish(self, run: SummaryWriter) -> None:
        run.close()
