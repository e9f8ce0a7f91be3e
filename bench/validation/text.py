"""Byte-level text to train on: what every Python brings along, and a made-up copying task."""

from __future__ import annotations

import sysconfig
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

VOCABULARY = 256  # bytes
KINDS = ("python", "tables", "prose", "copy")
LIMIT = 3_000_000
_COPY_SYMBOLS, _COPY_LENGTH = 64, 24


@cache
def text(kind: str, held_out: bool = False) -> Tensor:
    """At most LIMIT bytes, uint8 (bytes,). Training and held-out text come from different files.

    python: the standard library's sources. tables: its tables of character sets. prose: its manual of the language;
    this one file is split. copy: random words, each of them written twice.
    Raises ValueError for another kind, and if this Python comes without its sources.
    """
    if kind == "copy":
        return _copies(1 if held_out else 0)
    folder = Path(sysconfig.get_paths()["stdlib"])
    patterns = {
        "python": ("*.py", "asyncio/*.py", "email/*.py", "json/*.py", "importlib/*.py", "http/*.py"),
        "tables": ("encodings/*.py",),
        "prose": ("pydoc_data/topics.py",),
    }
    if kind not in patterns:
        raise ValueError(f"expected text of a kind in {KINDS}, got {kind!r}")
    paths = sorted(path for pattern in patterns[kind] for path in folder.glob(pattern))
    if len(paths) == 1:
        whole = paths[0].read_bytes()
        cut = len(whole) * 7 // 8
        parts = [whole[cut:] if held_out else whole[:cut]]
    else:
        parts = [path.read_bytes() for number, path in enumerate(paths) if (number % 8 == 7) == held_out]
    found = b"".join(parts)[:LIMIT]
    if len(found) < 10_000:
        raise ValueError(
            f"expected sources of the standard library in {folder}, got {len(found)} bytes of {kind}"
        )
    return torch.frombuffer(bytearray(found), dtype=torch.uint8)


def _copies(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(_COPY_SYMBOLS, (LIMIT // (2 * _COPY_LENGTH), 1, _COPY_LENGTH), generator=generator)
    return words.expand(-1, 2, -1).reshape(-1).to(torch.uint8)


def starts(seed: int, steps: int, batch: int, length: int, context: int) -> Tensor:
    """Where the windows of each step begin in a text of that length, int64 (steps, batch)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(length - context - 1, (steps, batch), generator=generator)
