"""Replays of recorded answers: the recorded policy's speed, others' by a clock made by hand, and what is refused."""

import random
import statistics
from collections.abc import Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any

import pytest
import torch
from helpers.bench_records import make_results, make_row, make_run
from helpers.tiny_models import TreeTable, make_pair

from quasar_core.bench.arms import BenchConfig
from quasar_core.bench.results import Results
from quasar_core.bench.simulation.simulate import POLICIES, Policy, Prediction, predict, replay, simulate
from quasar_core.bench.simulation.traces import (
    Drafted,
    Recorded,
    TimedPass,
    Trace,
    Verified,
    cost_of,
    passes_of,
    record_of,
    trace_of,
)
from quasar_core.config import GenerationConfig, SamplingConfig
from quasar_core.decode.costs.cost_records import CostRecord
from quasar_core.decode.costs.pass_costs import CONTEXT, PairCosts, PassCost
from quasar_core.decode.generator import Generator
from quasar_core.decode.policy.lengths import TYPICAL_ACCEPTANCE, ExactPlan, plan_exact
from quasar_core.draft.base import Draft, Drafter
from quasar_core.errors import UsageError
from quasar_core.quantize.fidelity import margin_table
from quasar_core.records import Confirm, FidelityReport, MarginTable, Piece, Stats, Step

VOCABULARY, TOKENS, ANSWERS = 40, 300, 6
VERIFY, CONFIRM = PassCost((1, 33), (1.0, 1.6)), PassCost((1, 33), (3.0, 4.5))
PLAIN, COPIED = GenerationConfig(TOKENS, "full", draft="none"), GenerationConfig(TOKENS, "full")


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class TimedModel(TreeTable):
    """Each pass takes its cost on the clock."""

    def __init__(self, clock: Clock, cost: PassCost, seed: int = 0) -> None:
        super().__init__(VOCABULARY, seed)
        self.clock, self.cost = clock, cost

    def forward(self, tokens: Sequence[int], cache: Any, last_only: bool = False) -> torch.Tensor:
        if not last_only:
            self.clock.now += self.cost(len(tokens))
        return super().forward(tokens, cache, last_only)

    def forward_tree(self, tokens: Sequence[int], parents: Sequence[int], cache: Any) -> torch.Tensor:
        self.clock.now += self.cost(len(tokens))
        return super().forward_tree(tokens, parents, cache)


@cache
def luck(seed: int) -> float:
    """A number between 0 and 1 that is always the same; seeding takes its time."""
    return random.Random(seed).random()


@cache
def quality(passage: int, seed: int) -> float:
    """How many of a copy's tokens are right; 0 where there is none."""
    return random.Random(passage + 1000 * seed).choice((0.0, 0.5, 0.97))


class Passages(Drafter):
    """Text comes in passages of 14 tokens: of one there is no copy, of another a bad one, of a third a good one."""

    def __init__(self, text: Sequence[int], forks: bool = False, seed: int = 0) -> None:
        self.text, self.position, self.forks, self.seed = text, 0, forks, seed

    def observe(self, tokens: Sequence[int]) -> None:
        self.position += len(tokens)

    def forget(self, count: int) -> None:
        self.position -= count

    def propose(self, limit: int, after: Sequence[int] = ()) -> Draft:
        passage = self.position // 14
        chance = quality(passage, self.seed)
        end = min(14 * (passage + 1), self.position + limit, len(self.text)) if chance else self.position
        copy = [self.copied(place, chance) for place in range(self.position, end)]
        return Draft.of(copy, "copy", 3 if chance > 0.5 else 1)

    def alternatives(self, draft: Sequence[int]) -> list[list[int]]:
        """In every third place the token that comes, where there are to be trees."""
        places = range(self.position, min(self.position + len(draft) + 1, len(self.text)))
        return [[0, (self.text[place] + place % 3) % VOCABULARY] for place in places] if self.forks else []

    def copied(self, place: int, chance: float) -> int:
        right = luck(-place - 77_777 * self.seed) < chance
        return self.text[place] if right else (self.text[place] + 1) % VOCABULARY


def measured_margins(target: TimedModel, verifier: TimedModel) -> MarginTable:
    """As quantizing measures them: the replay goes by the run's own, and decoding is to know as much."""
    rows, others = (model.table.reshape(-1, VOCABULARY) for model in (target, verifier))
    best = others.topk(2).values
    return margin_table(best[:, 0] - best[:, 1], rows.argmax(-1) == others.argmax(-1))


@cache
def benched(
    window: Any = "auto", trees: bool = False, sampling: SamplingConfig | None = None, seed: int = 0
) -> Results:
    """Arms exact, ngram and vanilla on a clock on which nothing but passes takes time."""
    clock = Clock()
    target, verifier = TimedModel(clock, CONFIRM), TimedModel(clock, VERIFY)
    verifier.table = target.disturbed(0.25).table
    report = FidelityReport("t", 100, 0.9, 0.9, 0.9, 0.1, 0.2, 5.0, 5.1, measured_margins(target, verifier))
    pair = make_pair(target, verifier, max_context=2048, fidelity=report)
    for role, cost in (("target", CONFIRM), ("verifier", VERIFY)):
        pair.measured[role] = CostRecord(cost, {"role": role}, 0.0)
    drawn = {"sampling": sampling or SamplingConfig()}
    texts: list[list[int]] = []  # of the arm that decodes plainly, which is the first
    rows = []
    for arm, config in (
        ("vanilla", PLAIN),
        ("exact", replace(COPIED, verify="exact", window=window)),
        ("ngram", COPIED),
    ):
        known: list[int] = []
        generator = Generator(pair, replace(config, **drawn), partial(Passages, known, trees, seed), now=clock)
        for number in range(ANSWERS):
            known[:] = texts[number] if arm != "vanilla" else []
            generator.reset()
            result = generator.generate([0, number])
            if arm == "vanilla":
                texts.append([0, number, *result.token_ids])
            assert [0, number, *result.token_ids] == texts[number]
            rows.append(make_row(arm, number, list(result.token_ids), result.stats))
    rows = [*rows[ANSWERS:], *rows[:ANSWERS]]
    return Results(make_run(config=BenchConfig(("exact", "ngram", "vanilla"), window=window)), rows)


RECORDED = ("as it pays", "target alone, no drafts")


def predictions_of(results: Results, names: Sequence[str], replays: int) -> dict[str, Prediction]:
    """Of these policies, and of the one that was recorded: a replay of every policy takes its time."""
    few = tuple(policy for policy in POLICIES if policy.name in names)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("quasar_core.bench.simulation.simulate.POLICIES", few)
        return {one.policy: one for one in simulate(results, replays=replays)}


def test_replays_are_averaged_and_their_spread_is_told() -> None:
    recorded, window, alone = record_of(benched(4), "exact"), Policy("window 4", 4), POLICIES[-1]
    own, plain = predict(recorded, window, 2, 50.0), predict(recorded, alone, 2, None)
    speeds = [replay(recorded, window, seed) for seed in range(2)]
    assert own.predicted == pytest.approx(statistics.fmean(speeds))
    assert own.spread == pytest.approx(abs(speeds[0] - speeds[1]) / 2)
    assert own.ratio == own.predicted / 50.0
    assert own.spread > 0
    assert plain.spread == 0  # the target alone comes to no place of which nothing was recorded


def test_sampled_answers_are_replayed_too() -> None:
    """Of so few tokens the recorded speed is chance by itself: seeds come out between 0.97 and 1.07."""
    predictions = predictions_of(benched(sampling=SamplingConfig(1.0, seed=1)), RECORDED, 1)
    assert predictions["as it pays"].ratio == pytest.approx(1.0, abs=0.12)


def test_the_recorded_policy_is_predicted_within_five_percent() -> None:
    """On average over texts, and over what the replay draws at random: one of either may come out right by luck."""
    ratios = []
    for seed in range(5):
        predictions = predictions_of(benched(seed=seed), RECORDED, 2)
        own = predictions["as it pays"]
        assert own.ratio == pytest.approx(1.0, abs=0.1)
        ratios.append(own.ratio)
        assert predictions["target alone, no drafts"].ratio == pytest.approx(1.0, abs=0.05)
    assert statistics.fmean(ratios) == pytest.approx(1.0, abs=0.05)


def test_every_policy_is_predicted_from_a_window_that_was_set() -> None:
    predictions = predictions_of(benched(4), RECORDED, 2)
    assert predictions["window 4"].ratio == pytest.approx(1.0, abs=0.05)
    assert predictions["target alone, no drafts"].ratio == pytest.approx(1.0, abs=0.05)
    all_answers = benched(4)
    few = Results(all_answers.run, [row for row in all_answers.rows if row.question_id == 0])
    assert {one.policy for one in simulate(few, replays=1)} == {policy.name for policy in POLICIES}


def test_trees_are_predicted_within_five_percent() -> None:
    """On average over texts."""
    ratios = []
    for seed in range(2):
        results = benched(trees=True, seed=seed)
        pieces = [piece for row in results.rows for step in row.stats.step_log for piece in step.pieces]  # type: ignore[union-attr]
        assert sum(piece.source == "branch" for piece in pieces) > 100
        named = predictions_of(results, RECORDED, 1)
        ratios.append(named["as it pays"].ratio)
        assert named["target alone, no drafts"].ratio == pytest.approx(1.0, abs=0.05)
    assert statistics.fmean(ratios) == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize(
    ("longest", "drafted", "acceptance"), [(64, 2, TYPICAL_ACCEPTANCE), (0, 2, 0.0), (64, 0, 0.0)], ids=str
)
def test_a_replay_begins_with_what_decoding_expects_of_drafts(
    longest: int, drafted: int, acceptance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing, where there are none: of the policy, or of what was recorded."""
    expected: list[float] = []

    def plan(costs: PairCosts, agreements: Any, acceptance: float = TYPICAL_ACCEPTANCE) -> ExactPlan:
        expected.append(acceptance)
        return plan_exact(costs, agreements, acceptance)

    monkeypatch.setattr("quasar_core.bench.simulation.simulate.plan_exact", plan)
    draft = Drafted((Piece("x", 1, drafted),) if drafted else (), drafted)
    traces = [Trace(9, {place: Verified(1.0, True) for place in range(9)}, dict.fromkeys(range(9), draft))]
    assert replay(Recorded(traces, PairCosts(VERIFY, CONFIRM), 0.0, 0.0), Policy("some", longest=longest)) > 0
    assert expected == [acceptance]


def test_a_tree_by_hand() -> None:
    """One draft token was right, then the branch beside the second; another branch was not gone to."""
    pieces = [Piece("x", 1, 1), Piece("branch", 1, 1), Piece("x", 1, 1), Piece("branch", 2, 1)]
    trace = trace_of(Stats(new_tokens=4, prefill_tokens=1, step_log=[Step(4, 2, pieces, by_target=True)]))
    one = Piece("x", 1, 1)
    assert trace.drafted == {0: Drafted((one, one), 1, branches=2, gained=1)}
    assert trace.drafted[0].first(1) == Drafted((one,), 1)
    assert trace.drafted[0].first(5) == trace.drafted[0]
    assert trace.drafted[0].passed == 4


def test_other_policies_are_predicted_from_a_recording_of_one() -> None:
    """A window of 4, replayed from what was recorded as it pays, against its own run."""
    predicted = predictions_of(benched(), ["window 4"], 1)["window 4"].predicted
    assert predicted == pytest.approx(predictions_of(benched(4), [], 1)["window 4"].measured, rel=0.1)


def test_a_trace_by_hand() -> None:
    """Two verify passes, a confirm that refuses the third token, and a draft that goes to the target at once."""
    piece = Piece("x", 1, 2)
    steps = [
        Step(2, 1, [piece], margins=[5.0, 4.0]),
        Step(0, 0, margins=[0.1]),
        Step(2, 2, [piece], by_target=True),
    ]
    trace = trace_of(Stats(new_tokens=7, prefill_tokens=1, step_log=steps, confirm_log=[Confirm(3, 2, step=2)]))
    assert trace.tokens == 6
    assert trace.verified == {0: Verified(5.0, True), 1: Verified(4.0, True), 2: Verified(0.1, False)}
    one = Piece("x", 1, 1)
    assert trace.drafted == {0: Drafted((piece,), 1), 2: Drafted((), 0), 3: Drafted((piece,), 2)}
    assert trace.rests == {1: Drafted((one,), 0), 4: Drafted((one,), 1), 5: Drafted((), 0)}


def test_a_draft_behind_a_window_by_hand() -> None:
    piece = Piece("x", 1, 2)
    steps = [Step(0, 0, margins=[5.0]), Step(2, 1, [piece], by_target=True)]
    trace = trace_of(Stats(new_tokens=4, prefill_tokens=1, step_log=steps, confirm_log=[Confirm(1, 1, 2, 1)]))
    assert trace.verified == {0: Verified(5.0, True)}
    assert trace.drafted[1] == Drafted((piece,), 1)


def test_margins_are_counted() -> None:
    recorded = record_of(benched(), "exact")
    table = recorded.margins
    assert sum(table.counts) == sum(len(trace.verified) for trace in recorded.traces)
    assert 0 < sum(table.agreed) < sum(table.counts)
    assert replay(recorded, POLICIES[0], 1) > 0


def test_files_without_margins_are_refused() -> None:
    with pytest.raises(UsageError, match="no answers of the arm exact"):
        simulate(make_results())
    old = [replace(row, arm="exact") for row in make_results().rows if row.arm == "ngram"]
    with pytest.raises(UsageError, match="no margins"):
        simulate(Results(make_run(), old))
    results = benched()
    first = results.rows[0]
    assert first.stats is not None
    passed = replace(first.stats, step_log=[replace(first.stats.step_log[0], let_through=1), *first.stats.step_log[1:]])
    with pytest.raises(UsageError, match="not all of it was confirmed"):
        simulate(Results(results.run, [replace(first, stats=passed), *results.rows[1:]]))


@pytest.mark.parametrize(("once", "each"), [(0.0, 1e-3), (2e-3, 0.0), (5e-4, 1e-4), (0.0, 0.0)])
def test_what_a_position_adds_is_found_in_the_passes(once: float, each: float) -> None:
    """To a pass, as on a GPU, or to each of its tokens, as on a CPU; long passes stood behind longer texts."""
    luck = random.Random(0)
    passes = []
    for _ in range(300):
        tokens = luck.choice((1, 2, 5, 16))
        seen = luck.randint(0, 100 * tokens)
        seconds = 1.0 + tokens / 16 + (once + each * tokens) * max(seen - CONTEXT, 0)
        passes.append(TimedPass(tokens, seen, seconds))
    cost = cost_of(passes)
    assert cost.sizes == (1, 2, 5, 16)
    for one in passes:
        assert cost.at(one.positions)(one.tokens) == pytest.approx(one.seconds)


def test_where_passes_stood_by_hand() -> None:
    """Behind 10 tokens: two verifies, a confirm of their three tokens that refuses the last, two drafts at the target.

    The second of these passes behind a window of one.
    """
    piece = Piece("x", 1, 2)
    steps = [
        Step(2, 1, [piece], seconds=1.0),
        Step(0, 0, seconds=2.0),
        Step(2, 2, [piece], by_target=True, seconds=4.0),
        Step(0, 0, seconds=5.0),
        Step(2, 1, [piece], by_target=True),
    ]
    confirms = [Confirm(3, 2, step=2, seconds=3.0), Confirm(1, 1, 2, 4, seconds=6.0)]
    stats = Stats(new_tokens=11, prefill_tokens=1, prompt_tokens=10, step_log=steps, confirm_log=confirms)
    assert list(passes_of(stats)) == [
        ("verify", TimedPass(3, 10, 1.0)),
        ("verify", TimedPass(1, 12, 2.0)),
        ("confirm", TimedPass(4, 10, 3.0)),
        ("confirm", TimedPass(3, 13, 4.0)),
        ("verify", TimedPass(1, 16, 5.0)),
        ("confirm", TimedPass(4, 16, 6.0)),
    ]


def test_behind_a_long_prompt_the_target_is_predicted_to_decode_alone() -> None:
    """There a verify takes 3.3 s and a target pass 6; behind a short one 0.3 and 3."""
    row = PassCost((1, 33), (1e-3, 33e-3))
    costs = PairCosts(PassCost((1, 33), (0.3, 1.9), row), PassCost((1, 33), (3.0, 4.6), row))
    luck, faster = random.Random(0), {}
    for prompt in (20, 3000):
        verified = {place: Verified(1.0, luck.random() < 0.7) for place in range(400)}
        traces = [Trace(400, verified, {place: Drafted((), 0) for place in range(400)}, prompt=prompt)]
        rates = {p.name: replay(Recorded(traces, costs, 0.0, 0.0), p) for p in POLICIES}
        faster[prompt] = rates["as it pays"] / rates["target alone"]
    assert faster[20] > 1.5
    assert 0.9 < faster[3000] < 1.1
