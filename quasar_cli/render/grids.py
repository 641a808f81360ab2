"""Tables built once, as grids of texts, and drawn for a terminal, as Markdown, or as LaTeX."""

import re
from dataclasses import dataclass

from rich.markup import escape
from rich.table import Table

from quasar_cli.render.fitted import FittedTable


@dataclass(frozen=True)
class Column:
    """A head of up to two lines; numbers stand to the right."""

    name: str
    group: str = ""
    number: bool = True


@dataclass(frozen=True)
class Grid:
    """A table of texts."""

    title: str
    columns: list[Column]
    rows: list[list[str]]


def as_table(grid: Grid) -> Table:
    """The grid for a terminal: the first line of a head once for the columns it spans, a repeated first cell blank."""
    two_lines = any(column.group for column in grid.columns)
    table = FittedTable(title=grid.title)
    previous = ""
    for column in grid.columns:
        top = column.group if column.group != previous else ""
        head = f"{top}\n{column.name}" if two_lines else column.name
        table.add_column(escape(head), justify="right" if column.number else "left")
        previous = column.group
    first = None
    for row in grid.rows:
        table.add_row("" if row[0] == first else escape(row[0]), *map(escape, row[1:]))
        first = row[0]
    return table


def as_markdown(grid: Grid) -> str:
    """The grid as a Markdown table under its title."""
    heads = [f"{column.group} {column.name}".strip() for column in grid.columns]
    rules = ["---:" if column.number else ":---" for column in grid.columns]
    lines = [heads, rules, *grid.rows]
    body = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
    return f"**{grid.title}**\n\n{body}\n"


_LATEX = {"\\": r"\textbackslash{}", "×": r"$\times$", "÷": r"$\div$", "–": "--", "≥": r"$\geq$", "→": r"$\to$"}
_LATEX |= {mark: f"\\{mark}" for mark in "&%$#_{}"} | {"~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}


def as_latex(grid: Grid) -> str:
    """The grid as a LaTeX table; it needs the package booktabs."""
    places = "".join("r" if column.number else "l" for column in grid.columns)
    lines = [[_in_latex(cell) for cell in row] for row in grid.rows]
    body = "\n".join(" & ".join(line) + r" \\" for line in [[_in_latex(one.name) for one in grid.columns], *lines])
    head, _, rows = body.partition("\n")
    groups = _latex_groups(grid)
    return "\n".join(
        [r"\begin{table}", rf"\caption{{{_in_latex(grid.title)}}}", rf"\begin{{tabular}}{{{places}}}", r"\toprule"]
        + ([groups] if groups else [])
        + [head, r"\midrule", rows, r"\bottomrule", r"\end{tabular}", r"\end{table}", ""]
    )


def _latex_groups(grid: Grid) -> str:
    """The first line of a head of two, each group over the columns that it spans."""
    if not any(column.group for column in grid.columns):
        return ""
    spans: list[tuple[str, int]] = []
    for column in grid.columns:
        if spans and column.group and spans[-1][0] == column.group:
            spans[-1] = column.group, spans[-1][1] + 1
        else:
            spans.append((column.group, 1))
    cells = (rf"\multicolumn{{{width}}}{{c}}{{{_in_latex(name)}}}" if name else "" for name, width in spans)
    return " & ".join(cells) + r" \\"


def _in_latex(text: str) -> str:
    return re.sub("|".join(map(re.escape, _LATEX)), lambda found: _LATEX[found.group()], text)
