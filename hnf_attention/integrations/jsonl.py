"""Snapshots as lines of JSON: everything of every head, for people's own scripts."""

from __future__ import annotations

import json
import time
import warnings
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from ..diagnosis import AttentionDiagnosis
from ..diagnosis.issue import FORMER_ISSUE_TYPES
from ..versions import versions
from .series import LayerKeys

FORMAT = 2
_LONGEST = 1 << 28  # characters of a line; the rest of a longer one is no line of ours
# Of format 1, which version 0.1 wrote: a snapshot's kind was "reading", and these statistics had other names.
_FORMER_STATISTICS = {
    "entropy_ratio": "normalized_entropy",
    "entropy_ratio_min": "normalized_entropy_min",
    "entropy_ratio_p10": "normalized_entropy_p10",
    "entropy_ratio_stderr": "normalized_entropy_stderr",
    "dead_share": "saturated_share",
    "dead_share_stderr": "saturated_share_stderr",
}


class JSONLWriter:
    """Appends each snapshot to a file as one line, which is on its way to the disk when `write` returns.

    A snapshot's line has `kind` "snapshot", the `time` (seconds of the epoch), and what
    `AttentionDiagnosis.to_dict()` gives: the step, the issues, and each statistic of each layer as a list of one
    number per head, to six digits. NaN and infinities are null. The first line has `kind` "run": the layers'
    numbers in TensorBoard and W&B, and the versions. A resumed run appends to the file; see `read_jsonl`.
    """

    def __init__(self, path: str | PathLike[str]):
        self.path = Path(path)
        self._keys = LayerKeys()

    def write(self, diagnosis: AttentionDiagnosis) -> None:
        """Append a diagnosis. Raises OSError if the file cannot be written."""
        lines: list[dict[str, Any]] = []
        if self._keys.add(diagnosis.stats):
            software = versions("hnf-attention", "torch")
            run = {"kind": "run", "format": FORMAT, "versions": software, "layers": self._keys.names()}
            lines.append(run)
        lines.append({"kind": "snapshot", "time": time.time()} | _short(diagnosis.to_dict()))
        text = "".join(f"{json.dumps(line, allow_nan=False)}\n" for line in lines)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # Opened anew each time: nothing is left to close, and a file that was moved away does not matter.
        with self.path.open("a+b") as file:
            if file.tell():
                file.seek(-1, 2)
                if file.read(1) != b"\n":  # a crash cut the last line short; ours are to stay whole
                    text = f"\n{text}"
            file.write(text.encode())


@dataclass(frozen=True, repr=False)
class JSONLLog:
    """What a file of a `JSONLWriter` holds: layer keys (`layer_03`) to names, and the snapshots by step."""

    layers: dict[str, str]
    snapshots: list[dict[str, Any]]

    def __repr__(self) -> str:
        steps = [line["step"] for line in self.snapshots]
        span = f" of steps {steps[0]} to {steps[-1]}" if steps else ""
        return f"JSONLLog of {len(self.layers)} layers: {len(steps)} snapshots{span}"

    @property
    def readings(self) -> list[dict[str, Any]]:
        """The name of `snapshots` in version 0.1; deprecated."""
        warnings.warn("JSONLLog.readings is now snapshots", DeprecationWarning, stacklevel=2)
        return self.snapshots


def read_jsonl(path: str | PathLike[str]) -> JSONLLog:
    """Read back what a `JSONLWriter` wrote.

    If a run was resumed from an earlier step, what it did again replaces what was there before. A line that a
    crash cut short is left out. Lines of version 0.1 get today's names.
    Raises OSError for a file that cannot be read, ValueError for one that no `JSONLWriter` wrote.
    """
    layers: dict[str, str] = {}
    snapshots: list[dict[str, Any]] = []
    with Path(path).open(encoding="utf-8", errors="replace") as file:
        while text := file.readline(_LONGEST):
            try:
                line = json.loads(text)
            except (ValueError, RecursionError):
                continue
            try:
                if line["kind"] == "run":
                    layers = {str(key): str(layer) for key, layer in line["layers"].items()}
                    continue
                snapshot = _renamed(line) if line["kind"] == "reading" else line
                step = snapshot["step"] = int(line["step"])
            except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
                raise ValueError(
                    f"expected lines of a JSONLWriter in {path}, got one with {error!r}"
                ) from None
            while snapshots and snapshots[-1]["step"] >= step:
                snapshots.pop()
            snapshots.append(snapshot)
    return JSONLLog(layers, snapshots)


def _renamed(line: dict[str, Any]) -> dict[str, Any]:
    """A snapshot's line of format 1 with today's names."""
    issues = [
        {**issue, "issue_type": FORMER_ISSUE_TYPES.get(issue["issue_type"], issue["issue_type"])}
        for issue in line["issues"]
    ]
    layers = {
        layer: {_FORMER_STATISTICS.get(name, name): values for name, values in statistics.items()}
        for layer, statistics in line["layers"].items()
    }
    return {**line, "kind": "snapshot", "issues": issues, "layers": layers}


def _short(value: Any) -> Any:
    """Every number that is not whole, to six digits: more would say nothing and double the file."""
    if isinstance(value, dict):
        return {key: _short(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_short(item) for item in value]
    if isinstance(value, float) and not value.is_integer():
        return float(f"{value:.6g}")
    return value
