"""Tables that fit the terminal with every word whole: in parts of their columns, or a row at a time."""

import textwrap
from collections.abc import Iterator, Sequence

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.table import Column, Table
from rich.text import Text

_GAP = 1  # between columns


class FittedTable(Table):
    """Where a table is too wide, its columns of numbers go into several, each with the labels, which stand to the left.

    Where the labels alone are too wide, each row becomes a list of its cells.
    """

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Draw the title, then the parts."""
        if self.title:
            yield Text(str(self.title), style="bold")
        parts = _parts(self.columns, options.max_width)
        if parts is None:
            yield from _rows_apart(self.columns)
        else:
            for part in parts:
                yield _draw(part, options.max_width)
                yield Text("")


def _parts(columns: Sequence[Column], width: int) -> list[list[Column]] | None:
    """Columns that fit side by side, the labels in each part; None where the labels and one more do not."""
    count = next((place for place, column in enumerate(columns) if column.justify == "right"), len(columns))
    labels, others = list(columns[:count]), columns[count:]
    groups: list[list[Column]] = []
    for column in others:
        if groups and str(column.header).startswith("\n"):  # stands under the first line of the one before it
            groups[-1].append(column)
        else:
            groups.append([column])
    if _needed(labels) > width or any(_needed([*labels, *group]) > width for group in groups):
        return None
    parts = [labels]
    for group in groups:
        if _needed([*parts[-1], *group]) > width:
            parts.append(labels)
        parts[-1] = [*parts[-1], *group]
    return parts


def _needed(columns: Sequence[Column]) -> int:
    return sum(_least(column) for column in columns) + _GAP * (len(columns) - 1)


def _least(column: Column) -> int:
    """The width that a column needs: of numbers the longest cell, of texts the longest word."""
    cells = _plain(column)
    whole = cells if column.justify == "right" else [word for cell in cells for word in cell.split()]
    return max(map(cell_len, [*str(column.header).split(), *whole]), default=0)


def _most(column: Column) -> int:
    """The width that a column would like to have."""
    if column.justify == "right":
        return _least(column)
    return max(map(cell_len, [*str(column.header).split("\n"), *_plain(column)]), default=0)


def _plain(column: Column) -> list[str]:
    return [Text.from_markup(str(cell)).plain for cell in column.cells]


def _draw(columns: Sequence[Column], width: int) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=0)  # columns stand _GAP apart, which the box fills
    spare = width - _needed(columns)
    for column in columns:
        more = min(spare, _most(column) - _least(column))
        spare -= more
        wide = _least(column) + more
        table.add_column(_head(str(column.header), wide), justify=column.justify, overflow="fold", width=wide)
    for cells in zip(*(column.cells for column in columns), strict=True):
        table.add_row(*cells)
    return table


def _head(text: str, width: int) -> str:
    """A head on as many lines as it takes; its first line may name a group."""
    lines = [textwrap.fill(line, max(width, 1), break_long_words=False) for line in text.split("\n")]
    return "\n".join(lines)


def _rows_apart(columns: Sequence[Column]) -> Iterator[RenderableType]:
    for cells in zip(*(column.cells for column in columns), strict=True):
        row = Table(box=None, pad_edge=False, show_header=False)
        row.add_column(style="cyan", no_wrap=True)
        row.add_column(overflow="fold")
        for column, cell in zip(columns, cells, strict=True):
            row.add_row(" ".join(str(column.header).split()), cell)
        yield row
        yield Text("")
