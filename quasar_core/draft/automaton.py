"""A suffix automaton of a growing text: every run of tokens that it holds, how often it occurs, and what follows."""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

ROOT = 0
NONE = -1
# Tokens that can be taken back one by one; beyond them the automaton is built anew.
UNDOABLE = 1024
# Classes of suffixes whose counts a token brings up to date. Only text that repeats itself over and over has more.
CHAIN = 32


@dataclass
class _Change:
    """What one token changed: enough to undo it."""

    last: int
    transitions: list[tuple[int, int]] = field(default_factory=list)  # state, and its former target or NONE
    split: tuple[int, int] | None = None  # the state that was split, and its former link
    favourites: list[tuple[int, int]] = field(default_factory=list)  # state, and its former favourite


class SuffixAutomaton:
    """The suffix automaton of Blumer et al. (1985), built online, with counts, and the usual successor of each state.

    A state stands for runs of tokens that end at the same places of the text; `length` is that of the longest, `link`
    leads to the longest suffix that ends at more places, `count` is the number of places, `favourite` the token that
    followed most often there, of equal ones the latest. Growing by a token takes amortised constant time, and counting
    at most CHAIN steps: of runs beyond that, which only repetitive text has, counts lag behind.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Begin anew, with an empty text."""
        self.text: list[int] = []
        self.next: list[dict[int, int]] = [{}]
        self.link, self.length, self.count, self.favourite = [NONE], [0], [0], [NONE]
        self.last = ROOT
        self._changes: deque[_Change] = deque(maxlen=UNDOABLE)

    def extend(self, tokens: Sequence[int]) -> None:
        """The text goes on."""
        for token in tokens:
            change = _Change(self.last)
            self._append(token, change)
            self._count(token, change)
            self._changes.append(change)
            self.text.append(token)

    def forget(self, count: int) -> None:
        """Take the last `count` tokens back: what is left is what would be if they had never come."""
        if count > len(self._changes):
            kept = self.text[: len(self.text) - count]
            self.clear()
            self.extend(kept)
            return
        for _ in range(count):
            self._undo(self._changes.pop())

    @property
    def repeated(self) -> tuple[int, int]:
        """The longest suffix of the text that it held before: its state and length."""
        state = max(self.link[self.last], ROOT)
        return state, self.length[state]

    def step(self, state: int, length: int, token: int) -> tuple[int, int]:
        """The longest suffix of a run and a token behind it that the text holds: its state and length."""
        while state != ROOT and token not in self.next[state]:
            state = self.link[state]
            length = self.length[state]
        target = self.next[state].get(token)
        return (ROOT, 0) if target is None else (target, length + 1)

    def follow(self, state: int, length: int, limit: int) -> Iterator[tuple[int, int]]:
        """What usually comes after a run of a state: at most `limit` tokens, each with the length of the run before it.

        Where the text ends, a shorter run is followed; with none left it ends.
        """
        while limit > 0 and state != ROOT:
            token = self.favourite[state]
            if token == NONE:
                state = self.link[state]
                length = self.length[state]
                continue
            yield token, length
            state = self.next[state][token]
            length += 1
            limit -= 1

    def _new_state(self, length: int, link: int, count: int, favourite: int, following: dict[int, int]) -> int:
        self.length.append(length)
        self.link.append(link)
        self.count.append(count)
        self.favourite.append(favourite)
        self.next.append(following)
        return len(self.next) - 1

    def _append(self, token: int, change: _Change) -> None:
        """Add the state of the whole text, and the transitions of its suffixes to it."""
        new = self._new_state(self.length[self.last] + 1, ROOT, 0, NONE, {})
        state = self.last
        while state != NONE and token not in self.next[state]:
            self.next[state][token] = new
            change.transitions.append((state, NONE))
            state = self.link[state]
        if state != NONE:
            target = self.next[state][token]
            if self.length[target] > self.length[state] + 1:
                target = self._split(state, token, change)
            self.link[new] = target
        self.last = new

    def _split(self, state: int, token: int, change: _Change) -> int:
        """Give the shorter runs of a target, which now end at a place more, a state of their own."""
        target = self.next[state][token]
        copy = self._new_state(
            self.length[state] + 1,
            self.link[target],
            self.count[target],
            self.favourite[target],
            dict(self.next[target]),
        )
        change.split = target, self.link[target]
        self.link[target] = copy
        while state != NONE and self.next[state].get(token) == target:
            self.next[state][token] = copy
            change.transitions.append((state, target))
            state = self.link[state]
        return copy

    def _count(self, token: int, change: _Change) -> None:
        """Count the new place of each suffix, and what has now followed the suffixes of the text before."""
        state = self.last
        for _ in range(CHAIN):
            self.count[state] += 1
            state = self.link[state]
            if state == NONE:
                break
        state = change.last
        for _ in range(CHAIN):
            self._prefer(state, token, change)
            state = self.link[state]
            if state == NONE:
                break

    def _prefer(self, state: int, token: int, change: _Change) -> None:
        former = self.favourite[state]
        if former == token:
            return
        following = self.next[state]
        if former == NONE or self.count[following[token]] >= self.count[following[former]]:
            change.favourites.append((state, former))
            self.favourite[state] = token

    def _undo(self, change: _Change) -> None:
        token = self.text.pop()
        for state, former in reversed(change.favourites):
            self.favourite[state] = former
        state = self.last
        for _ in range(CHAIN):
            self.count[state] -= 1
            state = self.link[state]
            if state == NONE:
                break
        for state, target in reversed(change.transitions):
            if target == NONE:
                del self.next[state][token]
            else:
                self.next[state][token] = target
        if change.split:
            state, link = change.split
            self.link[state] = link
        for _ in range(2 if change.split else 1):
            for values in (self.next, self.length, self.link, self.count, self.favourite):
                values.pop()
        self.last = change.last
