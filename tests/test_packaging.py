"""What is installed: every package, the kernels inside the package, and nothing else."""

import importlib.metadata
from pathlib import Path

import pytest
from setup_arguments import setup_arguments

ROOT = Path(__file__).resolve().parents[1]


def packages(folder: Path, name: str) -> set[str]:
    """The folders of Python files as package names; `folder` is `name`."""
    places = {path.parent.relative_to(folder).parts for path in folder.rglob("*.py")}
    return {".".join((name, *parts)) for parts in places} | {name}


def test_setup_lists_every_package(monkeypatch):
    given = setup_arguments(monkeypatch)
    wanted = packages(ROOT / "hnf_attention", "hnf_attention")
    wanted |= packages(ROOT / "kernels", "hnf_attention.kernels")
    assert len(given["packages"]) == len(wanted) and set(given["packages"]) == wanted
    assert given["package_dir"]["hnf_attention.kernels"] == "kernels"
    held = {path.name for path in (ROOT / "hnf_attention").rglob("*") if path.is_file()}
    data = {name for names in given["package_data"].values() for name in names}
    assert {name for name in held if not name.endswith((".py", ".pyc"))} == data


def test_the_installation_holds_the_kernels_inside_the_package():
    """A `kernels` beside it would shadow the Hugging Face package of that name."""
    try:
        files = importlib.metadata.files("hnf-attention") or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("hnf-attention is not installed")
    installed = {file.as_posix() for file in files}
    if "hnf_attention/__init__.py" not in installed or "setup.py" in installed:
        pytest.skip("an editable installation holds no files, and a build in the checkout lists sources")
    assert {"hnf_attention/py.typed", "hnf_attention/__main__.py"} <= installed
    assert "hnf_attention/cli/sample_text.txt" in installed
    held = {file.split("/")[2] for file in installed if file.startswith("hnf_attention/kernels/")}
    assert {"shared", "portable", "hopper", "measure"} <= held
    tops = {
        file.split("/")[0] for file in installed if not file.startswith("..")
    }  # the command lies elsewhere
    assert {top for top in tops if not top.endswith(".dist-info")} == {"hnf_attention"}
    if (ROOT / "hnf_attention").is_dir():
        sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "hnf_attention").rglob("*.py")}
        sources |= {f"hnf_attention/{path.relative_to(ROOT)}" for path in (ROOT / "kernels").rglob("*.py")}
        assert sources == {file for file in installed if file.endswith(".py")}
