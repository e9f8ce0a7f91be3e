"""Packages that only some users have."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType


def require(module: str, extra: str) -> ModuleType:
    """Import the module. Raises ImportError, naming the extra to install, if its package is missing."""
    try:
        return import_module(module)
    except ImportError as error:
        raise ImportError(
            f"expected {module} to be importable, got {type(error).__name__}: {error}; "
            f"pip install 'hnf-attention[{extra}]'"
        ) from error
