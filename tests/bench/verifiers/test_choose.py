"""The choice of a verifier: against trying everything, against what costs and agreement alone predict, in words."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quasar_core.bench.verifiers.choose import (
    Body,
    Choice,
    Replayed,
    Row,
    Search,
    advice,
    between,
    circles_from,
    with_head,
)
from quasar_core.bench.verifiers.streamed_target import ConfirmCost
from quasar_core.config import QuantizeConfig
from quasar_core.decode.costs.pass_costs import PairCosts, PassCost
from quasar_core.decode.policy.agreement import agreements_of
from quasar_core.decode.policy.lengths import LEAST_GAIN
from quasar_core.decode.policy.window_values import Prospect, best_values
from quasar_core.quantize.calibration import GREEDY_FROM
from quasar_core.quantize.candidates import Look
from quasar_core.records import MarginTable

UNIFORM = [Body(bits, group) for bits in (4, 8) for group in (128, 64, 32)]
MIXED = [Body(5.0, 128)]
CONFIRM = PassCost((1,), (10.0,))


def look(agreement: float, tokens: int = 1000) -> Look:
    return Look([[1.0] * tokens], [[place < agreement * tokens for place in range(tokens)]])


def expected(look: Look, costs: PairCosts) -> float:
    """In the place of a replay: more agreement and cheaper passes are faster."""
    return look.agreement**2 / costs.verify(1)


class Bench:
    """Costs and agreements by hand; keeps what was tried."""

    def __init__(self, seconds: Mapping[Body, float], agreements: Mapping[Body, float], head: float = 0.9) -> None:
        self.seconds, self.agreements, self.head = seconds, agreements, head
        self.tried: list[list[Body]] = []

    def cost(self, body: Body, head: int) -> PassCost:
        return PassCost((1,), (self.seconds[body] * (1.0 if head == 16 else self.head),))

    def confirm(self, body: Body, head: int) -> ConfirmCost | None:
        return ConfirmCost(CONFIRM)

    def attempt(self, bodies: Sequence[Body]) -> dict[tuple[Body, int], Look]:
        self.tried.append(list(bodies))
        return {(body, head): look(self.agreements[body]) for body in bodies for head in (16, 8)}

    def search(self) -> Choice:
        search = Search([16, 8], self.cost, self.confirm, self.attempt, expected, lambda body, head: 1000)
        return search.run(UNIFORM, MIXED)


@given(data=st.data())
@settings(deadline=None, derandomize=True, max_examples=100)
def test_what_is_chosen_is_as_fast_as_the_best_of_all(data: st.DataObject) -> None:
    """Where none agrees more often than 8 bits in the smallest groups."""
    bodies = [*UNIFORM, *MIXED]
    seconds = {body: data.draw(st.floats(1.0, 9.0)) for body in bodies}
    most = data.draw(st.integers(500, 1000))
    agreements = {body: data.draw(st.integers(300, most)) / 1000 for body in bodies}
    agreements[Body(8, 32)] = most / 1000
    bench = Bench(seconds, agreements, data.draw(st.floats(0.5, 1.2)))
    choice = bench.search()
    rates = [
        expected(look(agreements[body]), PairCosts(bench.cost(body, head), CONFIRM))
        for body in bodies
        for head in (16, 8)
    ]
    assert choice.best.rate >= max(rates) / (1 + LEAST_GAIN) - 1e-9
    assert choice.best.agreement == agreements[choice.best.body]
    assert len(choice.rows) == 2 * len(bodies)


def test_what_cannot_win_is_not_solved_and_one_try_serves_all_that_can() -> None:
    seconds = {Body(4, 128): 4.0, Body(4, 64): 4.2, Body(4, 32): 4.5, **{Body(8, g): 7.0 for g in (128, 64, 32)}}
    bench = Bench({**seconds, MIXED[0]: 5.0}, {body: 0.99 if body.bits == 8 else 0.9 for body in (*UNIFORM, *MIXED)})
    choice = bench.search()
    assert bench.tried == [[Body(4, 128), Body(8, 32)], [Body(4, 64), Body(4, 32)]]
    assert (choice.best.body, choice.best.head) == (Body(4, 128), 8)
    unsolved = {row.body for row in choice.rows if row.agreement is None}
    assert unsolved == {Body(8, 128), Body(8, 64), *MIXED}
    assert choice.ceiling == pytest.approx(1 / 3.6)


def test_what_memory_does_not_hold_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """8 bits would be the best by far; beside them a confirm is as dear as its bytes, and with a second head none."""
    bodies = [Body(4, 128), Body(8, 128)]
    bench = Bench(dict.fromkeys(bodies, 1.0), {bodies[0]: 0.9, bodies[1]: 1.0})

    def confirm(body: Body, head: int) -> ConfirmCost | None:
        moved = int(1e9 * body.bits)
        return None if (body.bits, head) == (8, 8) else ConfirmCost(PassCost((1,), (moved / 1e9,)), moved)

    monkeypatch.setattr(bench, "confirm", confirm)
    search = Search([16, 8], bench.cost, bench.confirm, bench.attempt, expected, lambda body, head: 1000)
    choice = search.run(bodies, [])
    rows = {(row.bits, row.head): row for row in choice.rows}
    assert (rows[8, 8].rate, rows[8, 8].moved) == (0.0, 0)
    assert (choice.best.bits, choice.best.head) == (8, 16)
    assert (choice.best.confirm_ms, choice.best.moved, choice.confirm_ms) == (8000.0, 8_000_000_000, 8000.0)
    assert choice.streams
    assert Choice.parse(choice.to_dict()) == choice


def test_a_head_adds_what_it_adds_beside_another_body() -> None:
    body, plain, other = PassCost((1, 8), (5.0, 6.0)), PassCost((1, 8), (3.0, 4.0)), PassCost((1, 8), (2.0, 3.5))
    assert with_head(body, other, plain) == PassCost((1, 8), (4.0, 5.5))
    assert with_head(PassCost((1, 8), (0.5, 6.0)), other, plain).seconds == (0.05, 5.5)
    assert between(plain, body, 0.25) == PassCost((1, 8), (3.5, 4.5))


# The replay


def unlike_rows(count: int, length: int) -> torch.Tensor:
    """Rows in which nothing occurs twice: there are no drafts."""
    return torch.arange(count * (GREEDY_FROM + length)).view(count, -1)


@pytest.mark.parametrize(("agreement", "confirm_s"), [(0.97, 4.0), (0.9, 8.0), (0.8, 3.0)])
def test_without_drafts_the_rate_is_that_of_the_best_decisions(agreement: float, confirm_s: float) -> None:
    """The dynamic programme's, which knows costs and agreement alone."""
    dice, rows = random.Random(1), unlike_rows(6, 300)
    agreed = [[dice.random() < agreement for _ in range(300)] for _ in rows]
    costs = PairCosts(PassCost((1, 33), (1.0, 1.2)), PassCost((1, 33), (confirm_s, 1.3 * confirm_s)))
    found = Replayed(rows, None, now=lambda: 0.0).rate(Look([[1.0] * 300 for _ in rows], agreed), costs)
    known = agreements_of(MarginTable([], [1800], [sum(map(sum, agreed))]))
    assert found == pytest.approx(best_values(known, [Prospect(0, 0, 1, 1)], costs).rate, rel=0.06)


def test_drafts_that_are_right_are_worth_more_than_rare_ones() -> None:
    costs = PairCosts(PassCost((1, 33), (1.0, 1.1)), PassCost((1, 33), (3.0, 3.3)))
    again = torch.arange(GREEDY_FROM + 200).remainder(20)
    again[-1] = 1000  # so that it does not go round to its end
    sure = Look([[1.0] * 200] * 2, [[True] * 200] * 2)
    rate = Replayed(again.expand(2, -1), None).rate(sure, costs)
    assert rate > 2 * Replayed(unlike_rows(2, 200), None).rate(sure, costs)


def test_a_row_ends_where_it_begins_to_go_round() -> None:
    costs = PairCosts(PassCost((1, 33), (1.0, 1.1)), PassCost((1, 33), (3.0, 3.3)))
    rows, sure = unlike_rows(2, 200), Look([[1.0] * 200] * 2, [[True] * 200] * 2)
    rows[:, GREEDY_FROM + 80 :] = torch.arange(120).remainder(20)
    whole, cut = Replayed(rows, None, now=lambda: 0.0), Replayed(rows[:, : GREEDY_FROM + 80], None, now=lambda: 0.0)
    assert whole.tokens == cut.tokens == 160
    assert whole.rate(sure, costs) == cut.rate(Look([[1.0] * 80] * 2, [[True] * 80] * 2), costs)


@pytest.mark.parametrize(
    ("row", "start"),
    [
        ([1, 2, 3, 4, 5], 5),
        ([], 0),
        ([7, 7, 7], 0),
        ([1, 7, 7, 7, 7], 1),
        ([1, 7, 7], 3),  # twice is no circle
        ([9, 1, 2, 1, 2, 1, 2], 1),
        ([9, 2, 1, 2, 1, 2, 1, 2], 1),  # it begins within a round
        ([1, 2, 1, 2, 1, 2, 3], 7),  # and goes on
        ([5, *range(65), *range(65), *range(65)], 196),  # longer than a circle is looked for
        ([5, *range(64), *range(64), *range(64)], 1),
    ],
)
def test_where_a_text_begins_to_go_round(row: list[int], start: int) -> None:
    assert circles_from(row) == start


@given(st.lists(st.integers(0, 2), max_size=14))
def test_a_circle_is_the_longest_end_that_repeats_itself(row: list[int]) -> None:
    def repeats(end: list[int], period: int) -> bool:
        return len(end) >= 3 * period and all(a == b for a, b in zip(end, end[period:], strict=False))

    ends = (i for i in range(len(row)) if any(repeats(row[i:], period) for period in range(1, len(row))))
    assert circles_from(row) == next(ends, len(row))


def test_drafting_takes_time_too() -> None:
    """Reading the rows took 200 s, half a second a step: as much as a verify pass half as long again."""
    costs = PairCosts(PassCost((1, 33), (1.0, 1.1)), PassCost((1, 33), (3.0, 3.3)))
    rows, sure = unlike_rows(2, 200), Look([[1.0] * 200] * 2, [[True] * 200] * 2)
    clock = iter([0.0, 200.0])
    slow, free = Replayed(rows, None, now=lambda: next(clock)), Replayed(rows, None, now=lambda: 0.0)
    assert 1.2 < free.rate(sure, costs) / slow.rate(sure, costs) < 1.6


def test_a_short_text_is_replayed_too() -> None:
    replayed = Replayed(torch.tensor([[1, 2, 3]]), None)
    assert replayed.tokens == 1
    assert replayed.rate(Look([[1.0]], [[True]]), PairCosts(CONFIRM, CONFIRM)) > 0


# Words


BEST = Row(4, 128, 8, 1000, 4.0, 0.9, 100.0)
ROWS = [
    BEST,
    Row(8, 64, 16, 2000, 7.0, 0.99, 90.0),
    Row(8, 64, 8, 1900, 7.0, 0.99, 85.0),
    Row(5, 128, 8, 9, 5.0, None, 80.0),
]


def test_where_agreement_is_low_it_is_said_what_would_help() -> None:
    choice = Choice(ROWS, 10.0, 130.0, 100)
    first, second = advice(choice)
    assert "0.900" in first
    assert "130.0 tokens/s (+30 %)" in first
    assert second.startswith("8 bits in groups of 64, head 16: agreement 0.990 (+0.090), 90.0 tokens/s (-10 %)")
    assert advice(replace(choice, rows=[replace(BEST, agreement=0.97)])) == []


def test_a_choice_is_kept_as_json() -> None:
    choice = Choice(ROWS, 10.0, 130.0, 100, "busy")
    assert Choice.parse(choice.to_dict()) == choice
    for wrong, reason in (({}, "rows"), ({**choice.to_dict(), "rows": []}, "no choice")):
        with pytest.raises(ValueError, match=reason):
            Choice.parse(wrong)


def test_a_choice_becomes_a_config() -> None:
    base = QuantizeConfig(samples=7)
    assert Choice(ROWS, 1.0, 1.0, 1).config(base) == QuantizeConfig(4, 128, lm_head_bits=8, samples=7)
    assert Body(5.0, 64).config(base, 16) == QuantizeConfig(4, 64, mean_bits=5.0, samples=7)
    assert Body(5.0, 64).describe() == "5 bits by layer in groups of 64"
