"""Small pieces of HTML: escaped text, tables with a caption and heads, chapters."""

from collections.abc import Iterable, Sequence
from html import escape

MISSING = "–"


def tag(name: str, content: str = "", **attributes: object) -> str:
    """An element; `content` is HTML, attributes are escaped. A trailing _ of a name is dropped, others become -."""
    shown = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return f"<{name}{shown}>{content}</{name}>"


def table(caption: str, heads: Sequence[str], rows: Iterable[Sequence[str]], texts: int = 1) -> str:
    """A table of texts that scrolls by itself where it is wide; the first `texts` columns stand to the left."""
    head = "".join(
        tag("th", escape(one), scope="col", class_=None if i < texts else "n") for i, one in enumerate(heads)
    )
    body = "".join(tag("tr", _cells(row, texts)) for row in rows)
    whole = tag("caption", escape(caption)) + tag("thead", tag("tr", head)) + tag("tbody", body)
    return tag("div", tag("table", whole), class_="scrolls", role="region", aria_label=caption, tabindex=0)


def _cells(row: Sequence[str], texts: int) -> str:
    first = tag("th", escape(row[0]), scope="row")
    return first + "".join(
        tag("td", escape(cell), class_=None if i < texts else "n") for i, cell in enumerate(row[1:], start=1)
    )


def behind(rows_table: str) -> str:
    """A table that a chart is drawn from, folded away."""
    return tag("details", tag("summary", "The numbers of this chart") + rows_table)


def chapter(name: str, title: str, *content: str) -> str:
    """A section with its heading, to be linked to."""
    return tag(
        "section",
        tag("h2", escape(title), id=f"{name}-title") + "".join(content),
        id=name,
        aria_labelledby=f"{name}-title",
    )


def number(value: float | None, digits: int = 2, unit: str = "") -> str:
    """A number that may not exist."""
    return MISSING if value is None else f"{value:.{digits}f}{unit}"
