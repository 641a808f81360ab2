"""Charts as SVG, drawn at the width of a phone; colours are classes of the page's style, so they follow its theme.

Each says in its title what it shows; the numbers stand in a table beside it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

WIDTH = 360
LEFT, RIGHT = 118, 46  # of bars: room for names, and for values behind them
LINE = 26
SERIES = 8  # classes s0 to s7 of the style


@dataclass
class Drawing:
    """Elements, and how high they reach."""

    title: str
    height: float
    parts: list[str] = field(default_factory=list)

    def text(self, x: float, y: float, content: str, anchor: str = "start", kind: str = "") -> None:
        """A text on the line `y`."""
        self.parts.append(
            f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{kind}">{escape(content)}</text>'
        )

    def line(self, x1: float, y1: float, x2: float, y2: float, kind: str) -> None:
        """A straight line."""
        self.parts.append(f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{kind}"/>')

    def bar(self, x: float, y: float, width: float, height: float, kind: str, title: str = "") -> None:
        """A filled rectangle, which says `title` under the pointer."""
        inner = f"<title>{escape(title)}</title>" if title else ""
        self.parts.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(width, 0):.1f}" height="{height:.1f}" class="{kind}">'
            f"{inner}</rect>"
        )

    def dot(self, x: float, y: float, kind: str, title: str) -> None:
        """A point, which says `title` under the pointer."""
        self.parts.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" class="{kind}"><title>{escape(title)}</title></circle>'
        )

    def path(self, points: Sequence[tuple[float, float]], kind: str) -> None:
        """A line through points."""
        steps = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        self.parts.append(f'<polyline points="{steps}" class="{kind}"/>')

    def svg(self) -> str:
        """The whole."""
        return (
            f'<svg viewBox="0 0 {WIDTH} {self.height:.0f}" role="img" aria-label="{escape(self.title)}">'
            f"{''.join(self.parts)}</svg>"
        )


@dataclass(frozen=True)
class Range:
    """A name, a value and its interval; `shown` is how a table shows the value."""

    name: str
    value: float
    low: float | None
    high: float | None
    series: int
    shown: str


def ranges(title: str, rows: Sequence[Range]) -> str:
    """A point with its interval for each row, beside a line at 1."""
    drawing = Drawing(title, LINE * len(rows) + 34)
    ends = [end for row in rows for end in (row.value, row.low, row.high, 1.0) if end is not None]
    low, high = 0.0, max(ends) * 1.02
    room = WIDTH - LEFT - RIGHT

    def at(value: float) -> float:
        return LEFT + room * (value - low) / (high - low)

    bottom = LINE * len(rows) + 8
    for tick in ticks(low, high):
        drawing.line(at(tick), 4, at(tick), bottom, "grid")
        drawing.text(at(tick), bottom + 16, f"{tick:g}×", "middle", "tick")
    drawing.line(at(1.0), 4, at(1.0), bottom, "one")
    for number, row in enumerate(rows):
        y = LINE * number + 20
        said = f"{row.name}: {row.shown}"
        if row.low is not None and row.high is not None:
            drawing.line(at(row.low), y, at(row.high), y, f"whisker s{row.series % SERIES}")
            said += f", 95 % interval {row.low:.2f} to {row.high:.2f}"
        drawing.text(LEFT - 10, y + 4, row.name, "end")
        drawing.dot(at(row.value), y, f"s{row.series % SERIES}", said)
        drawing.text(WIDTH - 2, y + 4, row.shown, "end", "value")
    return drawing.svg()


def histogram(title: str, counts: Sequence[int], series: int) -> str:
    """A bar for each number of accepted tokens, as shares of the steps."""
    total, top, bottom = sum(counts), 18.0, 118.0
    drawing = Drawing(title, 146)
    slot = (WIDTH - 8) / max(len(counts), 6)
    most = max(counts) / total
    for length, count in enumerate(counts):
        height = (bottom - top) * count / total / most
        x = 4 + slot * length
        drawing.bar(
            x + slot * 0.12, bottom - height, slot * 0.76, height, f"s{series % SERIES}",
            f"{length} accepted: {count} of {total} steps",
        )  # fmt: skip
        if count and slot >= 20:
            drawing.text(x + slot / 2, bottom - height - 4, f"{100 * count / total:.0f}", "middle", "tick")
        if slot >= 20 or length % 4 == 0:
            drawing.text(x + slot / 2, bottom + 14, str(length), "middle", "tick")
    drawing.line(4, bottom, WIDTH - 4, bottom, "axis")
    drawing.text(WIDTH / 2, bottom + 27, "accepted tokens of a draft (% of steps with one)", "middle", "tick")
    return drawing.svg()


PARTS = ("draft", "verify", "confirm", "other")


def stacked(title: str, rows: Sequence[tuple[str, Sequence[float]]]) -> str:
    """A bar of shares for each row."""
    drawing = Drawing(title, LINE * len(rows) + 8)
    room = WIDTH - LEFT - 8
    for number, (name, shares) in enumerate(rows):
        y, x = LINE * number + 4.0, float(LEFT)
        drawing.text(LEFT - 10, y + 14, name, "end")
        for part, (label, share) in enumerate(zip(PARTS, shares, strict=True)):
            drawing.bar(x, y, room * share, 18, f"part{part}", f"{name}: {label} {100 * share:.1f} %")
            if share > 0.12:
                drawing.text(x + room * share / 2, y + 13, f"{100 * share:.0f} %", "middle", f"on{part}")
            x += room * share
    return drawing.svg()


@dataclass(frozen=True)
class Curve:
    """Milliseconds by tokens, and the floor that is the same for all."""

    name: str
    points: Sequence[tuple[int, float]]
    floor: float | None
    series: int


def curves(title: str, found: Sequence[Curve]) -> str:
    """A line for each model, and a dashed one at its floor."""
    drawing = Drawing(title, 232)
    left, right, top, bottom = 44.0, WIDTH - 10.0, 12.0, 190.0
    widest = max(tokens for curve in found for tokens, _ in curve.points)
    highest = 1.08 * max(ms for curve in found for _, ms in curve.points)

    def at(tokens: float, ms: float) -> tuple[float, float]:
        return left + (right - left) * tokens / widest, bottom - (bottom - top) * ms / highest

    for tick in ticks(0, highest):
        y = at(0, tick)[1]
        drawing.line(left, y, right, y, "grid")
        drawing.text(left - 6, y + 4, f"{tick:g}", "end", "tick")
    for tokens in (1, 8, 16, 24, 32):
        if tokens <= widest:
            drawing.text(at(tokens, 0)[0], bottom + 16, str(tokens), "middle", "tick")
    drawing.text((left + right) / 2, bottom + 34, "milliseconds, by the tokens of a pass", "middle", "tick")
    for curve in found:
        kind = f"s{curve.series % SERIES}"
        drawing.path([at(*point) for point in curve.points], f"curve {kind}")
        for tokens, ms in curve.points:
            drawing.dot(*at(tokens, ms), f"small {kind}", f"{curve.name}: {tokens} tokens, {ms:.2f} ms")
        if curve.floor is not None:
            y = at(0, curve.floor)[1]
            drawing.line(left, y, right, y, f"floor {kind}")
    return drawing.svg()


def ticks(low: float, high: float) -> list[float]:
    """Round numbers between, four to eight of them."""
    raw = (high - low) / 5
    unit = 10 ** math.floor(math.log10(raw))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= raw)
    first = math.ceil(low / step)
    return [round(step * number, 10) for number in range(first, math.floor(high / step) + 1)]
