"""Which model checks a draft: by hand, and against simulations of simpler rules in a world of known chances."""

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from helpers.tiny_models import TableModel, make_pair

from quasar_core.config import GenerationConfig
from quasar_core.decode.costs.cost_records import CostRecord
from quasar_core.decode.costs.pass_costs import PairCosts, PassCost
from quasar_core.decode.generator import Generator
from quasar_core.decode.policy import window_values
from quasar_core.decode.policy.agreement import AgreementCurve, Estimate, RunningAgreement, agreements_of
from quasar_core.decode.policy.check import REPLANNED, UNSEEN, Check, Checker, choose_check
from quasar_core.decode.policy.checking import Checking
from quasar_core.decode.policy.lengths import FixedLength
from quasar_core.decode.policy.window_values import (
    LEVELS,
    LONGER_WINDOWS,
    MAX_WINDOW,
    Means,
    WindowValues,
    best_values,
    better_values,
    prospect_of,
)
from quasar_core.draft.acceptance import Acceptance
from quasar_core.draft.base import Draft
from quasar_core.records import MarginTable

TELLING = MarginTable([0.5, 2.0], [500, 1500, 8000], [300, 1350, 7980])
HOPELESS = MarginTable([], [1000], [50])
DEAR = PairCosts(PassCost((1, 33), (3.0, 4.0)), PassCost((1, 33), (3.0, 4.0)))
WORTHLESS = 0.05  # tokens: a hundredth of what a confirm yields
FLAT = PairCosts(PassCost((1, 33), (1.0, 1.6)), PassCost((1, 33), (3.0, 4.0)))
STEEP = PairCosts(PassCost((1, 33), (1.0, 9.0)), PassCost((1, 33), (3.0, 19.0)))
CHEAP = PairCosts(PassCost((1, 33), (1.0, 1.6)), PassCost((1, 33), (10.0, 12.0)))
NEVER, RARE, LONG = (((1.0, 0, 0.0),), ((0.6, 0, 0.0), (0.4, 3, 0.5)), ((0.5, 0, 0.0), (0.2, 4, 0.6), (0.3, 15, 0.97)))
Choose = Callable[[int, float, list[float], list[float]], Check]
Drafts = Sequence[tuple[float, int, float]]  # how often, of how many tokens, each right with what chance


@dataclass
class World:
    """Text whose drafts and agreements are drawn: what each pass yields, and what it takes."""

    costs: PairCosts
    curve: AgreementCurve
    drafts: Drafts
    seed: int = 0

    def run(
        self, choose: Callable[[int, float, list[float], list[float]], Check], count: int, told: Checker | None
    ) -> float:
        """Tokens per second of `count` committed tokens, decided by `choose`; `told` learns."""
        luck, seconds, committed = random.Random(self.seed), 0.0, 0
        running = told.agreement if told else RunningAgreement(self.curve)
        window: list[tuple[Estimate, bool]] = []
        while committed < count:
            _, length, chance = luck.choices(self.drafts, [often for often, _, _ in self.drafts])[0]
            survival = 1.0
            for estimate, _ in window:
                survival *= estimate.p
            mean = float(self.curve.values @ self.curve.weights)
            check = choose(len(window), survival, [chance] * length, [chance * mean] * length)
            rights = [luck.random() < chance for _ in range(check.length)]
            if check.by_target:
                passed = len(window) + 1 + check.length
                accepted = next((i for i, (_, agrees) in enumerate(window) if not agrees), len(window))
                more = rights.index(False) if False in rights else len(rights)
                new = accepted + 1 + (more if accepted == len(window) else 0)
                seconds, committed = seconds + self.costs.confirm(passed), committed + new
                if told:
                    told.confirmed([p for p, _ in window], accepted)
                window = []
            else:
                new = self.verify(rights, luck, window, running)
                seconds += self.costs.verify(check.length + 1)
                if told:
                    told.verified()
        return committed / seconds

    def verify(
        self, rights: list[bool], luck: random.Random, window: list[tuple[Estimate, bool]], running: RunningAgreement
    ) -> int:
        """The verifier accepts what is its own; of a token that it and the target disagree on the draft is not."""
        agreements, margins = [], []
        accepted = 0
        for place, right in enumerate((*rights, False)):
            bin_of_margin = luck.choices(range(len(self.curve.values)), self.curve.weights.tolist())[0]
            margins.append([*self.curve.edges, self.curve.edges[-1:].sum() + 1][bin_of_margin] - 1e-3)
            agreements.append(luck.random() < self.curve.values[bin_of_margin])
            if not (right and agreements[-1]):
                break
            accepted = place + 1
        window += zip(running.estimates(margins, accepted, accepted < len(rights)), agreements, strict=True)
        return len(margins)


def simple_rate(world: World, least: float, limit: int, threshold: float, count: int = 6000) -> float:
    """The target takes drafts of `least` expected tokens, and windows as a limit and a threshold have it."""

    def choose(window: int, survival: float, by_target: list[float], by_verifier: list[float]) -> Check:
        expected = sum(by_target[0] ** i for i in range(1, len(by_target) + 1)) if by_target else 0.0
        to_target = expected >= least or window >= min(limit, MAX_WINDOW) or survival < threshold
        return Check(to_target, len(by_target), 0.0)

    return world.run(choose, count, None)


def learned_rate(world: World, count: int = 4000) -> float:
    checker = Checker(world.costs, RunningAgreement(world.curve), [prospect_of((), (), world.costs, 0.0)])
    return world.run(checker.choose, count, checker)


@pytest.mark.parametrize("costs", [DEAR, FLAT, STEEP, CHEAP], ids=["dear", "flat", "steep", "cheap"])
@pytest.mark.parametrize("drafts", [NEVER, RARE, LONG], ids=["never", "rare", "long"])
def test_the_rule_is_as_fast_as_the_best_of_many_simple_rules(costs: PairCosts, drafts: Drafts) -> None:
    """One of them is the target alone (`full`), one the verifier for every draft."""
    world = World(costs, AgreementCurve(TELLING), drafts)
    rules = [(0.0, 1, 0.0), *itertools.product((3.0, 99.0), (6, 12, 32), (0.0, 0.6, 0.85))]
    rates = {rule: simple_rate(world, *rule, count=800) for rule in rules}
    best = max(rates, key=lambda rule: rates[rule])
    assert learned_rate(world) >= 0.93 * simple_rate(world, *best, count=4000), best  # chance is 3 %


@pytest.mark.parametrize("costs", [DEAR, FLAT, STEEP], ids=["dear", "flat", "steep"])
@pytest.mark.parametrize("drafts", [NEVER, LONG], ids=["never", "long"])
def test_a_hopeless_verifier_costs_next_to_nothing(costs: PairCosts, drafts: Drafts) -> None:
    """It is tried again less and less often."""
    world = World(costs, AgreementCurve(HOPELESS), drafts)
    assert learned_rate(world) >= 0.95 * simple_rate(world, 0.0, 1, 0.0, count=4000)


HALF = Means(0.5, 0.5, 0.5)


class TestByHand:
    """A fresh verifier pass costs 1, a target pass 3, and time is worth 1 token a second."""

    COSTS = PairCosts(PassCost((1,), (1.0,)), PassCost((1,), (3.0,)))
    WORTHLESS = WindowValues(1.0, np.zeros((MAX_WINDOW + 1, LEVELS)))

    def choose(self, window: int, survival: float, a: Sequence[float], b: Sequence[float], **options: Any) -> Check:
        return choose_check(window, survival, a, b, HALF, self.COSTS, self.WORTHLESS, **options)

    def test_a_sure_draft_goes_to_the_target(self) -> None:
        """The target: 1 + 3 − 3. The verifier: 1/2 + 1/4 + 1/8 + 1/16 − 1."""
        assert self.choose(0, 1.0, [1.0] * 3, [1.0] * 3) == Check(True, 3, 1.0)

    def test_a_doubtful_one_to_the_verifier(self) -> None:
        """The target: 1 + 0.1 − 3. The verifier: 0.9 · 1/2 + 0.1 · (1/2 + 1/4) − 1."""
        check = self.choose(0, 1.0, [0.1], [0.1])
        assert (check.by_target, check.length, check.worth) == (False, 1, pytest.approx(0.525 - 1))

    def test_behind_a_window_that_is_probably_wrong_a_draft_is_worth_less(self) -> None:
        assert self.choose(4, 0.5, [1.0] * 3, []).worth == pytest.approx(1 + 1.5 - 3)

    def test_a_full_window_is_confirmed(self) -> None:
        assert self.choose(MAX_WINDOW, 1.0, [], [1.0] * 9) == Check(True, 0, -2.0)

    def test_where_tokens_cost_time_a_draft_is_cut(self) -> None:
        costs = PairCosts(PassCost((1,), (9.0,)), PassCost((1, 11), (3.0, 8.0)))
        check = choose_check(0, 1.0, [0.9, 0.9, 0.1], [], HALF, costs, self.WORTHLESS)
        assert (check.by_target, check.length) == (True, 2)
        assert choose_check(0, 1.0, [0.9, 0.9, 0.9], [], HALF, costs, self.WORTHLESS, whole=True).length == 3


class TestValues:
    def test_the_best_rate_is_what_a_simulation_reaches(self) -> None:
        """Without drafts: the rate that the recursion finds, and 4000 tokens of its own decisions."""
        world = World(FLAT, AgreementCurve(TELLING), NEVER)
        nothing = prospect_of((), (), FLAT, 0.0)
        best = best_values(agreements_of(TELLING), [nothing], FLAT)
        assert best(0, 1.0) == pytest.approx(0.0, abs=1e-4)

        means = RunningAgreement(AgreementCurve(TELLING)).means

        def choose(window: int, survival: float, a: Sequence[float], b: Sequence[float]) -> Check:
            return choose_check(window, survival, a, b, means, FLAT, best)

        assert world.run(choose, 4000, None) == pytest.approx(best.rate, rel=0.03)

    def test_a_window_is_worth_more_the_likelier_it_is_right(self) -> None:
        best = best_values(agreements_of(TELLING), [prospect_of((), (), FLAT, 0.0)], FLAT)
        assert (np.diff(best.table, axis=1) <= 1e-9).all()

    @pytest.mark.parametrize(
        ("confirm", "p", "longest"),
        [(2.5, 0.75, MAX_WINDOW), (9.9, 0.99, MAX_WINDOW), (16.0, 0.99, 128), (19.9, 0.99, 128), (60.0, 0.995, 256)],
    )
    def test_by_brute_force(self, confirm: float, p: float, longest: int) -> None:
        """Every window, of tokens that are all as sure; longer ones where a confirm costs 10 or 20 verifies."""
        costs = PairCosts(PassCost((1,), (1.0,)), PassCost((1,), (confirm,)))
        table = MarginTable([], [10**8], [round(p * 10**8)])
        cycles = [(sum(p**i for i in range(n + 1)), n + costs.confirm(n + 1)) for n in range(longest + 1)]
        best = max(tokens / seconds for tokens, seconds in cycles)
        found = best_values(agreements_of(table), [prospect_of((), (), costs, 0.0)], costs)
        assert found.longest == longest
        assert found.rate == pytest.approx(best, rel=1e-3 if confirm < 3 else 0.04)  # levels of survival are coarse


@pytest.mark.parametrize("times", [0.15, 0.6, 1.0, 1.05, 3.0])
@pytest.mark.parametrize("costs", [DEAR, FLAT, STEEP, CHEAP], ids=["dear", "flat", "steep", "cheap"])
def test_from_any_rate_the_best_one_is_found_again(costs: PairCosts, times: float) -> None:
    prospects = [prospect_of([0.8] * n, [0.7] * n, costs, 0.3) for n in (0, 0, 1, 4, 15)]
    best = best_values(agreements_of(TELLING), prospects, costs)
    found = better_values(agreements_of(TELLING), prospects, costs, times * best.rate)
    (table,) = window_values._Steps(agreements_of(TELLING), prospects, costs).tables_at(found.rate)
    assert abs(table[0, 0]) <= WORTHLESS
    assert abs(found.table - table).max() <= WORTHLESS
    assert found.rate == pytest.approx(best.rate, rel=0.005)


def test_where_steps_run_out_values_are_those_of_the_rate_that_was_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    prospects = [prospect_of([0.8] * n, [0.7] * n, FLAT, 0.3) for n in (0, 4)]
    agreements = agreements_of(TELLING)
    best = best_values(agreements, prospects, FLAT)
    monkeypatch.setattr(window_values, "NEWTON_STEPS", 1)
    found = better_values(agreements, prospects, FLAT, 0.15 * best.rate)
    assert found.rate > 0.2 * best.rate
    (table,) = window_values._Steps(agreements, prospects, FLAT).tables_at(found.rate)
    assert (found.table == table).all()


def test_a_fresh_window_is_worth_nothing_when_drafts_bring_less_than_expected() -> None:
    """Else a window would seem to keep drafts for later that a target pass, which leaves none, loses."""
    checker = Checker(FLAT, RunningAgreement(AgreementCurve(TELLING)), [prospect_of((), (), FLAT, 0.0)])
    for _ in range(5 * REPLANNED):
        checker.choose(0, 1.0, [0.9] * 8, [0.9] * 8)
        checker.confirmed([], 0)  # of eight tokens none was right
    assert abs(checker.values(0, 1.0)) <= WORTHLESS
    lately = [*checker._prospects]
    assert checker.rate == pytest.approx(best_values(checker.agreement.now, lately, FLAT).rate, rel=0.01)


def test_where_a_confirm_is_very_dear_windows_are_long() -> None:
    costs = PairCosts(PassCost((1,), (1.0,)), PassCost((1, 257), (100.0, 110.0)))
    sure = AgreementCurve(MarginTable([], [10**8], [round(0.998 * 10**8)]))
    checker = Checker(costs, RunningAgreement(sure), [prospect_of((), (), costs, 0.0)])
    assert 100 < checker.longest <= LONGER_WINDOWS[0][1]
    assert checker.choose(checker.longest, 0.7, [], []).by_target
    assert not checker.choose(80, 0.85, [], []).by_target


def test_a_verifier_that_was_not_seen_for_long_is_tried_again() -> None:
    checker = Checker(DEAR, RunningAgreement(AgreementCurve(HOPELESS)), [prospect_of((), (), DEAR, 0.0)])
    tried = []
    for step in range(8 * UNSEEN):
        if checker.choose(0, 1.0, [], []).by_target:
            checker.confirmed([], 0)
        else:
            tried.append(step)
            checker.verified()
    assert tried == [UNSEEN, 3 * UNSEEN + 1, 7 * UNSEEN + 2]


def test_when_passes_become_cheaper_the_rate_follows() -> None:
    cost = {"now": 10.0}
    costs = PairCosts(lambda tokens: cost["now"], lambda tokens: 3 * cost["now"])
    checker = Checker(costs, RunningAgreement(AgreementCurve(TELLING)), [prospect_of((), (), costs, 0.0)])
    before, cost["now"] = checker.rate, 1.0
    checker.begin()
    assert checker.rate == pytest.approx(10 * before, rel=0.02)


def test_the_targets_word_on_drafts_that_the_verifier_checked() -> None:
    """Of the first all is known, of the second its first token, of the third nothing."""
    checking = Checking(
        Checker(DEAR, RunningAgreement(AgreementCurve(TELLING)), [prospect_of((), (), DEAR, 0.0)]),
        FixedLength(4),
        FixedLength(4),
    )
    drafts = [Draft.of((5, 6, 7), "x", 1), Draft.of((9, 1), "y", 1), Draft.of((3,), "z", 1)]
    checking.learn_drafts([(2, drafts[0]), (5, drafts[1]), (6, drafts[2])], [0, 0, 5, 6, 0, 9])
    acceptance, expected = checking.target_length.acceptance, Acceptance()
    expected.count(drafts[0].pieces, 2)
    expected.count(drafts[1].first(1).pieces, 1)
    assert [acceptance(source, 1) for source in "xyz"] == [expected(source, 1) for source in "xyz"]


def test_the_last_token_is_the_targets_in_any_case() -> None:
    """Four tokens behind the prompt's: three of a verifier that is always right, and the confirm's own."""
    target = TableModel(8, 0)
    pair = make_pair(target, target.disturbed(0.0))
    for role, seconds in (("target", 9.0), ("verifier", 1.0)):
        pair.measured[role] = CostRecord(PassCost((1,), (seconds,)), {"role": role}, 0.0)
    stats = Generator(pair, GenerationConfig(5, "exact", draft="none")).generate([0, 1]).stats
    assert (stats.steps, stats.confirms, stats.confirm_log[0].window) == (3, 1, 3)
    assert stats.new_tokens == 5
