"""The table of docs/thresholds.md, from hnf_attention/diagnosis/thresholds.py.

python docs/make_thresholds.py    # writes it between the two comments of the page
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from hnf_attention.diagnosis.thresholds import THRESHOLDS  # noqa: E402  a script finds its own checkout first

PAGE = ROOT / "docs" / "thresholds.md"
MARKED = re.compile(r"(<!-- thresholds, by docs/make_thresholds.py -->\n).*?(<!-- end -->)", re.DOTALL)


def table() -> str:
    """One row a threshold, in the order of the source."""
    rows = [
        (f"`{name}`", f"{entry.value:g}", entry.unit, entry.source.replace("|", "\\|"))
        for name, entry in THRESHOLDS.items()
    ]
    lines = [("name", "value", "unit", "source"), ("---",) * 4, *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def filled(page: str) -> str:
    """The page with its table made anew. Raises ValueError for a page without the two comments."""
    text, places = MARKED.subn(lambda match: f"{match[1]}{table()}\n{match[2]}", page)
    if places != 1:
        raise ValueError(f"expected one place for the table of thresholds, got {places}")
    return text


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
