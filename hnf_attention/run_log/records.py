"""What is written at a log step, as JSON types and one block of bytes."""

from __future__ import annotations

import json
import math
import re
from base64 import b64decode, b64encode
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from ..diagnosis import StabilityIssue
from ..statistics.heads import HeadStats
from . import blocks, metrics
from .blocks import BadLog

#: What can happen to an issue between two log steps, by the names of `monitoring.transitions.Transitions`.
CHANGES = ("new", "worse", "better", "gone")


@dataclass(frozen=True)
class Layout:
    """What a block's rows and columns are.

    metrics: names of the rows. layers: the columns, (name, number of heads, head dimension, dtype, sample period) each.
    """

    metrics: tuple[str, ...]
    layers: tuple[tuple[str, int, int, str, int], ...]

    @property
    def heads(self) -> int:
        """The number of columns."""
        return sum(layer[1] for layer in self.layers)

    @staticmethod
    def of(layers: Mapping[str, HeadStats]) -> Layout:
        """The layout of `metrics.table`."""
        described = (
            (name, stats.num_heads, stats.head_dim, stats.dtype, stats.sample_period)
            for name, stats in layers.items()
        )
        return Layout(metrics.NAMES, tuple(described))

    def text(self) -> str:
        """As JSON, the same text for equal layouts."""
        return json.dumps({"metrics": self.metrics, "layers": self.layers}, separators=(",", ":"))

    @staticmethod
    def parse(text: str) -> Layout:
        """What `text` gave. Raises BadLog for anything else."""
        try:
            found = json.loads(text)
            layers = tuple(
                (str(name), _count(heads), _count(dim), str(dtype), _count(period))
                for name, heads, dim, dtype, period in found["layers"]
            )
            layout = Layout(tuple(map(str, found["metrics"])), layers)
            if layout.heads * max(1, len(layout.metrics)) > blocks.MOST_NUMBERS:
                raise ValueError(f"{layout.heads} heads")
            return layout
        except (ValueError, TypeError, KeyError, RecursionError, OverflowError) as error:
            raise BadLog(f"expected the layout of a block, got {error!r}") from None


@dataclass(frozen=True)
class Record:
    """One log step. Without layers it is none: its events and scalars alone are kept.

    step: its number. first_step: of the earliest log step that it stands for; below `step` where others were joined to
    it. time: seconds of the epoch. training, forwards: as in `Snapshot`. block: of `blocks.encode`. changes:
    (one of CHANGES, the issue as a dict). events: other things that happened, with a "kind" each. scalars: name to
    (step, value) pairs since the log step before. not_measured: layers to reasons.
    """

    step: int
    first_step: int
    time: float
    training: bool
    forwards: tuple[int, int, int]
    layout: Layout
    block: bytes
    changes: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    scalars: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    not_measured: dict[str, str] = field(default_factory=dict)

    @property
    def table(self) -> np.ndarray:
        """float32 (metrics, heads). Raises BadLog if the block does not fit the layout."""
        return blocks.decode(self.block, len(self.layout.metrics), self.layout.heads)

    def to_json(self) -> dict[str, Any]:
        """As JSON types."""
        own = {"layout": self.layout.text(), "block": b64encode(self.block).decode()}
        return plain(vars(self) | own)

    @staticmethod
    def of_json(found: Mapping[str, Any]) -> Record:
        """What `to_json` gave. Raises BadLog for anything else."""
        try:
            training, evaluation, failed = map(int, found["forwards"])
            return Record(
                step=_count(found["step"]),
                first_step=_count(found["first_step"]),
                time=float(found["time"]),
                training=bool(found["training"]),
                forwards=(training, evaluation, failed),
                layout=Layout.parse(found["layout"]),
                block=b64decode(found["block"], validate=True),
                changes=[(_change(how), dict(issue)) for how, issue in found["changes"]],
                events=[{**event, "kind": str(event["kind"])} for event in found["events"]],
                scalars={
                    str(name): [(_count(step), _number(value)) for step, value in pairs]
                    for name, pairs in found["scalars"].items()
                },
                not_measured={str(layer): str(why) for layer, why in found["not_measured"].items()},
            )
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
            raise BadLog(f"expected a log step, got {error!r}") from None


def issue_dict(issue: StabilityIssue) -> dict[str, Any]:
    """An issue as JSON types: NaN and infinities are None."""
    return plain(asdict(issue) | {"headline": issue.headline})


def plain(value: Any) -> Any:
    """A value as JSON types: NumPy's numbers are Python's, NaN and infinities None, other objects their text."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (str, int, bool)) else str(value)


def printable(text: str) -> str:
    """Text without control characters and halves of characters, for a terminal: a file may hold any."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", "�", text)


def _count(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 53:
        raise ValueError(f"expected a whole number >= 0, got {value!r}")
    return value


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


def _change(how: Any) -> str:
    if how not in CHANGES:
        raise ValueError(f"expected one of {CHANGES}, got {how!r}")
    return str(how)
