"""How long to draft and when to confirm, under costs and agreements made by hand."""

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.tiny_models import TableModel, make_pair

from quasar_core.config import GenerationConfig, SamplingConfig
from quasar_core.decode.costs import cost_records
from quasar_core.decode.costs.cost_records import SIZES, Pace, cost_from_timings, measure_pass, pair_costs
from quasar_core.decode.costs.pass_costs import CONTEXT, PairCosts, PassCost
from quasar_core.decode.generator import Generator
from quasar_core.decode.policy.agreement import AgreementCurve, agreements_of
from quasar_core.decode.policy.lengths import (
    MAX_DRAFT,
    AdaptiveLength,
    FixedLength,
    WindowPolicy,
    best_length,
    expected_pass,
    pass_rate,
    plan_exact,
    predict_rates,
)
from quasar_core.draft.base import NO_DRAFT, Draft
from quasar_core.models.base import Choices
from quasar_core.records import FidelityReport, MarginTable
from quasar_core.timing import Timing

FLAT = PassCost((1, 16), (1.0, 1.0))
STEEP = PassCost((1, 16), (1.0, 16.0))
ALWAYS = MarginTable([], [10**9], [10**9])  # no real verifier does better
DRAFT = Draft.of(range(10), "ngram", 2)


def curve(agreement: float) -> AgreementCurve:
    """Every token of the same margin, agreeing as often as said."""
    return AgreementCurve(MarginTable([1.0], [0, 10_000], [0, round(10_000 * agreement)]))


class TestCosts:
    def test_between_sizes_costs_are_linear_and_beyond_them_along_the_last_slope(self) -> None:
        cost = PassCost((1, 4, 8), (1.0, 4.0, 5.0))
        assert [cost(1), cost(2), cost(4), cost(6), cost(8), cost(12)] == [1.0, 2.0, 4.0, 4.5, 5.0, 6.0]

    def test_one_size_is_a_constant(self) -> None:
        assert PassCost((1,), (2.0,))(9) == 2.0

    def test_the_best_sample_counts_and_a_longer_pass_bounds_a_shorter(self) -> None:
        samples = {1: (1.2, 1.4), 2: (1.1, 9.0), 4: (2.0, 3.0), 8: (2.5,)}
        timings = {size: Timing(taken) for size, taken in samples.items()}
        assert cost_from_timings(timings) == PassCost((1, 2, 4, 8), (1.1, 1.1, 2.0, 2.5))

    def test_noise_that_only_adds_leaves_drafting_on(self) -> None:
        """Every second pass is preempted: the best of interleaved rounds does not notice."""
        true = {1: 1.0, 2: 1.02, 4: 1.05, 8: 1.1, 16: 1.3}
        samples = {size: (seconds, seconds, 2 * seconds, 2 * seconds) for size, seconds in true.items()}
        timings = {size: Timing(taken) for size, taken in samples.items()}
        assert cost_from_timings(timings).seconds == tuple(true.values())

    def test_measuring_times_every_size_and_leaves_no_pass_behind(self) -> None:
        cost, timed = self.measure({size: 1 + size / 16 for size in SIZES})
        assert cost == PassCost(tuple(sorted(SIZES)), tuple(1 + size / 16 for size in sorted(SIZES)))
        assert timed == [*SIZES] * 3

    def measure(self, seconds: dict[int, float], limit: float = 1e9, **changes: Any) -> tuple[PassCost, list[int]]:
        """Measure passes that take so many seconds by a clock of their own; the cost, and the sizes timed in turn."""
        elapsed, timed = [0.0], list[int]()

        def sampler(model: Any, cache: Any, size: int, now: Any) -> Any:
            def sample() -> float:
                assert cache.length == min(CONTEXT, pair.max_context // 2), "a pass was left behind"
                timed.append(size)
                elapsed[0] += seconds[size]
                return seconds[size]

            return sample

        model = TableModel(8, seed=0)
        pair = make_pair(model, **changes)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cost_records, "pass_sampler", sampler)
            return measure_pass(pair, model, seconds=limit, now=lambda: elapsed[0])[0], timed

    def test_a_pass_is_timed_by_the_clock_around_it_and_leaves_nothing_behind(self) -> None:
        readings = iter([3.0, 3.25])
        model = TableModel(8, seed=0)
        cache = model.new_cache(8)
        assert cost_records.pass_sampler(model, cache, 4, now=lambda: next(readings))() == 0.25
        assert cache.length == 0

    def test_a_pass_is_timed_as_greedy_decoding_runs_it(self) -> None:
        class ChoosingModel(TableModel):
            def forward(self, tokens: Any, cache: Any, last_only: bool = False) -> Any:
                pytest.fail("logits are written")

            def choose(self, tokens: Any, cache: Any, likeliest: int = 0) -> Choices:
                cache.tokens += tokens
                return Choices([0] * len(tokens), [1.0] * len(tokens))

        model = ChoosingModel(8, seed=0)
        cache = model.new_cache(8)
        assert cost_records.pass_sampler(model, cache, 4)() >= 0
        assert cache.length == 0

    @pytest.mark.parametrize(("interrupted", "rounds"), [(0.0, 3), (0.4, 12)])
    def test_measuring_goes_on_until_the_best_times_repeat(
        self, interrupted: float, rounds: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        luck, timed = random.Random(0), list[int]()

        def sampler(model: Any, cache: Any, size: int, now: Any) -> Any:
            def sample() -> float:
                timed.append(size)
                return (1 + size / 16) * (1 + 3 * (luck.random() < interrupted) + 0.01 * luck.random())

            return sample

        monkeypatch.setattr(cost_records, "pass_sampler", sampler)
        model = TableModel(8, seed=0)
        cost, _ = measure_pass(make_pair(model), model)
        assert cost.seconds == pytest.approx([1 + size / 16 for size in cost.sizes], rel=0.02)
        assert len(timed) <= 8 * rounds

    @pytest.mark.parametrize("slower", [1.0, 2.0, 0.5])
    def test_costs_at_a_models_pace_do_not_depend_on_the_minute(
        self, slower: float, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The model whose pace it is usually takes 5 s; now everything takes `slower` times as long."""
        model, other = TableModel(8, seed=0), TableModel(8, seed=1)

        def sampler(of: Any, cache: Any, size: int, now: Any) -> Any:
            return lambda: slower * (1 + size / 16 if of is model else 5.0)

        monkeypatch.setattr(cost_records, "pass_sampler", sampler)
        cost, _ = measure_pass(make_pair(model), model, pace=Pace(other, 5.0))
        assert cost.seconds == pytest.approx([1 + size / 16 for size in sorted(SIZES)])
        assert cost.sizes == tuple(sorted(SIZES))
        cost, _ = measure_pass(make_pair(model), model, seconds=-1.0, pace=Pace(other, 5.0))
        assert cost.seconds == (slower * (1 + 1 / 16), slower * (1 + 33 / 16))  # no time to see how fast it is

    def test_a_slow_model_is_timed_at_two_sizes_only(self) -> None:
        cost, timed = self.measure(dict.fromkeys(SIZES, 1.0), limit=0.0)
        assert (cost.sizes, timed) == ((1, 33), [1, 33, 1, 33])

    def test_a_short_context_bounds_the_sizes(self) -> None:
        cost, _ = self.measure(dict.fromkeys(SIZES, 1.0), max_context=8)
        assert cost.sizes == (1, 2, 4)


class TestDraftLength:
    def test_where_passes_cost_the_same_the_longest_draft_is_best(self) -> None:
        assert best_length([0.5] * 10, FLAT) == 10

    def test_where_a_token_costs_a_pass_only_certain_tokens_pay(self) -> None:
        assert best_length([0.9] * 10, STEEP) == 0
        assert best_length([1.0] * 10, STEEP) > 0

    def test_the_best_length_is_the_maximum_of_the_rate(self) -> None:
        cost = PassCost((1, 3, 4, 16), (1.0, 1.1, 3.0, 15.0))
        rates = {k: sum(0.7**i for i in range(k + 1)) / cost(k + 1) for k in range(1, 9)}
        assert best_length([0.7] * 8, cost) == max(rates, key=lambda k: rates[k]) == 2

    @pytest.mark.parametrize("noise", [0.98, 1.02])
    def test_noise_of_a_few_percent_does_not_switch_drafting_off(self, noise: float) -> None:
        cost = PassCost((1, 2), (1.0, 1.4 * noise))
        assert best_length([0.4], cost) == 1

    def test_a_clear_loss_does(self) -> None:
        assert best_length([0.4], PassCost((1, 2), (1.0, 1.6))) == 0

    def test_a_fixed_length_asks_for_it_and_cuts_nothing(self) -> None:
        fixed = FixedLength(7)
        fixed.learn(DRAFT, 0)
        assert (fixed.limit, fixed.cut(DRAFT)) == (7, DRAFT)

    def test_longer_matches_are_trusted_more_at_first(self) -> None:
        adaptive = AdaptiveLength(FLAT)
        assert adaptive.limit == MAX_DRAFT
        estimates = [adaptive.acceptance("ngram", length) for length in (1, 2, 3, 9)]
        assert estimates[0] < estimates[1] < estimates[2] == estimates[3]

    def test_what_was_refused_lowers_the_estimate_and_what_was_accepted_raises_it(self) -> None:
        adaptive = AdaptiveLength(FLAT)
        before = adaptive.acceptance("ngram", 2)
        adaptive.learn(DRAFT, 10)
        assert adaptive.acceptance("ngram", 2) == pytest.approx((10 + 4 * before) / 14)
        other = AdaptiveLength(FLAT)
        other.learn(DRAFT, 3)
        assert other.acceptance("ngram", 2) == pytest.approx((3 + 4 * before) / 8)  # 3 right of 4 tried
        assert other.acceptance("ngram", 3) == AdaptiveLength(FLAT).acceptance("ngram", 3)

    def test_an_empty_draft_teaches_nothing(self) -> None:
        adaptive = AdaptiveLength(STEEP)
        adaptive.learn(NO_DRAFT, 0)
        assert adaptive.cut(NO_DRAFT) == NO_DRAFT
        assert adaptive.acceptance("ngram", 0) == AdaptiveLength(STEEP).acceptance("ngram", 0)

    def test_drafting_stops_when_it_does_not_pay_and_is_tried_again_later(self) -> None:
        adaptive = AdaptiveLength(PassCost((1, 16), (1.0, 4.0)))
        while tokens := adaptive.cut(DRAFT).tokens:
            adaptive.learn(Draft.of(tokens, "ngram", 2), 0)
        waited = 1
        while not (adaptive.limit and adaptive.cut(DRAFT).tokens):
            adaptive.learn(NO_DRAFT, 0)
            waited += 1
        assert 3 < waited < 50

    @pytest.mark.parametrize("match_lengths", [(1,), (2,), (3,), (1, 2, 3)])
    @pytest.mark.parametrize("acceptance", [0.0, 0.05, 0.15, 0.3])
    def test_drafts_that_do_not_help_cost_less_than_three_percent(
        self, acceptance: float, match_lengths: tuple[int, ...]
    ) -> None:
        """The drafter always has something to say, which is never or rarely right; every slope of costs."""
        for slope in (0.01, 0.03, 0.05, 0.1, 0.2, 0.4, 1.0):
            cost, luck = PassCost((1, 33), (1.0, 1.0 + 32 * slope)), random.Random(0)
            adaptive, seconds, tokens = AdaptiveLength(cost), 0.0, 0
            while tokens < 500:
                offered = Draft.of(range(15), "ngram", luck.choice(match_lengths))
                draft = adaptive.cut(offered) if adaptive.limit else NO_DRAFT
                accepted = 0
                while accepted < len(draft.tokens) and luck.random() < acceptance:
                    accepted += 1
                adaptive.learn(draft, accepted)
                seconds += cost(1 + len(draft.tokens))
                tokens += 1 + accepted
            assert seconds / tokens <= 1.03, f"costs that grow by {slope} a token"

    def test_a_drafter_that_becomes_right_is_soon_used(self) -> None:
        adaptive = AdaptiveLength(PassCost((1, 16), (1.0, 4.0)))
        for _ in range(300):
            adaptive.learn(adaptive.cut(DRAFT), 0)
        lengths = []
        for _ in range(100):
            draft = adaptive.cut(DRAFT)
            lengths.append(len(draft.tokens))
            adaptive.learn(draft, len(draft.tokens))
        assert lengths.index(10) < 60
        assert lengths[-1] == 10

    def test_a_draft_that_pays_is_cut_to_its_best_length(self) -> None:
        adaptive = AdaptiveLength(PassCost((1, 3, 4, 16), (1.0, 1.1, 3.0, 15.0)))
        assert adaptive.cut(DRAFT) == DRAFT.first(2)

    def test_a_doubtful_piece_behind_a_sure_one_is_cut_off(self) -> None:
        adaptive = AdaptiveLength(PassCost((1, 16), (1.0, 4.0)))
        sure, doubtful = Draft.of((1, 2, 3), "sure", 3), Draft.of((4, 5), "doubtful", 1)
        adaptive.learn(sure, 3)
        adaptive.learn(doubtful, 0)
        assert adaptive.cut(sure.then(doubtful)) == sure


class TestWindow:
    def test_a_window_is_due_when_full_or_probably_wrong(self) -> None:
        policy = WindowPolicy(4, 0.5)
        assert not policy.is_due(3, 0.5)
        assert policy.is_due(3, 0.49)
        assert policy.is_due(4, 1.0)
        assert policy.survival(0.1) == 1.0

    def test_agreement_is_that_of_the_margins_bin_smoothed(self) -> None:
        agreement = AgreementCurve(MarginTable([0.5, 2.0], [8, 18, 0], [3, 18, 0]))
        assert [agreement(m) for m in (0.0, 0.49, 0.5, 1.99, 2.0, 9.0)] == [0.4, 0.4, 0.95, 0.95, 0.5, 0.5]


class TestRates:
    CHEAP = PairCosts(verify=PassCost((1, 33), (1.0, 2.0)), confirm=PassCost((1, 33), (4.0, 5.0)))
    EQUAL = PairCosts(CHEAP.confirm, CHEAP.confirm)
    GOOD = MarginTable([1.0], [100, 900], [80, 899])

    def test_the_expected_pass_has_the_draft_of_the_best_rate(self) -> None:
        cost = PassCost((1, 3, 4, 16), (1.0, 1.1, 3.0, 15.0))
        assert expected_pass(0.7, cost) == (pytest.approx(1 + 0.7 + 0.49), pytest.approx(1.1))
        assert expected_pass(0.0, cost) == (1.0, 1.0)

    def test_the_rate_of_a_perfect_verifier_by_hand(self) -> None:
        """Without drafts a window of 32 takes 32 verifies and a confirm, and commits 33 tokens."""
        costs = PairCosts(PassCost((1,), (1.0,)), PassCost((1,), (8.0,)))
        plan = plan_exact(costs, agreements_of(ALWAYS), acceptance=0.0)
        assert plan.rate == pytest.approx(33 / (32 + 8), rel=2e-5)
        assert not plan.target_alone

    def test_a_cheap_verifier_is_used_and_a_dear_one_is_not(self) -> None:
        assert not plan_exact(self.CHEAP, agreements_of(self.GOOD)).target_alone
        plan = plan_exact(self.EQUAL, agreements_of(ALWAYS))
        assert plan.target_alone
        assert plan.rate == pytest.approx(pass_rate(self.EQUAL.confirm, 1 / 3))

    def test_a_verifier_that_is_mostly_wrong_is_not_used_however_cheap(self) -> None:
        assert plan_exact(self.CHEAP, agreements_of(MarginTable([], [1000], [10]))).target_alone

    def test_rates_of_all_modes(self) -> None:
        rates = predict_rates(self.CHEAP, self.GOOD)
        assert rates.plain == 0.25
        assert rates.exact is not None
        assert rates.plain < rates.full < rates.exact < rates.quantized
        assert predict_rates(self.CHEAP, None).exact is None
        worst = predict_rates(self.EQUAL, self.GOOD)
        assert worst.exact == pytest.approx(worst.full)
        assert worst.full == worst.quantized


def fidelity(margins: MarginTable) -> FidelityReport:
    return FidelityReport("text", 100, 0.9, 0.9, 0.9, 0.1, 0.2, 5.0, 5.1, margins)


class TestGeneratorsChoice:
    @pytest.fixture(autouse=True)
    def costs(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A verify costs a quarter of a confirm."""
        self.seconds = {"target": PassCost((1,), (4.0,)), "verifier": PassCost((1,), (1.0,))}
        monkeypatch.setattr(
            cost_records,
            "measure_pass",
            lambda pair, model, **_: (self.seconds["target" if model is pair.target else "verifier"], None),
        )

    def generator_of(self, pair: Any, **options: Any) -> Generator:
        return Generator(pair, GenerationConfig(num_draft_tokens=2, **options))

    def test_a_window_that_was_asked_for_is_taken(self) -> None:
        pair = make_pair(TableModel(8, 0), TableModel(8, 1))
        generator = self.generator_of(pair, window=5)
        assert (generator._window, generator._checking) == (WindowPolicy(5), None)

    def test_without_a_margin_table_agreement_is_learned_and_that_is_noted(self) -> None:
        pair = make_pair(TableModel(8, 0), TableModel(8, 1))
        generator = self.generator_of(pair)
        checking = generator._checking
        assert checking is not None
        assert checking.agreement(3.0) == pytest.approx(0.9)
        assert any("no margin table" in note for note in pair.notes)
        generator.generate([0, 1])
        assert checking.agreement(3.0) < 0.75  # another model altogether

    def test_with_one_agreement_begins_as_measured(self) -> None:
        pair = make_pair(TableModel(8, 0), TableModel(8, 1), fidelity=fidelity(MarginTable([1.0], [20, 80], [6, 80])))
        checking = self.generator_of(pair)._checking
        assert checking is not None
        assert checking.agreement(0.5) == pytest.approx(7 / 22)
        assert f"exact: {checking.checker.longest} sure tokens wait" in pair.notes[-1]

    @pytest.mark.parametrize(("beside", "expected"), [(None, 0.8), (0.97, 0.82)])
    def test_sampling_begins_at_the_overlap(self, beside: float | None, expected: float) -> None:
        """Which was measured of the verifier alone, as the agreement of 0.95 beside it."""
        report = FidelityReport("text", 100, 0.95, 0.9, 0.8, 0.1, 0.2, 5.0, 5.1, MarginTable([1.0], [20, 80], [6, 80]))
        report = replace(report, agreement_beside=beside)
        pair = make_pair(TableModel(8, 0), TableModel(8, 1), fidelity=report)
        checking = self.generator_of(pair, sampling=SamplingConfig(temperature=1.0))._checking
        assert checking is not None
        assert checking.agreement.now.mean == pytest.approx(expected, abs=1e-6)

    def test_notes_tell_the_costs_once(self) -> None:
        pair = make_pair(TableModel(8, 0), TableModel(8, 1))
        for _ in range(2):
            self.generator_of(pair)
        assert pair.notes[:2] == [
            "cost: the target's passes of 1, 4, 8 tokens take 4e+03, 4e+03, 4e+03 ms, measured now",
            "cost: the verifier's passes of 1, 4, 8 tokens take 1e+03, 1e+03, 1e+03 ms, measured now",
        ]
        assert len(pair.notes) == 4

    def test_each_model_of_a_mode_is_measured_once(self) -> None:
        pair = make_pair(TableModel(8, 0), TableModel(8, 1))
        assert pair_costs(pair, with_verifier=False) == PairCosts(self.seconds["target"], self.seconds["target"])
        assert set(pair.measured) == {"target"}
        both = PairCosts(self.seconds["verifier"], self.seconds["target"])
        self.seconds = dict.fromkeys(self.seconds, FLAT)
        assert pair_costs(pair, with_verifier=True) == PairCosts(FLAT, both.confirm)
        assert pair_costs(pair, with_verifier=True, remeasure=True) == PairCosts(FLAT, FLAT)
        alone = make_pair(None, TableModel(8, 1))
        assert pair_costs(alone, with_verifier=True) == PairCosts(FLAT, FLAT)

    def test_where_a_verify_costs_as_much_as_a_confirm_the_target_checks_all_drafts_at_first(self) -> None:
        self.seconds["verifier"] = self.seconds["target"]
        target = TableModel(8, 0)
        pair = make_pair(target, target.disturbed(0.5), fidelity=fidelity(MarginTable([1.0], [20, 80], [19, 80])))
        alone = Generator(pair, GenerationConfig(40, num_draft_tokens=4)).generate([0, 1])
        full = Generator(pair, GenerationConfig(40, "full", num_draft_tokens=4)).generate([0, 1])
        windows = Generator(pair, GenerationConfig(40, window=4)).generate([0, 1])
        assert alone.token_ids == full.token_ids == windows.token_ids
        by_target = [step.by_target for step in alone.stats.step_log]
        assert all(by_target[:6])  # then the verifier is weighed now and then
        assert sum(by_target) >= 0.8 * len(by_target)
        assert (windows.verified_by, windows.stats.confirms > 0) == ("verifier", True)
        assert any(note.startswith("exact: the target checks drafts alone at first") for note in pair.notes)

    def test_a_mode_without_confirms_keeps_its_verifier(self) -> None:
        self.seconds["verifier"] = self.seconds["target"]
        pair = make_pair(TableModel(8, 0), TableModel(8, 1))
        assert Generator(pair, GenerationConfig(4, "quantized")).generate([0, 1]).verified_by == "verifier"

    def test_a_window_closes_at_a_token_of_small_margin(self) -> None:
        """The verifier is sure of every token but one: the window is confirmed there, long before it is full."""
        model = TableModel(8, 0)
        rows = torch.arange(8)
        model.table = torch.zeros(8, 8, 8)
        model.table[:, rows, (rows + 1) % 8] = 9.0  # counts upwards
        model.table[:, 3, 5] = 8.9  # after a 3, a 5 is nearly as good as the 4
        pair = make_pair(model, model.disturbed(0.0), fidelity=fidelity(MarginTable([1.0], [100, 900], [10, 900])))
        generator = Generator(pair, GenerationConfig(17, draft="none"))
        result = generator.generate([0, 1])
        assert result.token_ids == [(2 + i) % 8 for i in range(17)]
        assert [confirm.window for confirm in result.stats.confirm_log][:2] == [2, 7]
