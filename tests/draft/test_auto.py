"""Several drafters as one: the best draft first, others where it ends, none where none pays."""

from collections.abc import Sequence

from quasar_core.draft.acceptance import Acceptance
from quasar_core.draft.auto import AutoDrafter
from quasar_core.draft.base import NO_DRAFT, Draft, Drafter, Piece


class Fixed(Drafter):
    """Always proposes the same tokens, which begin behind those that it proposed already."""

    def __init__(self, source: str, sureness: int, tokens: Sequence[int], wants_best: int = 0) -> None:
        self.source, self.sureness, self.tokens, self.wants_best = source, sureness, tuple(tokens), wants_best
        self.calls: list[tuple] = []

    def observe(self, tokens: Sequence[int]) -> None:
        self.calls.append(("observe", tuple(tokens)))

    def forget(self, count: int) -> None:
        self.calls.append(("forget", count))

    def propose(self, limit: int, after: Sequence[int] = ()) -> Draft:
        begun = sum(token in self.tokens for token in after)
        return Draft.of(self.tokens[begun : begun + max(limit, 0)], self.source, self.sureness)

    def see(self, tokens: Sequence[int], best: Sequence[Sequence[int]], start: int) -> None:
        self.calls.append(("see", tuple(tokens), tuple(map(tuple, best))))


def test_the_most_expected_tokens_win_and_others_go_on_behind() -> None:
    short, long = Fixed("short", 3, [1]), Fixed("long", 1, [7, 8, 9])
    draft = AutoDrafter([long, short], Acceptance()).propose(3)
    assert draft.tokens == (1, 7, 8)  # 0.75 expected tokens against 0.4 + 0.16 + 0.064
    assert draft.pieces == (Piece("short", 3, 1), Piece("long", 1, 2))


def test_of_equal_drafts_the_firsts_is_taken() -> None:
    assert AutoDrafter([Fixed("a", 1, [1]), Fixed("b", 1, [2])], Acceptance()).propose(1).tokens == (1,)


def test_a_drafter_that_does_not_pay_is_overtaken_within_a_few_steps() -> None:
    acceptance = Acceptance()
    auto = AutoDrafter([Fixed("wrong", 3, [1, 2]), Fixed("right", 1, [7, 8])], acceptance)
    steps = 0
    while auto.propose(2).pieces[0].source == "wrong":
        acceptance.count(auto.propose(2).pieces, 0)
        steps += 1
    assert steps <= 5


def test_an_unlikely_draft_is_not_made_longer() -> None:
    draft = AutoDrafter([Fixed("a", 0, range(20)), Fixed("b", 0, range(100, 130))], Acceptance()).propose(40)
    assert draft.tokens == tuple(range(100, 130))  # there is room for ten more, which are not asked for


def test_all_are_told_what_happens() -> None:
    one, other = Fixed("one", 1, []), Fixed("other", 1, [], wants_best=1)
    auto = AutoDrafter([one, other], Acceptance())
    assert auto.wants_best == 1
    auto.observe([1, 2])
    auto.forget(1)
    auto.see([1], [[5, 6]], 0)
    assert one.calls == [("observe", (1, 2)), ("forget", 1)]
    assert other.calls == [("observe", (1, 2)), ("forget", 1), ("see", (1,), ((5,),))]


def test_without_any_draft_there_is_none() -> None:
    assert AutoDrafter([Fixed("a", 1, [])], Acceptance()).propose(5) == NO_DRAFT
    assert AutoDrafter([Fixed("a", 1, [1])], Acceptance()).propose(0) == NO_DRAFT
