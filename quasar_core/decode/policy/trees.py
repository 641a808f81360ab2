"""Verify a small tree in the place of a draft: beside some of its tokens, what else is likely in their places.

A tree costs a row for each node and yields one path, so the likeliest nodes are taken, the draft's and branches alike,
while the expected tokens ÷ the cost of the pass rise (SpecInfer, Miao et al., 2024, verifies trees; Sequoia, Chen et
al., 2024, shapes them by such probabilities; here the shape follows from measured costs too, step by step).
Whatever the tree, the text is the pass's own: at each node its own token is taken, greedy or drawn, and the child that
equals it is gone to. Letters: k draft tokens.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import mul

from quasar_core.decode.costs.pass_costs import Cost
from quasar_core.decode.policy.lengths import AdaptiveLength
from quasar_core.draft.acceptance import FADING
from quasar_core.draft.base import Draft, Drafter, Piece, first_pieces

SOURCE, WINDOW = "branch", "window"
DRAFTED = -1  # in the place of a rank
PRIOR_TRIALS, PRIOR_RIGHT = 4.0, 0.4  # of branches of a rank, before any was tried


@dataclass(frozen=True)
class Branch:
    """A token beside the draft's: behind which node, and how many likelier ones there were in its place."""

    parent: int
    token: int
    rank: int


@dataclass(frozen=True)
class Tree:
    """The nodes of a pass: the text's last token, the draft behind it, then the branches; each branch is a leaf."""

    last: int
    draft: Draft
    branches: tuple[Branch, ...] = ()

    @property
    def tokens(self) -> list[int]:
        """The token of each node."""
        return [self.last, *self.draft.tokens, *(branch.token for branch in self.branches)]

    @property
    def parents(self) -> list[int]:
        """The parent of each node, which stands before it; −1 for the first."""
        return [*range(-1, len(self.draft.tokens)), *(branch.parent for branch in self.branches)]

    def follow(self, chosen: Sequence[int]) -> list[int]:
        """The nodes behind the first that the pass's own token at each node leads through."""
        behind = {
            (parent, token): node for node, (parent, token) in enumerate(zip(self.parents, self.tokens, strict=True))
        }
        path, node = list[int](), behind.get((0, chosen[0]))
        while node is not None:
            path.append(node)
            node = behind.get((node, chosen[node]))
        return path

    def paths(self) -> Iterator[list[int]]:
        """The nodes from the first to the draft's last, and to each branch."""
        yield list(range(len(self.draft.tokens) + 1))
        for number, branch in enumerate(self.branches, start=len(self.draft.tokens) + 1):
            yield [*range(branch.parent + 1), number]

    def as_draft(self, path: Sequence[int]) -> Draft:
        """All nodes behind the first as one draft, those of the `path` before the others: as a step is recorded."""
        rest = (node for node in range(1, len(self.tokens)) if node not in path)
        return Draft(tuple(self.tokens[node] for node in (*path, *rest)), tuple(self.pieces(path)))

    def behind(self, count: int) -> "Tree":
        """What stands behind the first `count` tokens of the draft, beside which there are no branches."""
        kept = _last_pieces(self.draft.pieces, len(self.draft.tokens) - count)
        draft = Draft(self.draft.tokens[count:], tuple(kept))
        branches = (Branch(branch.parent - count, branch.token, branch.rank) for branch in self.branches)
        return Tree(self.tokens[count], draft, tuple(branches))

    def refuses_behind(self, path: Sequence[int]) -> bool:
        """Whether something was offered behind the last node of a path that ends there."""
        return (path[-1] if path else 0) in self.parents

    def pieces(self, path: Sequence[int]) -> list[Piece]:
        """The sources of all nodes behind the first, those of the `path` before the others."""
        known = len(self.draft.tokens)
        on_draft = sum(node <= known for node in path)
        before = first_pieces(self.draft.pieces, on_draft)
        rest = _last_pieces(self.draft.pieces, known - on_draft)
        sides = [(node, Piece(SOURCE, branch.rank, 1)) for node, branch in enumerate(self.branches, start=known + 1)]
        gained = [piece for node, piece in sides if node in path]
        return [*before, *gained, *rest, *(piece for node, piece in sides if node not in path)]


def _last_pieces(pieces: Sequence[Piece], count: int) -> list[Piece]:
    turned = first_pieces(pieces[::-1], count)
    return list(turned[::-1])


class BranchChances:
    """P(a branch is right | its rank, the node before it was reached): a running mean that forgets slowly."""

    def __init__(self) -> None:
        self._right: dict[int, float] = {}
        self._tried: dict[int, float] = {}

    def __call__(self, rank: int) -> float:
        """The estimate of a rank."""
        return (self._right.get(rank, 0.0) + PRIOR_RIGHT) / (self._tried.get(rank, 0.0) + PRIOR_TRIALS)

    def learn(self, tree: Tree, path: Sequence[int]) -> None:
        """Count the branches whose parents the path went through; a branch on it was right."""
        for node, branch in enumerate(tree.branches, start=len(tree.draft.tokens) + 1):
            if branch.parent == 0 or branch.parent in path:
                self._right[branch.rank] = self._right.get(branch.rank, 0.0) * FADING + (node in path)
                self._tried[branch.rank] = self._tried.get(branch.rank, 0.0) * FADING + 1.0


class Branching:
    """Chooses the branches of a generator's passes, and learns from what the passes found.

    `cost` is that of passes where it is another than the one that lengths follow from.
    """

    def __init__(self, length: AdaptiveLength, longest: int, cost: Cost | None = None) -> None:
        self._length, self._longest, self._cost = length, longest, cost or length.cost
        self._chances = BranchChances()

    def grow(
        self,
        last: int,
        draft: Draft,
        drafter: Drafter,
        reach: int,
        room: int,
        window: Sequence[int] = (),
        survivals: Sequence[float] = (),
    ) -> Tree:
        """The tree of a draft: at most `room` nodes in all, and no path of more than `reach` behind the first.

        A window may stand before the draft, whose tokens are right with probabilities `survivals`, each if those before
        are: no branch stands beside it. Of a long draft the end may be left out, where branches are likelier.
        """
        whole = Draft.of(window, WINDOW, 0).then(draft)
        room = min(room, self._longest)
        if self._length.limit <= 0 or room <= len(whole.tokens):
            return Tree(last, whole)
        alternatives = drafter.alternatives(draft.tokens)[:reach]
        chances = self._length.acceptance.of(draft)
        shape = choose_shape(draft, chances, alternatives, self._chances, self._cost, room, survivals)
        behind = (Branch(len(window) + branch.parent, branch.token, branch.rank) for branch in shape.branches)
        return Tree(last, whole.first(len(window) + shape.length), tuple(behind))

    def count(self, tree: Tree, path: Sequence[int]) -> None:
        """The pass went along `path`; its branches are counted."""
        self._chances.learn(tree, path)

    def learn(self, tree: Tree, path: Sequence[int], drafting_s: float, pass_s: float) -> None:
        """The pass went along `path`; its branches and its draft are both counted, and what it cost."""
        self.count(tree, path)
        on_draft = sum(node <= len(tree.draft.tokens) for node in path)
        self._length.learn(tree.draft, on_draft, drafting_s, pass_s, len(tree.branches), len(path) - on_draft)


@dataclass(frozen=True)
class Shape:
    """What a pass takes of a draft, and the branches beside it."""

    length: int
    branches: tuple[Branch, ...]


def choose_shape(
    draft: Draft,
    chances: Sequence[float],
    alternatives: Sequence[Sequence[int]],
    chance_of: BranchChances,
    cost: Cost,
    room: int,
    survivals: Sequence[float] = (),
) -> Shape:
    """The tree of at most `room` nodes for which the expected tokens ÷ the cost of the pass are most.

    `chances` are those of the draft's tokens, each if those before are right; `alternatives[i]` are the likeliest
    tokens behind node i, the draft's own among them; `survivals` those of a window before the draft, all of which
    stays. A node adds the probability that the pass's own tokens lead to it, which is no more than its parent's: so
    the n likeliest nodes are the best tree of n, and the draft's end goes where a branch is likelier. The pass is no
    smaller than the draft's own: how long that is was decided by whoever cut it, who now and then tries one that does
    not seem to pay.
    """
    waiting = [1.0, *accumulate(survivals, mul)]
    reached = [*accumulate(chances, mul, initial=waiting[-1])]
    own = [(-reach, DRAFTED, node) for node, reach in enumerate(reached[1:], start=1)]
    # Of equal nodes the draft's come first, and a parent before its child.
    nodes = sorted([*own, *_candidates(draft, reached, alternatives, chance_of)])[: room - len(waiting)]
    expected = [*accumulate((-node[0] for node in nodes), initial=sum(waiting))]
    rates = [expected[count] / cost(len(waiting) + count) for count in range(len(chances), len(expected))]
    best = len(chances) + rates.index(max(rates))
    branches = tuple(Branch(parent, alternatives[parent][rank], rank) for _, rank, parent in nodes[:best] if rank >= 0)
    return Shape(best - len(branches), branches)


def _candidates(
    draft: Draft, reached: Sequence[float], alternatives: Sequence[Sequence[int]], chance_of: BranchChances
) -> list[tuple[float, int, int]]:
    """What may stand beside the draft: minus the probability that the pass's tokens lead there, rank and parent."""
    by_rank = [chance_of(rank) for rank in range(max(map(len, alternatives), default=0))]
    return [
        (-reach * chance, rank, node)
        for node, (reach, likely, drafted) in enumerate(zip(reached, alternatives, (*draft.tokens, None), strict=False))
        for rank, (token, chance) in enumerate(zip(likely, by_rank, strict=False))
        if token >= 0 and token != drafted
    ]
