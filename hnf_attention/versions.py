"""The version of this package, and of the software that a document came from."""

from __future__ import annotations

import platform
import sys

# The single source: setup.py reads it here, so the installed metadata says the same.
__version__ = "0.2.0"
DISTRIBUTION = "hnf-attention"


def versions(*packages: str) -> dict[str, str | None]:
    """Version of Python and of each distribution; None for one that is not installed.

    An imported one tells its own version: that of torch names its build (+cu130), which the metadata may leave out.
    """
    from importlib.metadata import PackageNotFoundError, version  # slow to import, and rarely needed

    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in packages:
        try:
            # Of a source checkout the metadata may be missing, or be those of another installation.
            own = (
                __version__
                if package == DISTRIBUTION
                else getattr(sys.modules.get(package), "__version__", None)
            )
            found[package] = str(own or version(package))
        except PackageNotFoundError:
            found[package] = None
    return found
