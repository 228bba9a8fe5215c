"""Tables as text: drawn by rich where it is installed, and as plain lines where it is not."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, field

#: Characters of a line.
WIDTH = 110


@dataclass
class Table:
    """A table to print.

    Attributes:
        title: above it.
        headings: of its columns; none for a list of names and values.
        rows: their cells.
    """

    title: str
    headings: tuple[str, ...] = ()
    rows: list[tuple[str, ...]] = field(default_factory=list)

    def add_row(self, *cells: str) -> None:
        """Add a row."""
        self.rows.append(cells)


def render(tables: Sequence[Table]) -> str:
    """Tables as text, one below the other."""
    try:
        from rich.console import Console
        from rich.markup import escape
        from rich.table import Table as Drawing
    except ModuleNotFoundError:
        return "\n\n".join(map(_plain, tables))
    text = io.StringIO()
    console = Console(file=text, width=WIDTH, color_system=None)
    for table in tables:
        drawing = Drawing(*map(escape, table.headings), title=escape(table.title), show_header=bool(table.headings))
        for row in table.rows:
            drawing.add_row(*map(escape, row))
        console.print(drawing)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())


def _plain(table: Table) -> str:
    lines = (table.headings, *table.rows) if table.headings else table.rows
    return "\n".join([table.title, *("  " + " | ".join(cells) for cells in lines)])
