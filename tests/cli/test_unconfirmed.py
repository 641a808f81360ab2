"""What waits is drawn dimmed behind the text and goes without a trace: a small terminal shows what is left."""

import re

from hypothesis import given
from hypothesis import strategies as st

from quasar_cli.render.unconfirmed import Unconfirmed

TEXTS = st.text(st.sampled_from("ab ä語\n"), max_size=40)
WIDTH, HEIGHT = 9, 6


class Screen:
    """A terminal of `WIDTH` columns that never ends: rows of cells, a cursor, and the few sequences that are used."""

    def __init__(self) -> None:
        self.rows, self.row, self.column = [[" "] * WIDTH], 0, 0
        self.dimmed = False

    def write(self, text: str) -> None:
        for sequence, plain in re.findall(r"\x1b\[(\d*[JAGm])|([^\x1b])", text):
            self._obey(sequence) if sequence else self._put(plain)

    def _obey(self, sequence: str) -> None:
        number, kind = int(sequence[:-1] or 0), sequence[-1]
        if kind == "m":
            self.dimmed = number == 2
        elif kind == "A":
            self.row -= number
        elif kind == "G":
            self.column = number - 1
        else:
            self.rows = self.rows[: self.row + 1]
            self.rows[-1][self.column :] = [" "] * (WIDTH - self.column)

    def _put(self, character: str) -> None:
        cells = 2 if character == "語" else 1
        if character == "\n" or self.column + cells > WIDTH:
            self.row, self.column = self.row + 1, 0
        if character == "\n":
            self._reach()
            return
        self._reach()
        self.rows[self.row][self.column : self.column + cells] = [character] + [""] * (cells - 1)
        self.column += cells

    def _reach(self) -> None:
        while len(self.rows) <= self.row:
            self.rows.append([" "] * WIDTH)

    def shown(self) -> list[str]:
        return ["".join(row) for row in self.rows]


def shown_of(text: str) -> list[str]:
    screen = Screen()
    screen.write(text)
    return screen.shown()


@given(st.lists(st.tuples(TEXTS, TEXTS), max_size=6))
def test_text_stands_as_if_nothing_had_waited(steps: list[tuple[str, str]]) -> None:
    screen, confirmed = Screen(), ""
    writer = Unconfirmed(screen.write, lambda tokens: "".join(map(chr, tokens)), lambda: (WIDTH, HEIGHT))
    for text, waiting in steps:
        writer.add(text)
        confirmed += text
        row, column = screen.row, screen.column
        writer.show([ord(character) for character in waiting])
        assert (screen.row, screen.column, screen.dimmed) == (row, column, False)
        assert len(screen.rows) <= row + HEIGHT
    writer.add("")
    assert screen.shown() == shown_of(confirmed)


def test_what_waits_is_seen() -> None:
    screen = Screen()
    writer = Unconfirmed(screen.write, lambda tokens: "a" * len(tokens), lambda: (WIDTH, HEIGHT))
    writer.add("xy")
    writer.show([1] * 9)
    assert screen.shown() == ["xyaaaaaaa", "aa       "]
    writer.show([1])
    assert screen.shown() == ["xya      "]
    writer.add("z")
    assert screen.shown() == ["xyz      "]
