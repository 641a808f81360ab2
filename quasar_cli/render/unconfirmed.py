"""Show in a terminal, dimmed behind the confirmed text, the tokens that still wait for the target's word.

The cursor stays where the confirmed text ends: what waits is drawn behind it, and the cursor goes back. So whatever
comes next first clears all that lies behind the cursor.
"""

import shutil
from collections.abc import Callable, Sequence

from rich.cells import cell_len

CLEAR, DIM, PLAIN = "\x1b[J", "\x1b[2m", "\x1b[0m"
LEFT_ROWS = 2  # of the terminal, that are not drawn over


class Unconfirmed:
    """Writes text, and what waits behind it; `decode` makes text of tokens."""

    def __init__(
        self,
        write: Callable[[str], None],
        decode: Callable[[Sequence[int]], str],
        size: Callable[[], tuple[int, int]] = shutil.get_terminal_size,
    ) -> None:
        self._write, self._decode, self._size = write, decode, size
        self._column = 0  # where the confirmed text ends; a full line's end is its width
        self._is_drawn = False

    def add(self, text: str) -> None:
        """Write confirmed text, in the place of what waited."""
        self._write(self._cleared() + text)
        width, _ = self._size()
        self._column = place_behind(text, self._column, width)[1]

    def show(self, tokens: Sequence[int]) -> None:
        """Draw what waits now."""
        width, height = self._size()
        shown = " ".join(filter(str.isprintable, self._decode(tokens).replace("\n", " ↵ ").split(" ")))
        rows, _ = place_behind(shown, self._column, width)
        while rows > max(height - LEFT_ROWS, 0):
            shown = shown[: -max(len(shown) // 8, 1)]
            rows, _ = place_behind(shown, self._column, width)
        if not shown or self._column >= width:  # at a line's very end no cursor can go back
            self._write(self._cleared())
            return
        up = f"\x1b[{rows}A" if rows else ""
        self._write(f"{self._cleared()}{DIM}{shown}{PLAIN}{up}\x1b[{self._column + 1}G")
        self._is_drawn = True

    def _cleared(self) -> str:
        """What clears the drawn text, where there is some."""
        was, self._is_drawn = self._is_drawn, False
        return CLEAR if was else ""


def place_behind(text: str, column: int, width: int) -> tuple[int, int]:
    """How many rows further down a terminal's cursor stands behind a text, and its column, from 0 to the width."""
    rows = 0
    for character in text:
        if character == "\n":
            rows, column = rows + 1, 0
            continue
        cells = 8 - column % 8 if character == "\t" else cell_len(character)
        if column + cells > width:
            rows, column = rows + 1, 0
        column += cells
    return rows, column
