"""Tables of reports for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

    from fisedit_compile.pipelines import Report


def report_table(title: str, columns: Mapping[str, Report]) -> Table:
    """A table with one column for each report.

    Args:
        title: of the table.
        columns: the reports by their headings.
    """
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(title))
    table.add_column("", no_wrap=True)
    for heading in columns:
        table.add_column(heading, justify="right")
    rows = [dict(report.rows()) for report in columns.values()]
    titles = list(dict.fromkeys(name for row in rows for name in row))
    # The total belongs after all stages, also those that only later columns have.
    order = sorted(titles, key=lambda name: max(list(row).index(name) if name in row else -1 for row in rows))
    for name in order:
        table.add_row(name, *(row.get(name, "") for row in rows))
    return table


def notes(reports: Mapping[str, Report]) -> list[str]:
    """The reports' notes, each with the heading of its report."""
    return [f"{heading}: {note}" for heading, report in reports.items() for note in report.notes]
