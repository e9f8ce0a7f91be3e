"""Snapshots as lines of JSON: everything of every head, for people's own scripts."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from ..diagnosis import AttentionDiagnosis
from ..versions import versions
from .series import LayerKeys

FORMAT = 1


class JSONLWriter:
    """Appends each snapshot to a file as one line, which is on its way to the disk when `write` returns.

    A snapshot's line is `AttentionDiagnosis.to_dict()`: step, issues, and per layer each statistic as a list
    of one number per head (six digits; NaN and infinities are null), with `kind` "snapshot" and the `time`
    (seconds of the epoch). Before the first one stands a line of `kind` "run": the layers' numbers in
    TensorBoard and W&B, and the versions. A resumed run appends to the file; see `read_jsonl`.
    """

    def __init__(self, path: str | PathLike[str]):
        self.path = Path(path)
        self._keys = LayerKeys()

    def write(self, diagnosis: AttentionDiagnosis) -> None:
        lines = []
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


@dataclass(frozen=True)
class JSONLLog:
    """What a file of a `JSONLWriter` holds: layer keys (`layer_03`) to names, and the snapshots by step."""

    layers: dict[str, str]
    snapshots: list[dict[str, Any]]


def read_jsonl(path: str | PathLike[str]) -> JSONLLog:
    """Read back what a `JSONLWriter` wrote.

    Where a run was resumed from an earlier step, what it did again replaces what was there before. A line
    that a crash cut short is left out. Raises OSError for a file that cannot be read.
    """
    layers: dict[str, str] = {}
    snapshots: list[dict[str, Any]] = []
    with Path(path).open(encoding="utf-8", errors="replace") as file:
        for text in file:
            try:
                line = json.loads(text)
            except ValueError:
                continue
            if line["kind"] == "run":
                layers = line["layers"]
            else:
                while snapshots and snapshots[-1]["step"] >= line["step"]:
                    snapshots.pop()
                snapshots.append(line)
    return JSONLLog(layers, snapshots)


def _short(value: Any) -> Any:
    """Six digits of every number that is not whole: more would say nothing, and double the file."""
    if isinstance(value, dict):
        return {key: _short(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_short(item) for item in value]
    if isinstance(value, float) and not value.is_integer():
        return float(f"{value:.6g}")
    return value
