"""The states of a recurrent layer, so that a cache can go back to the positions that decoding may go back to.

A state sums up every token before a position, so it cannot be cut as keys and values can. Kept are a few whole states,
the anchors, and behind them the journal: what the layer's rule has read of each token. The state at any position is the
nearest anchor before it, and the rule run again over the journal from there, token by token as before. So a position
holds what was passed there last, as in a cache of keys and values: a verifier begins each window from the state that
the target left, and the target goes back to it.

A state is many times what its rule reads of a token (Qwen3.5-9B: 2.1 MB against 17 KB in a layer), and most drafts are
accepted, where nothing is run again: so the inputs are kept, not a state for each position.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

REACH = 64  # positions to go back at least, where nobody says what is settled
ENDING = 16  # tokens of a prompt's end that a template may write otherwise in the next turn


@dataclass(frozen=True)
class State:
    """A layer's state: the last channels before the convolution [K − 1, C], and matrices [heads, Dk, Dv] in float32.

    Its tensors are never written again.
    """

    window: torch.Tensor
    matrices: torch.Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of both."""
        return self.window.nbytes + (0 if self.matrices is None else self.matrices.nbytes)


@dataclass(frozen=True)
class Inputs:
    """What a rule reads of T tokens: channels before the convolution [T, C], and [T, 2, heads] in float32.

    The latter are what is left of the state, and how much of the token is written; [T, 2, 0] where there is no state.
    """

    channels: torch.Tensor
    rates: torch.Tensor

    def __len__(self) -> int:
        return len(self.channels)

    def __getitem__(self, tokens: slice) -> "Inputs":
        return Inputs(self.channels[tokens], self.rates[tokens])

    def copy(self) -> "Inputs":
        """A copy in memory of its own, as a part of a long pass would keep all of it."""
        return Inputs(self.channels.clone(), self.rates.clone())

    @property
    def nbytes(self) -> int:
        """Bytes of both."""
        return self.channels.nbytes + self.rates.nbytes


Advance = Callable[[State, Inputs], State]  # the rule, run over tokens whose outputs are known


class LayerStates:
    """Anchors and journal of one layer; the length that counts is the cache's.

    `settled` is a position before which nobody goes back, but to an anchor near the prompt's end (`prompt_length`),
    where the next turn of a conversation may begin to differ; None where nobody has said so, as while a prompt passes.
    `stand` is the cache's length, whose state is never dropped: a pass may end before all layers have had it.
    """

    def __init__(self, empty: State) -> None:
        self._anchors = {0: empty}
        self._journal: list[tuple[int, Inputs]] = []  # by first position, in order
        self.settled: int | None = None
        self.prompt_length = self.stand = 0

    def reachable(self, position: int) -> int:
        """The farthest position up to this one whose state is known."""
        end = self._before(position)
        for first, inputs in self._journal:
            if first <= end:
                end = max(end, first + len(inputs))
        return min(end, position)

    def at(self, position: int, advance: Advance) -> State:
        """The state in front of a position; what lies behind it is forgotten."""
        self._forget_from(position)
        anchor = self._before(position)
        state = self._anchors[anchor]
        for first, inputs in self._journal:
            if first <= anchor < first + len(inputs):
                state = advance(state, inputs[anchor - first :])
                anchor = first + len(inputs)
        if anchor != position:
            raise ValueError(f"no state is known at position {position}")
        self._anchors[position] = state
        return state

    def pieces(self, count: int) -> list[int]:
        """How a pass over so many tokens is cut: a prompt's end is short, so that few inputs are kept."""
        return [count] if count <= REACH or self.settled is not None else [count - REACH, REACH]

    def record(self, start: int, pieces: Sequence[tuple[Inputs, State]]) -> None:
        """Note the states behind the pieces of a pass at `start`, and what the rule has read of the last one."""
        end = start
        for inputs, state in pieces:
            first, end = end, end + len(inputs)
            self._anchors[end] = state
        self._journal.append((first, inputs if len(pieces) == 1 else inputs.copy()))
        self._tidy(start, end)

    @property
    def nbytes(self) -> int:
        """Bytes of all anchors, and of the journal."""
        states = sum(state.nbytes for state in self._anchors.values())
        return states + sum(inputs.nbytes for _, inputs in self._journal)

    def _before(self, position: int) -> int:
        return max(anchor for anchor in self._anchors if anchor <= position)

    def _forget_from(self, position: int) -> None:
        self._anchors = {anchor: state for anchor, state in self._anchors.items() if anchor <= position}
        cut = [(first, inputs[: position - first]) for first, inputs in self._journal if first < position]
        self._journal = [(first, inputs) for first, inputs in cut if len(inputs)]

    def _tidy(self, start: int, end: int) -> None:
        """Keep the anchor before what may still be gone back to, the last pass's ends, and few between them."""
        base = self._before(max(end - REACH, 0) if self.settled is None else min(self.settled, end))
        kept = {0, base, start, end, self._before(self.stand), self._before(max(self.prompt_length - ENDING, 0))}
        ends = {first + len(inputs) for first, inputs in self._journal}
        kept |= {first for first, _ in self._journal if first not in ends}  # what was passed before is not in it
        last = base
        for anchor in sorted(self._anchors):
            if anchor >= last + REACH:
                kept.add(anchor)
                last = anchor
        self._anchors = {anchor: state for anchor, state in self._anchors.items() if anchor in kept}
        self._journal = [(first, inputs) for first, inputs in self._journal if first + len(inputs) > base]
