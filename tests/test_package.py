"""The package itself: its public names, imported when they are used, and its version."""

import ast
import importlib.metadata
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

import hnf_attention

PACKAGE = Path(hnf_attention.__file__).parent
HEAVY = ("torch", "transformers", "matplotlib", "triton", "rich", "numpy")


def fresh(code):
    """What a fresh interpreter prints that runs the code beside this package."""
    path = f"import sys; sys.path[:0] = {[str(PACKAGE.parent)]!r}\n"
    done = subprocess.run([sys.executable, "-W", "error", "-c", path + code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_the_import_alone_imports_nothing_heavy():
    code = f"import hnf_attention\nprint(*(name for name in {HEAVY} if name in sys.modules))"
    assert fresh(code) == []


@pytest.mark.parametrize(
    "arguments", [["--help"], *([name, "--help"] for name in ("demo", "analyze", "check", "trace", "doctor"))]
)
def test_a_help_text_imports_nothing_heavy(arguments):
    code = f"""
import contextlib, io
from hnf_attention.cli.main import main
with contextlib.redirect_stdout(io.StringIO()) as text, contextlib.suppress(SystemExit):
    main({arguments})
assert "usage: hnf-attention" in text.getvalue()
print(*(name for name in {HEAVY} if name in sys.modules))
"""
    assert fresh(code) == []


@pytest.mark.slow
def test_public_names_come_from_a_star_import_and_from_attributes():
    code = """
from hnf_attention import *
import hnf_attention
print(*(name for name in hnf_attention.__all__ if globals()[name] is not getattr(hnf_attention, name)))
import hnf_attention.instrumentation.interceptors.sdpa as s
assert callable(hnf_attention.instrument) and s.NAME
assert hnf_attention.theory.required_bits and hnf_attention.integrations.JSONLWriter
"""
    assert fresh(code) == []


def test_the_names_for_type_checkers_are_those_at_run_time():
    """A type checker reads the imports under TYPE_CHECKING, the interpreter a table."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    (branch,) = (
        node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    )
    imported = {
        alias.name: f".{node.module}"
        for node in branch.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert imported == hnf_attention._HOME
    assert sorted({*imported, *hnf_attention._ALIASES}) == hnf_attention.__all__
    assert set(hnf_attention.__all__) <= set(dir(hnf_attention))


def test_public_objects_are_pickled_by_name():
    for name in hnf_attention.__all__:
        value = getattr(hnf_attention, name)
        assert pickle.loads(pickle.dumps(value)) is value
    report = hnf_attention.StabilityReport(verdict="stable")
    assert pickle.loads(pickle.dumps(report)) == report


def test_old_names_are_aliases_and_unknown_ones_an_error():
    assert hnf_attention.Ranks is hnf_attention.ProcessGroups
    with pytest.raises(AttributeError, match="'hnf_attention' has no attribute 'attend'"):
        hnf_attention.attend  # noqa: B018
    with pytest.raises(ImportError):
        from hnf_attention import attend  # noqa: F401


def test_a_name_is_replaced_where_it_is_looked_up(monkeypatch):
    monkeypatch.setattr(hnf_attention, "attention", "mine")
    assert hnf_attention.attention == "mine"


def test_the_version_is_that_of_the_installation():
    if PACKAGE.parent.name != "site-packages":
        pytest.skip("of a checkout, another version may be installed")
    assert hnf_attention.__version__ == importlib.metadata.version("hnf-attention")


def test_setup_reads_the_version_that_the_package_has():
    setup = PACKAGE.parent / "setup.py"
    if not setup.is_file():
        pytest.skip("setup.py is in the checkout only")
    command = [sys.executable, "setup.py", "--version"]
    done = subprocess.run(command, cwd=setup.parent, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("without setuptools")
    assert done.stdout.split()[-1] == hnf_attention.__version__


def test_the_package_is_marked_as_typed():
    assert (PACKAGE / "py.typed").is_file()
