"""A table that fits the width of its console: it leaves out columns rather than cutting words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, JustifyMethod, RenderResult
from rich.table import Table
from rich.text import Text

_FRAME = 3  # columns of the screen that a column takes beside its text: a line and two spaces
_NARROWEST = 12  # what is left of a column whose words wrap


@dataclass(frozen=True)
class Column:
    """One column of a `FittedTable`.

    title, cells: texts; lines are kept.
    rank: columns of the highest rank are left out first; those of rank 0 stay.
    """

    title: str
    cells: Sequence[Text]
    rank: int = 0
    justify: JustifyMethod = "right"

    @property
    def width(self) -> int:
        """Of the longest line."""
        lines = [
            line for text in (self.title, *(cell.plain for cell in self.cells)) for line in text.split("\n")
        ]
        return max(map(cell_len, lines))


class FittedTable:
    """Columns beside each other, as many as fit. If those of rank 0 alone do not fit, their words wrap."""

    def __init__(self, title: str, columns: Sequence[Column]):
        self.title = title
        self.columns = list(columns)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        kept = list(self.columns)
        while _width(kept) > options.max_width and any(column.rank for column in kept):
            kept.remove(max(kept, key=lambda column: column.rank))
        table = Table(title=Text(self.title), title_justify="left", header_style="bold", title_style="bold")
        first = kept[0]
        whole = first.width + _FRAME + (_NARROWEST + _FRAME) * (len(kept) - 1) < options.max_width
        for column in kept:
            table.add_column(
                column.title,
                justify=column.justify,
                overflow="fold",
                no_wrap=column is first and whole,
            )
        for cells in zip(*(column.cells for column in kept), strict=True):
            table.add_row(*cells)
        yield table
        left_out = [" ".join(column.title.split()) for column in self.columns if column not in kept]
        if left_out:
            yield Text(f"in a wider terminal: {', '.join(left_out)}", style="dim")


def _width(columns: Sequence[Column]) -> int:
    return sum(column.width + _FRAME for column in columns) + 1
