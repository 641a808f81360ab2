"""Answers that are free until they begin a tool call, which then follows a grammar to its end.

What begins a call is known by the text, however it is cut into tokens: as long as a text is free, only those tokens are
forbidden that would begin a call and go on in it as the grammar does not. The grammar holds the opening too, so a
token may hold the opening's end and more. Letters: T rows of a pass, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from quasar_core.decode.logits.grammar import GrammarRule, Grammars


@dataclass(frozen=True)
class Trigger:
    """What begins a call, and where it does not.

    `only_first`: only in front of all other text, white space aside. An answer that begins with `thinking[0]`, or as if
    behind it with `inside`, begins no call before `thinking[1]`. `shown` are special tokens that are text.
    """

    opening: str
    only_first: bool = False
    thinking: tuple[str, str] | None = None
    inside: bool = False
    shown: tuple[str, ...] = ()
    closes: bool = True  # whether text may follow a call


@dataclass(frozen=True)
class Place:
    """Where in an answer a token stands: `tail` is what may yet become a mark.

    In a call, `opened` are tokens of its text up to the end of the one that opened it, and `start` the number of the
    answer's tokens by then.
    """

    kind: Literal["start", "thinking", "free", "said", "call"]
    tail: bytes = b""
    opened: tuple[int, ...] = ()
    start: int = 0


class TriggeredRule:
    """Implements `answering.TokenRule`, for an answer whose first token stands at `begin`."""

    def __init__(self, grammars: Grammars, grammar: str, trigger: Trigger, begin: int) -> None:
        self._grammars, self._trigger, self.begin = grammars, trigger, begin
        self._rule: GrammarRule = grammars.rule(grammar, begin)
        self._texts = grammars.token_texts(trigger.shown)
        self._opening = trigger.opening.encode("utf-8")
        self._openers = [i for i, text in enumerate(self._texts) if self._opening[-1:] in text]
        first = Place("thinking" if trigger.inside else "start" if trigger.thinking else "free")
        self._answer: list[int] = []
        self._places = [first]  # in front of each token of the answer, and behind the last
        self._forbidden: dict[Place, list[int]] = {}

    def allowed(self, text: Sequence[int], draft: Sequence[int]) -> int:
        """How many tokens of a draft may stand."""
        answer = list(text[self.begin :])
        for i, token in enumerate(draft):
            if not self._allows([*answer, *draft[:i]], token):
                return i
        return len(draft)

    def __call__(self, logits: torch.Tensor, prefix: Sequence[int], continuation: Sequence[int]) -> torch.Tensor:
        """Logits [T, V] with −∞ for what is forbidden; rows behind a forbidden or last token stay."""
        answer, logits = list(prefix[self.begin :]), logits.clone()
        for row in range(len(logits)):
            if row > 0:
                token = continuation[row - 1]
                if token in self._grammars.eos_ids or not self._allows(answer, token):
                    break
                answer.append(token)
            place = self._follow(answer)
            if place.kind == "call":
                self._rule.follow([*place.opened, *answer[place.start :]])
                logits[row].masked_fill_(~self._rule.mask().to(logits.device), -torch.inf)
            else:
                logits[row, self._forbidden_at(place)] = -torch.inf
        return logits

    def _allows(self, answer: list[int], token: int) -> bool:
        place = self._follow(answer)
        if place.kind != "call":
            return token not in self._forbidden_at(place)
        return self._rule.allows([*place.opened, *answer[place.start :]], token)

    def _follow(self, answer: list[int]) -> Place:
        """The place behind an answer; what is known of one that began alike is kept."""
        common = next((i for i, (old, new) in enumerate(zip(self._answer, answer, strict=False)) if old != new), None)
        known = min(len(self._answer), len(answer)) if common is None else common
        del self._places[known + 1 :]
        for number in range(known, len(answer)):
            self._places.append(self._behind(self._places[-1], answer, number))
        self._answer = list(answer)
        return self._places[-1]

    def _behind(self, place: Place, answer: list[int], number: int) -> Place:
        """The place behind the answer's token of that number, which stands at `place`."""
        if place.kind != "call":
            place = self._step(place, self._texts[answer[number]], number + 1)
        if place.kind == "call" and self._trigger.closes:
            self._rule.follow([*place.opened, *answer[place.start : number + 1]])
            if self._rule.is_whole():
                return Place("free")
        return place

    def _forbidden_at(self, place: Place) -> list[int]:
        """Tokens that would begin a call which the grammar does not know."""
        if place not in self._forbidden:
            self._forbidden[place] = [token for token in self._openers if self._opens_wrongly(place, token)]
        return self._forbidden[place]

    def _opens_wrongly(self, place: Place, token: int) -> bool:
        behind = self._step(place, self._texts[token], 0)
        return behind.kind == "call" and not self._rule.begins_with(behind.opened)

    def _step(self, place: Place, text: bytes, number: int) -> Place:
        """The place behind a text that begins at `place`, and ends with the answer's first `number` tokens."""
        text = place.tail + text
        if place.kind == "start":
            return self._begin(text, number)
        if place.kind == "thinking":
            return self._think(text, number)
        if place.kind == "free":
            return self._open(text, number)
        return place

    def _begin(self, text: bytes, number: int) -> Place:
        assert self._trigger.thinking is not None
        mark, given = self._trigger.thinking[0].encode("utf-8"), text.lstrip()
        if given.startswith(mark):
            return self._think(given[len(mark) :], number)
        return Place("start", text) if mark.startswith(given) else self._open(text, number)

    def _think(self, text: bytes, number: int) -> Place:
        assert self._trigger.thinking is not None
        mark = self._trigger.thinking[1].encode("utf-8")
        at = text.find(mark)
        return Place("thinking", _end_in(text, mark)) if at < 0 else self._open(text[at + len(mark) :], number)

    def _open(self, text: bytes, number: int) -> Place:
        if self._trigger.only_first:
            given = text.lstrip()
            if not given.startswith(self._opening):
                return Place("free", given) if self._opening.startswith(given) else Place("said")
            at = len(text) - len(given)
        else:
            at = text.find(self._opening)
        if at < 0:
            return Place("free", _end_in(text, self._opening))
        return Place("call", opened=self._grammars.tokens_of(text[at:]), start=number)


def _end_in(text: bytes, mark: bytes) -> bytes:
    """The longest end of a text that begins a mark."""
    lengths = range(min(len(text), len(mark) - 1), 0, -1)
    return next((text[-length:] for length in lengths if mark.startswith(text[-length:])), b"")
