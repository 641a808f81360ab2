"""Tables of facts: what the commands print, drawn with rich."""

from collections.abc import Iterable

from rich.markup import escape
from rich.table import Table

from quasar_cli.render.fitted import FittedTable


def text_table(title: str | None, *columns: str) -> Table:
    """A table of texts, every column to the left."""
    table = FittedTable(title=title)
    for column in columns:
        table.add_column(column)
    return table


def number_table(title: str, *columns: str) -> Table:
    """A table of numbers: the first column names the row, the others stand to the right."""
    table = text_table(title, *columns)
    for column in table.columns[1:]:
        column.justify = "right"
    return table


def facts_table(facts: Iterable[tuple[str, str]]) -> Table:
    """Two columns without a head: what, and its value."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts:
        table.add_row(name, escape(value))
    return table


def as_bytes(count: float) -> str:
    """Bytes in decimal units: 16.4 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def as_ratio(value: float | None, digits: int = 2, unit: str = "") -> str:
    """A number that may not exist, as where nothing was drafted."""
    return "–" if value is None else f"{value:.{digits}f}{unit}"
