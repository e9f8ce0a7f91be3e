"""What setup.py hands to setuptools."""

import runpy
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]


def setup_arguments(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The arguments of `setuptools.setup`; skips the test outside of a checkout."""
    setuptools = pytest.importorskip("setuptools")
    if not (ROOT / "setup.py").is_file():
        pytest.skip("setup.py is in the checkout only")
    given: dict[str, Any] = {}
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: given.update(arguments))
    monkeypatch.chdir(ROOT)
    runpy.run_path(str(ROOT / "setup.py"))
    return given
