"""The tables of README.md and docs/, and the charts, from bench/results/.

    python bench/report.py               # rewrites the tables of these pages, draws the charts into docs/assets/
    python bench/report.py FILE.json     # prints the tables of one file

A table there stands between two comments. The first one names the table and its source:

    <!-- core table of bench/results/forward_h200.json -->
    <!-- end -->

bench/tables.py lists the tables of each kind of file. bench/results/whole_step_NAME.json gives the charts
docs/assets/overhead_NAME.svg and docs/assets/memory_NAME.svg.
"""

import json
import re
import sys
from pathlib import Path

from charts import draw
from tables import machine_line, tables

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "docs/performance.md", "docs/concepts/soundness.md")
CHARTS = ROOT / "docs" / "assets"
MARKED = re.compile(r"(<!-- (\S+) table of (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def fill(text: str, root: Path) -> str:
    """The text with every marked table made anew; a table without its file stays as it is.

    Raises ValueError for a marked table that its file does not have.
    """

    def made(match: re.Match) -> str:
        begin, name, source, end = match.groups()
        path = root / source
        if not path.is_file():
            return match[0]
        found = tables(json.loads(path.read_text(encoding="utf-8")))
        if name not in found:
            raise ValueError(f"expected one of the tables {list(found)} of {source}, got {name!r}")
        return f"{begin}{found[name]}\n{end}"

    return MARKED.sub(made, text)


def show(path: Path) -> None:
    document = json.loads(path.read_text(encoding="utf-8"))
    found = tables(document)
    if not found:
        raise SystemExit(
            f"expected results of a benchmark that bench/tables.py knows, got {path}, which gives no table"
        )
    print(machine_line(document))
    for name, text in found.items():
        print(f"\n{name}:\n\n{text}")


def main(paths: list[str]) -> None:
    for path in paths:
        show(Path(path))
    if paths:
        return
    for name in PAGES:
        page = ROOT / name
        before = page.read_text(encoding="utf-8")
        after = fill(before, ROOT)
        page.write_text(after, encoding="utf-8")
        print(
            f"{name}: {len(MARKED.findall(after))} tables, {'changed' if after != before else 'as they were'}"
        )
    for path in sorted((ROOT / "bench" / "results").glob("whole_step_*.json")):
        document = json.loads(path.read_text(encoding="utf-8"))
        for chart in draw(document, CHARTS, path.stem.removeprefix("whole_step_")):
            print(chart.relative_to(ROOT))


if __name__ == "__main__":
    main(sys.argv[1:])
