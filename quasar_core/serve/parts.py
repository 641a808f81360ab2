"""Split an answer, as it comes, into what was thought, what is said, and tool calls."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from quasar_core.serve.served import END_OF_THINKING, THINK
from quasar_core.serve.tools import ToolCall, ToolForm, Tools


@dataclass(frozen=True)
class Part:
    """Some text of one kind, or a whole tool call."""

    kind: Literal["reasoning", "content", "call"]
    text: str = ""
    call: ToolCall | None = None


def join_parts(parts: Iterable[Part]) -> list[Part]:
    """Join texts of one kind that follow one another."""
    joined: list[Part] = []
    for part in parts:
        if joined and part.call is None and joined[-1].kind == part.kind:
            joined[-1] = Part(part.kind, joined[-1].text + part.text)
        else:
            joined.append(part)
    return joined


class AnswerParts:
    """Takes an answer piece by piece. Text that may be the beginning of a mark waits; a tool call comes whole.

    `thinks` is whether the answer may begin with thinking, `inside` whether the prompt opened it already. At most
    `most_calls` calls are told, and those behind them left out.
    """

    def __init__(
        self,
        thinks: bool,
        inside: bool = False,
        form: ToolForm | None = None,
        tools: Tools = (),
        most_calls: int | None = None,
    ) -> None:
        self._state: Literal["start", "thinking", "content", "call"] = "start" if thinks else "content"
        if inside:
            self._state = "thinking"
        self._form, self._tools, self._buffer, self._most_calls = form, tools, "", most_calls
        self._fresh = thinks or inside  # whether the line breaks that come next belong to a mark
        self._said = False
        self.calls = 0

    def add(self, text: str) -> list[Part]:
        """The parts that are finished by a piece of text."""
        self._buffer += text
        parts: list[Part] = []
        while self._advance(parts):
            pass
        return parts

    def finish(self) -> list[Part]:
        """What waited until the end."""
        parts: list[Part] = []
        if self._state == "call":
            self._read_call(self._buffer, parts)
        elif self._state == "thinking":
            self._emit(parts, "reasoning", self._buffer)
        else:
            self._emit(parts, "content", self._buffer.rstrip() if self.calls else self._buffer)
        self._buffer = ""
        return parts

    def _advance(self, parts: list[Part]) -> bool:
        """Take what is certain off the buffer; whether there may be more."""
        steps = {"start": self._start, "thinking": self._think, "content": self._say, "call": self._call}
        return steps[self._state](parts)

    def _start(self, parts: list[Part]) -> bool:
        text = self._buffer.lstrip()
        if text.startswith(THINK):
            self._state, self._buffer = "thinking", text.removeprefix(THINK)
            return True
        if THINK.startswith(text):
            return False
        self._state, self._fresh = "content", False
        return True

    def _think(self, parts: list[Part]) -> bool:
        at = self._buffer.find(END_OF_THINKING)
        if at < 0:
            self._emit(parts, "reasoning", self._take(len(self._buffer) - _held(self._buffer, END_OF_THINKING, "\n")))
            return False
        self._emit(parts, "reasoning", self._buffer[:at].rstrip("\n"))
        self._buffer = self._buffer[at + len(END_OF_THINKING) :]
        self._state, self._fresh = "content", True
        return True

    def _say(self, parts: list[Part]) -> bool:
        if self._form is None:
            self._emit(parts, "content", self._take(len(self._buffer)))
            return False
        at = self._opening_at(self._form)
        if at is not None:
            self._emit(parts, "content", self._take(at).rstrip())
            self._state = "call"
            return True
        self._emit(parts, "content", self._take(len(self._buffer) - _held(self._buffer, self._form.opening, None)))
        return False

    def _opening_at(self, form: ToolForm) -> int | None:
        """Where a call opens."""
        at = self._buffer.find(form.opening)
        if at < 0 or (form.only_first and (self._said or self._buffer[:at].strip())):
            return None
        return at

    def _call(self, parts: list[Part]) -> bool:
        assert self._form is not None
        closing = self._form.closing
        at = self._buffer.find(closing) if closing is not None else -1
        if closing is None or at < 0:
            return False
        self._fresh = self._read_call(self._take(at + len(closing)), parts)
        self._state = "content"
        return True

    def _read_call(self, block: str, parts: list[Part]) -> bool:
        """The calls of a block; what is none is text, as the model wrote it. Whether it held calls."""
        assert self._form is not None
        calls = self._form.read(block, self._tools)
        if calls is None:
            self._emit(parts, "content", block)
            return False
        told = calls if self._most_calls is None else calls[: max(self._most_calls - self.calls, 0)]
        self.calls += len(told)
        parts += [Part("call", call=call) for call in told]
        return True

    def _take(self, length: int) -> str:
        text, self._buffer = self._buffer[:length], self._buffer[length:]
        return text

    def _emit(self, parts: list[Part], kind: Literal["reasoning", "content"], text: str) -> None:
        if self._fresh:
            text = text.lstrip("\n")
            self._fresh = not text
        if text:
            parts.append(Part(kind, text))
            self._said = self._said or kind == "content"


def _held(text: str, mark: str, white: str | None) -> int:
    """Length of the end of a text that may belong to a mark: the mark's beginning, and white space before it."""
    lengths = range(min(len(text), len(mark) - 1), 0, -1)
    overlap = next((length for length in lengths if mark.startswith(text[-length:])), 0)
    return len(text) - len(text[: len(text) - overlap].rstrip(white))
