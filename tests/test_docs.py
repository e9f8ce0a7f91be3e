"""The documentation says what the code says: its generated parts, its examples, its links."""

import ast
import importlib
import importlib.util
import json
import re
import sys
from pathlib import Path
from textwrap import dedent

import pytest
from heads import snapshot
from report_parts import Parts

from hnf_attention.diagnosis import diagnose
from hnf_attention.run_log import RunLog, RunLogWriter

ROOT = Path(__file__).resolve().parents[1]
if not (ROOT / "mkdocs.yml").is_file():
    pytest.skip("the documentation is in the checkout only", allow_module_level=True)

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PYTHON = re.compile(r"^( *)```python\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\((?!https?:|#)([^)#\s]+)(?:#([^)\s]+))?[^)]*\)")


def script(name: str):
    """A script of docs/ as a module."""
    specification = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


def test_the_readme_is_short_and_its_screenshot_is_small():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150
    assert (ROOT / "docs" / "assets" / "demo.png").stat().st_size < 200_000


def test_the_report_of_the_demo_is_small_and_says_nothing_of_a_machine(monkeypatch, tmp_path):
    report = script("make_report")
    assert report.TARGET.stat().st_size < 1_000_000
    found = json.loads(Parts(report.TARGET.read_text(encoding="utf-8")).scripts["report"])
    assert [run["name"] for run in found["runs"]] == list(report.RUNS)
    # The treated run made up for the steps that its rewind gave up.
    assert [run["steps"][-1] for run in found["runs"]] == [400, 435]
    for run in found["runs"]:
        assert run["stories"]
        for session in run["sessions"]:
            assert session["run"]["seed"] == 0 and not set(session["environment"]) & set(report.PRIVATE)
    writer = RunLogWriter(tmp_path / "a.db", about={"seed": 1})
    writer.write(diagnose([snapshot(1, a={})]))
    writer.close()
    report.without_machine(tmp_path / "a.db")
    with RunLog(tmp_path / "a.db") as log:
        (session,) = log.sessions
    assert session["run"] == {"seed": 1} and set(session["environment"]) == {"versions"}


def test_the_page_of_thresholds_is_the_table_of_the_code(monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    thresholds = script("make_thresholds")
    text = thresholds.PAGE.read_text(encoding="utf-8")
    assert thresholds.filled(text) == text, "expected the table of `python docs/make_thresholds.py`"
    with pytest.raises(ValueError, match="expected one place"):
        thresholds.filled("no comments")


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_examples_are_python_and_import_what_there_is(page):
    for _, code in PYTHON.findall(page.read_text(encoding="utf-8")):
        for node in ast.walk(ast.parse(dedent(code))):
            if (
                isinstance(node, ast.ImportFrom)
                and not node.level
                and node.module.split(".")[0] == "hnf_attention"
            ):
                if node.module.endswith(".lightning"):
                    pytest.importorskip("lightning")
                module = importlib.import_module(node.module)
                missing = [alias.name for alias in node.names if not hasattr(module, alias.name)]
                assert not missing, f"{node.module} has no {missing}"


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_lead_to_files(page):
    for target, _ in LINK.findall(page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), f"expected {target} to exist"


def test_the_demos_output_is_quoted_without_the_consoles_line_breaks():
    pytest.importorskip("PIL")
    screenshot = script("make_screenshot")
    lines = ["step 5", "step 40: EARLY WARNING (loss 2.84)", "    warning: x in y"]
    output = "\n".join([*lines, "    head 3   ", "    will collapse   ", "step 41", ""])
    assert screenshot.block(output, "EARLY WARNING")[2:] == ["head 3", "will collapse"]
    lines = screenshot.alert(output, "EARLY WARNING", 80)
    assert lines == ["step 40: EARLY WARNING (loss 2.84)", "    warning: x in y", "    head 3 will collapse"]


def test_argument_lines_of_docstrings_become_lists():
    pytest.importorskip("griffe")
    text = "Watch.\n\nlog_every: each\n    step.\nsample, step: numbers.\nRaises ValueError.\n\nNote: not one of ours."
    found = script("docstrings").as_lists(text).splitlines()
    assert found[3:6] == ["- **log_every**: each", "    step.", "- **sample, step**: numbers."]
    assert found[6:8] == ["", "Raises ValueError."]
