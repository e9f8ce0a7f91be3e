"""The report of the demo in the documentation, from a new run: python docs/make_report.py [FOLDER]

FOLDER: of an earlier `hnf-attention demo --out FOLDER`; without it the demo runs first, in a temporary folder.
Writes docs/assets/demo_report.html. What the run logs say of the machine is left out.
"""

from __future__ import annotations

import json
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from contextlib import closing
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from hnf_attention.report import html  # noqa: E402
from hnf_attention.run_log import RunLog  # noqa: E402

TARGET = ROOT / "docs" / "assets" / "demo_report.html"
RUNS = ("untreated", "treated")
PRIVATE = ("machine", "system", "process")


def without_machine(path: Path) -> None:
    """Take out of a run log where it was written."""
    with closing(sqlite3.connect(path)) as log, log:
        for number, about in log.execute("SELECT rowid, about FROM sessions").fetchall():
            told = json.loads(about)
            for name in PRIVATE:
                told.get("environment", {}).pop(name, None)
            log.execute("UPDATE sessions SET about = ? WHERE rowid = ?", (json.dumps(told), number))


def main(arguments: list[str]) -> None:
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        if arguments:
            for name in RUNS:
                shutil.copy(Path(arguments[0]) / f"{name}.db", folder)
        else:
            command = [sys.executable, "-m", "hnf_attention", "demo", "--out", str(folder)]
            subprocess.run(command, cwd=ROOT, check=True)
        for name in RUNS:
            without_machine(folder / f"{name}.db")
        with RunLog(folder / "untreated.db") as untreated, RunLog(folder / "treated.db") as treated:
            html(untreated, treated, title="hnf-attention demo", names=RUNS).save(TARGET)
    print(f"{TARGET.relative_to(ROOT)}: {TARGET.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main(sys.argv[1:])
