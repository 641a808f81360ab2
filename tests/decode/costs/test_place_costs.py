"""Costs by the positions before a pass: measured, remembered, and what decoding makes of them.

Models and generators run over a clock made by hand, on which a pass takes longer the more stands before it.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.bench_pair import TokenCache
from helpers.decoder_cases import CASES, CPU, save_model
from helpers.tiny_models import TableModel, make_pair

from quasar_core.config import GenerationConfig
from quasar_core.decode.costs import cost_records
from quasar_core.decode.costs.cost_records import (
    FAR,
    FAR_SIZES,
    CostRecord,
    cost_record,
    measure_pass,
    measure_slope,
    positions_seen,
)
from quasar_core.decode.costs.pass_costs import CONTEXT, STRIDE, LiveCost, PairCosts, PassCost
from quasar_core.decode.generator import Generator
from quasar_core.decode.policy.agreement import AgreementCurve, RunningAgreement
from quasar_core.decode.policy.check import REPLANNED, Checker
from quasar_core.decode.policy.window_values import prospect_of
from quasar_core.models.verifier.narrow import SEEN, SINKS, narrowed
from quasar_core.models.weights.lean_weights import load_target
from quasar_core.records import FidelityReport, GenerationResult, MarginTable

ROW = PassCost((1, 33), (1e-3, 33e-3))  # a thousandth of a second for each row and position
TARGET, VERIFIER = PassCost((1, 33), (1.0, 2.6), ROW), PassCost((1, 33), (0.3, 1.9), ROW)
FLAT = replace(TARGET, slope=None), replace(VERIFIER, slope=None)
GOOD = FidelityReport("t", 100, 0.9, 0.9, 0.9, 0.1, 0.2, 5.0, 5.1, MarginTable([], [1000], [880]))


class TestPassCost:
    def test_each_position_more_adds_its_slope(self) -> None:
        assert TARGET.at(CONTEXT + 100).seconds == pytest.approx((1.1, 2.6 + 3.3))
        assert TARGET.at(CONTEXT + 100)(17) == pytest.approx(1.8 + 1.7)

    def test_fewer_positions_than_were_timed_count_as_those(self) -> None:
        assert TARGET.at(3) == TARGET.at(CONTEXT) == TARGET
        assert FLAT[0].at(5000) == FLAT[0]

    def test_so_many_times_the_cost_has_so_many_times_the_slope(self) -> None:
        assert TARGET.scaled(3.0).at(1000)(9) == pytest.approx(3 * TARGET.at(1000)(9))


class TestLiveCost:
    def test_it_moves_on_with_the_text(self) -> None:
        live = LiveCost(TARGET)
        live.move_to(CONTEXT + 10 * STRIDE)
        assert (live(1), live(100)) == pytest.approx((1.32, TARGET.at(384)(100)))

    def test_what_was_learned_at_one_place_holds_at_others(self) -> None:
        live = LiveCost(TARGET)
        for _ in range(4):
            live.observe(1, 2.0)
        live.move_to(CONTEXT + 1024)
        assert live(1) == pytest.approx(2 * 2.024)
        for _ in range(20):
            live.observe(1, 2.024)
        live.move_to(0)
        assert live(1) == pytest.approx(1.0)

    def test_a_cost_without_places_is_the_same_everywhere(self) -> None:
        live = LiveCost(lambda tokens: 2.0 * tokens)
        live.move_to(5000)
        assert live(3) == 6.0


class TestMeasuring:
    @pytest.fixture
    def target(self, tmp_path: Path) -> Any:
        save_model(tmp_path, *CASES["qwen3"])
        return load_target(tmp_path, CPU, torch.float32)

    @pytest.fixture
    def timed(self, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
        """Passes take what `TARGET` says of the place that they stand at; which were timed."""
        found: list[tuple[int, int]] = []

        def sampler(model: Any, cache: Any, size: int, now: Any) -> Any:
            def sample() -> float:
                found.append((size, cache.length))
                return TARGET.at(cache.length)(size)

            return sample

        monkeypatch.setattr(cost_records, "pass_sampler", sampler)
        return found

    def test_the_slope_is_that_between_two_places(self, target: Any, timed: list[tuple[int, int]]) -> None:
        cost, _ = measure_pass(make_pair(target, max_context=8192), target)
        assert {place for _, place in timed} == {CONTEXT, FAR}
        for positions in (CONTEXT, 500, 9000):
            assert [cost.at(positions)(size) for size in (1, 4, 33)] == pytest.approx(
                [TARGET.at(positions)(size) for size in (1, 4, 33)]
            )

    def test_where_the_time_is_up_it_grows_with_the_tokens(self, target: Any, timed: list[tuple[int, int]]) -> None:
        slope, _ = measure_slope(make_pair(target, max_context=8192), target, seconds=-1.0)
        assert {size for size, _ in timed} == {FAR_SIZES[0]}
        assert slope
        assert [slope(size) for size in (1, 8, 33)] == pytest.approx([1e-3, 8e-3, 33e-3])

    def test_a_short_context_and_other_models_have_none(self, target: Any, timed: list[tuple[int, int]]) -> None:
        table = TableModel(8, 0)
        for model, context in ((target, 128), (table, 8192)):
            slope, _ = measure_slope(make_pair(model, max_context=context), model, seconds=1.0)
            assert slope is None
        assert not timed

    def test_caches_of_large_models_are_timed_behind_fewer_positions(
        self, target: Any, timed: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        one = sum(states.numel() * states.element_size() for states in target.new_cache(1).layers)
        monkeypatch.setattr(cost_records, "FAR_BYTES", 1000 * one)
        measure_slope(make_pair(target, max_context=8192), target, seconds=1.0)
        assert max(place for _, place in timed) == 1000

    def test_a_layer_with_a_window_sees_no_more(self, target: Any) -> None:
        assert positions_seen(target, 3000) == 3000
        assert positions_seen(narrowed(target), 3000) == SINKS + SEEN
        assert positions_seen(narrowed(target), 100) == 100
        half = narrowed(target)
        half.config = replace(half.config, blocks=(*target.config.blocks[:1], *half.config.blocks[1:2]))
        assert positions_seen(half, 3000) == (3000 + SINKS + SEEN) / 2


class TestRecords:
    @pytest.fixture(autouse=True)
    def _measured(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(cost_records, "measure_pass", lambda pair, model, **_: (TARGET, None))

    def known(self) -> CostRecord:
        return cost_record(make_pair(TableModel(8, 0), target_fingerprint="t"), "target")

    def test_a_later_run_remembers_the_slope(self) -> None:
        assert not self.known().remembered
        again = self.known()
        assert again.remembered
        assert again.cost.at(3000)(9) == pytest.approx(TARGET.at(3000)(9))
        assert "(a token's 1e+03 ms more behind 1000 positions)" in again.describe()

    def test_what_an_older_version_kept_is_measured_anew(self, tmp_path: Path) -> None:
        self.known()
        (path,) = (tmp_path / "home" / "measured").glob("passes-*.json")
        content = json.loads(path.read_text())
        del content["values"]["further"]
        path.write_text(json.dumps(content))
        assert list(cost_records.stored_costs()) == []
        assert not self.known().remembered
        assert self.known().remembered


class Machine:
    """The clock, and the passes: whose, over how many tokens, with how many positions before them."""

    def __init__(self) -> None:
        self.now, self.passes = 0.0, list[tuple[str, int, int]]()

    def __call__(self) -> float:
        return self.now


class PlacedModel(TableModel):
    """A model whose passes take what the positions before them say."""

    def __init__(self, machine: Machine, role: str, cost: PassCost) -> None:
        super().__init__(8, 0)
        self.machine, self.role, self.cost = machine, role, cost

    def forward(self, tokens: Sequence[int], cache: TokenCache, last_only: bool = False) -> torch.Tensor:
        if not last_only:
            self.machine.passes.append((self.role, len(tokens), cache.length))
            self.machine.now += self.cost.at(cache.length)(len(tokens))
        return super().forward(tokens, cache, last_only)


def answer(
    mode: str, prompt: int, told: tuple[PassCost, PassCost] = (TARGET, VERIFIER)
) -> tuple[GenerationResult, Machine]:
    """An answer of 200 tokens behind a prompt of so many, decoded by what is `told` of target and verifier."""
    machine = Machine()
    target, verifier = PlacedModel(machine, "target", TARGET), PlacedModel(machine, "verifier", VERIFIER)
    verifier.table = target.disturbed(0.25).table
    pair = make_pair(target, verifier, max_context=8192, fidelity=GOOD)
    pair.measured.update(
        target=CostRecord(told[0], {"role": "target"}, 0.0), verifier=CostRecord(told[1], {"role": "verifier"}, 0.0)
    )
    config = GenerationConfig(200, mode, draft="none")  # type: ignore[arg-type]
    return Generator(pair, config, now=machine).generate([n * n % 7 for n in range(prompt)]), machine


class TestWhoChecks:
    """Behind 64 positions a verify takes 0.3 of a target pass; behind 3000 all passes take three seconds more a row."""

    def test_behind_a_short_prompt_the_verifier_is_worth_asking(self) -> None:
        plain, exact = answer("full", 20), answer("exact", 20)
        assert exact[0].token_ids == plain[0].token_ids
        assert exact[1].now < 0.85 * plain[1].now

    def test_behind_a_long_one_the_target_decodes_alone(self) -> None:
        plain, exact, blind = answer("full", 3000), answer("exact", 3000), answer("exact", 3000, FLAT)
        assert exact[0].token_ids == plain[0].token_ids == blind[0].token_ids
        assert sum(role == "verifier" for role, _, _ in exact[1].passes) <= 10
        assert exact[1].now < 1.05 * plain[1].now
        assert blind[1].now > exact[1].now

    def test_drafts_behind_a_long_prompt_are_cut_to_what_their_rows_cost(self) -> None:
        near, far = LiveCost(TARGET), LiveCost(TARGET)
        far.move_to(3000)
        costs = PairCosts(near, near)
        assert prospect_of([0.8] * 15, [], costs, 0.5).length > 5
        assert prospect_of([0.8] * 15, [], PairCosts(far, far), 0.25).length <= 1


class TestWhatStepsTakeBesideTheirPasses:
    COSTS = PairCosts(PassCost((1,), (1.0,)), PassCost((1,), (3.0,)))

    def checker(self, seconds: float) -> Checker:
        curve = AgreementCurve(MarginTable([], [1000], [850]))
        checker = Checker(self.COSTS, RunningAgreement(curve), [prospect_of((), (), self.COSTS, 0.0)])
        for _ in range(REPLANNED):
            checker.spent(seconds)
            checker.confirmed([], 0)
        checker.begin()
        return checker

    def test_the_verifier_has_to_be_worth_that_too(self) -> None:
        """A verify and a confirm yield 1.85 tokens: in 4 seconds to a token in 3; then in 16 to 9, and in 52 to 27."""
        assert not self.checker(0.0).choose(0, 1.0, [], []).by_target
        assert not self.checker(6.0).choose(0, 1.0, [], []).by_target
        assert self.checker(24.0).choose(0, 1.0, [], []).by_target

    def test_it_counts_in_the_rate(self) -> None:
        assert self.checker(6.0).rate < 0.6 * self.checker(0.0).rate

    def test_a_step_that_was_disturbed_tells_nothing(self) -> None:
        checker = self.checker(0.0)
        checker.spent(1000.0)
        checker.begin()
        assert not checker.choose(0, 1.0, [], []).by_target
