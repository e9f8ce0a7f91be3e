"""The logic of the report's page, in Node."""

import shutil
import subprocess
from importlib.resources import files
from pathlib import Path

import pytest

NODE = shutil.which("node")


@pytest.mark.skipif(NODE is None, reason="Node is not installed")
def test_the_page_s_logic():
    script = Path(__file__).with_name("report_page.test.mjs")
    folder = str(files("hnf_attention.report.page"))
    done = subprocess.run([NODE, str(script), folder], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
