"""Costs that are corrected while decoding: generators and models over a clock made by hand.

A simulated machine tells what each pass takes; what decoding spent is counted in its true costs, without noise.
"""

import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from helpers.bench_pair import TokenCache
from helpers.tiny_models import TableModel, make_pair
from hypothesis import given, settings
from hypothesis import strategies as st

from quasar_core.config import GenerationConfig, SamplingConfig
from quasar_core.decode import generator as generator_module
from quasar_core.decode.costs import cost_records
from quasar_core.decode.costs.cost_records import CostRecord
from quasar_core.decode.costs.pass_costs import FEW, KNOWN, OLD, LiveCost, PassCost
from quasar_core.decode.generator import Generator
from quasar_core.decode.policy.lengths import AdaptiveLength
from quasar_core.draft.base import Draft, Drafter
from quasar_core.draft.ngram import NgramDrafter
from quasar_core.records import FidelityReport, MarginTable
from quasar_core.system import Load

TRUE = PassCost((1, 33), (1.0, 2.6))  # a twentieth of a pass for every further token
STEEP = PassCost((1, 33), (1.0, 12.0))
Noise = Callable[[], float]
QUIET: Noise = lambda: 1.0  # noqa: E731


def heavy_tailed(seed: int) -> Noise:
    """Half of the passes are disturbed, by as much as a Pareto's tail: a hundred times now and again."""
    luck = random.Random(seed)
    return lambda: 1.0 + 0.02 * luck.random() + (luck.paretovariate(0.8) if luck.random() < 0.5 else 0.0)


class Machine:
    """The clock, and what was done: passes by their tokens and asking the drafter, in true seconds."""

    def __init__(self, noise: Noise = QUIET) -> None:
        self.now, self.noise, self.spent, self.passes = 0.0, noise, 0.0, list[int]()

    def __call__(self) -> float:
        return self.now

    def take(self, seconds: float) -> None:
        self.spent += seconds
        self.now += seconds * self.noise()


class SimulatedModel(TableModel):
    def __init__(self, machine: Machine, cost: PassCost, seed: int = 0) -> None:
        super().__init__(8, seed)
        self.machine, self.cost = machine, cost

    def forward(self, tokens: Sequence[int], cache: TokenCache, last_only: bool = False) -> torch.Tensor:
        if not last_only:
            self.machine.passes.append(len(tokens))
            self.machine.take(self.cost(len(tokens)))
        return super().forward(tokens, cache, last_only)


class SimulatedDrafter(Drafter):
    """Always has fifteen tokens to say, of which so many of a hundred are right; asking it takes time."""

    def __init__(self, machine: Machine, text: Sequence[int], right: float = 0.0, seconds: float = 0.0) -> None:
        self.machine, self.text, self.right, self.seconds = machine, text, right, seconds
        self.luck, self.position = random.Random(0), 0

    def observe(self, tokens: Sequence[int]) -> None:
        self.position += len(tokens)

    def forget(self, count: int) -> None:
        self.position -= count

    def propose(self, limit: int, after: Sequence[int] = ()) -> Draft:
        self.machine.take(self.seconds)
        known = [self.text[(self.position + i) % len(self.text)] for i in range(min(limit, 15))]
        drawn = [token if self.luck.random() < self.right else (token + 1) % 8 for token in known]
        return Draft.of(drawn, "ngram", 2)


def remembered(cost: PassCost, role: str = "target") -> CostRecord:
    return CostRecord(cost, {"role": role}, 0.0, remembered=True)


class Decoding:
    """A generator of a simulated target, whose costs are remembered as said."""

    def __init__(
        self,
        memory: PassCost,
        true: PassCost = TRUE,
        noise: Noise = QUIET,
        right: float = 0.0,
        asking: float = 0.0,
        tokens: int = 256,
        **options: Any,
    ) -> None:
        self.machine, self.tokens, self.true = Machine(noise), tokens, true
        self.asking = asking  # once before the first step, in the prompt's time
        model = SimulatedModel(self.machine, true)
        self.pair = make_pair(model, max_context=4096)
        self.pair.measured["target"] = remembered(memory)
        config = GenerationConfig(tokens, "full", **options)
        plain = Generator(self.pair, GenerationConfig(tokens, "full", draft="none", **options)).generate([0, 1])
        self.text = [0, 1, *plain.token_ids]

        def drafter() -> Any:
            return SimulatedDrafter(self.machine, self.text, right, asking)

        self.generator = Generator(self.pair, config, drafter, now=self.machine)

    def answer(self) -> float:
        """Generate; true seconds beside those of plain decoding."""
        self.machine.spent = 0.0
        del self.machine.passes[:]
        result = self.generator.generate([0, 1])
        assert result.token_ids == self.text[2:]
        self.generator.reset()
        return (self.machine.spent - self.asking) / ((self.tokens - 1) * self.true(1))


def scaled(cost: PassCost, factor: float) -> PassCost:
    return PassCost(cost.sizes, tuple(factor * seconds for seconds in cost.seconds))


class TestLiveCost:
    def test_what_is_known_holds_until_a_few_passes_say_otherwise(self) -> None:
        live = LiveCost(TRUE)
        for _ in range(KNOWN - 1):
            live.observe(1, 40.0)
            assert live(1) == 1.0
        live.observe(1, 40.0)
        assert live(1) == 40.0
        assert live(8) == 40.0 * TRUE(8)  # the machine as a whole is slower

    def test_sizes_are_corrected_for_themselves(self) -> None:
        live = LiveCost(TRUE)
        for _ in range(KNOWN):
            live.observe(1, 1.0)
            live.observe(8, 4 * TRUE(8))
        assert (live(1), live(7)) == (1.0, 4 * TRUE(7))
        assert live(12) == 4 * TRUE(12)  # as the nearest that was seen
        assert live(100) == 4 * TRUE(100)

    def test_more_tokens_never_cost_less_than_one(self) -> None:
        live = LiveCost(TRUE)
        for _ in range(KNOWN):
            live.observe(1, 5.0)
            live.observe(4, 0.1)
        assert live(4) == live(1) == 5.0

    @pytest.mark.parametrize("outlier", [30.0, 1000.0])
    def test_outliers_move_nothing(self, outlier: float) -> None:
        live = LiveCost(TRUE)
        for number in range(60):
            live.observe(1, outlier if number % 2 else 1.0)
            if number > 8:
                assert live(1) == 1.0

    def test_what_was_seen_long_ago_is_forgotten(self) -> None:
        live = LiveCost(TRUE)
        for _ in range(KNOWN):
            live.observe(8, 9.0)
        for _ in range(OLD + FEW):
            live.observe(1, 1.0)
        assert (live.seen(8), live(8)) == (0, TRUE(8))

    def test_only_many_passes_far_off_contradict(self) -> None:
        live = LiveCost(TRUE)
        for _ in range(7):
            live.observe(1, 40.0)
            assert not live.contradicts
        live.observe(1, 40.0)
        assert live.contradicts
        near = LiveCost(TRUE)
        for _ in range(20):
            near.observe(1, 1.9)
        assert not near.contradicts


class TestMemoryHeals:
    @pytest.mark.parametrize("factor", [1 / 40, 1.0, 40.0])
    @pytest.mark.parametrize("right", [0.0, 0.9])
    def test_a_memory_forty_times_off_as_a_whole_heals_within_an_answer(self, factor: float, right: float) -> None:
        wrong, well = (Decoding(scaled(TRUE, off), right=right) for off in (factor, 1.0))
        assert wrong.answer() <= 1.1 * well.answer()  # longer drafts are tried step by step
        assert wrong.generator._costs.corrected().verify(1) == pytest.approx(TRUE(1))
        assert wrong.answer() <= 1.03 * well.answer()

    def test_plain_passes_remembered_forty_times_too_dear_do_not_make_every_draft_look_cheap(self) -> None:
        """As a busy machine leaves it: one size was disturbed, and bounds the smaller ones from above."""
        decoding = Decoding(PassCost((1, 33), (40.0, 40.0)), STEEP)
        assert decoding.answer() <= 1.03
        assert decoding.generator._costs.corrected().verify(1) == pytest.approx(1.0)

    def test_drafts_remembered_forty_times_too_dear_are_used_within_one_answer(self) -> None:
        decoding = Decoding(PassCost((1, 2, 33), (1.0, 40.0, 104.0)), TRUE, right=1.0, tokens=600)
        decoding.answer()
        assert decoding.machine.passes[-10:-1] == [16] * 9

    def test_drafts_remembered_too_cheap_are_left_out_within_one_answer(self) -> None:
        decoding = Decoding(PassCost((1, 33), (1.0, 1.0)), STEEP, right=0.05)
        assert decoding.answer() <= 1.05


class TestDraftsThatNeverHit:
    @pytest.mark.parametrize("asking", [0.0, 0.02, 0.3, 2.0])
    @pytest.mark.parametrize("true", [PassCost((1, 33), (1.0, 1.0)), TRUE, STEEP], ids=["flat", "true", "steep"])
    def test_they_cost_less_than_three_percent_with_the_time_of_asking(self, true: PassCost, asking: float) -> None:
        """Asking takes up to two passes: the drafter must be left in peace."""
        decoding = Decoding(true, true, asking=asking)
        assert max(decoding.answer() for _ in range(4)) <= 1.03

    @pytest.mark.parametrize("seed", range(4))
    def test_on_a_busy_machine_too(self, seed: int) -> None:
        decoding = Decoding(TRUE, TRUE, heavy_tailed(seed), asking=0.05)
        assert max(decoding.answer() for _ in range(4)) <= 1.03

    @pytest.mark.parametrize("seed", range(4))
    def test_with_a_memory_that_a_busy_machine_spoilt_too(self, seed: int) -> None:
        decoding = Decoding(PassCost((1, 8, 33), (7.0, 9.0, 35.0)), TRUE, heavy_tailed(seed), asking=0.05)
        assert max(decoding.answer() for _ in range(4)) <= 1.03


class TestNoise:
    @pytest.mark.parametrize("seed", range(6))
    def test_drafts_that_pay_stay_in_use_on_a_busy_machine(self, seed: int) -> None:
        """The whole answer, its first passes included, is nearly as fast as on a quiet one."""
        quiet = Decoding(TRUE, right=0.8)
        busy = Decoding(TRUE, noise=heavy_tailed(seed), right=0.8)
        quiet.answer(), busy.answer()
        assert busy.answer() <= 1.25 * quiet.answer()
        lengths = busy.machine.passes
        assert sum(length > 1 for length in lengths) >= 0.8 * len(lengths)

    def test_a_machine_that_becomes_busy_at_once_is_not_taken_for_dear_drafts_for_long(self) -> None:
        """Ten times slower from one pass to the next, with drafts in use and plain passes rare."""
        now = {"slow": 1.0}
        decoding = Decoding(TRUE, noise=lambda: now["slow"], right=1.0, tokens=1200)
        decoding.answer()
        now["slow"] = 10.0
        quick = decoding.answer()
        now["slow"] = 1.0
        assert quick <= 1.3 * decoding.answer()


class TestGenerator:
    def test_sampling_does_not_follow_the_clock(self) -> None:
        """A seed fixes the text: what is drawn depends on how drafts are cut."""
        sampling = SamplingConfig(temperature=1.0, seed=3)
        texts = []
        for noise in (QUIET, heavy_tailed(1)):
            machine = Machine(noise)
            pair = make_pair(SimulatedModel(machine, TRUE), max_context=4096)
            pair.measured["target"] = remembered(TRUE)
            config = GenerationConfig(120, "full", sampling=sampling)
            texts.append(Generator(pair, config, NgramDrafter, now=machine).generate([0, 1]).token_ids)
        assert texts[0] == texts[1]

    def test_a_verifier_that_memory_calls_dear_is_tried_before_it_is_left_out(self) -> None:
        machine = Machine()
        fidelity = FidelityReport("t", 100, 0.99, 0.99, 0.99, 0.1, 0.2, 5.0, 5.1, MarginTable([1.0], [9, 91], [8, 91]))
        verifier = SimulatedModel(machine, scaled(TRUE, 0.2), seed=0)
        pair = make_pair(SimulatedModel(machine, TRUE), verifier, max_context=4096, fidelity=fidelity)
        pair.measured.update(target=remembered(TRUE), verifier=remembered(scaled(TRUE, 8.0), "verifier"))
        generator = Generator(pair, GenerationConfig(64, "exact"), now=machine)
        assert generator.generate([0, 1]).verified_by == "verifier"

    def test_confirms_correct_the_window(self) -> None:
        """The target was remembered as dear, and is not: windows become short within an answer."""
        machine = Machine()
        fidelity = FidelityReport("t", 100, 0.9, 0.9, 0.9, 0.1, 0.2, 5.0, 5.1, MarginTable([], [100], [88]))
        target = SimulatedModel(machine, TRUE)
        verifier = SimulatedModel(machine, scaled(TRUE, 0.4))
        verifier.table = target.disturbed(0.3).table
        pair = make_pair(target, verifier, max_context=4096, fidelity=fidelity)
        pair.measured.update(target=remembered(scaled(TRUE, 40)), verifier=remembered(verifier.cost, "verifier"))
        generator = Generator(pair, GenerationConfig(256, "exact", draft="none"), now=machine)
        windows = [confirm.window for confirm in generator.generate([0, 1]).stats.confirm_log]
        assert windows[0] > 8
        assert max(windows[-20:]) <= 4

    @pytest.mark.parametrize(("busy", "forgotten"), [(0.0, True), (0.5, False)])
    def test_a_wrong_memory_is_forgotten_unless_the_machine_is_busy(
        self, busy: float, forgotten: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        dropped: list[str] = []
        monkeypatch.setattr("quasar_core.decode.costs.run_costs.forget_cost", lambda pair, role: dropped.append(role))
        monkeypatch.setattr(generator_module.LoadMeter, "read", lambda self: Load(busy))
        decoding = Decoding(scaled(TRUE, 40.0))
        decoding.answer()
        assert dropped == (["target"] if forgotten else [])
        assert any("was wrong" in note for note in decoding.pair.notes) == forgotten

    def test_nothing_right_is_forgotten(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(
            "quasar_core.decode.costs.run_costs.forget_cost", lambda pair, role: pytest.fail("forgotten")
        )
        monkeypatch.setattr(generator_module.LoadMeter, "read", lambda self: Load(0.0))
        Decoding(TRUE, right=0.5).answer()


def test_the_budget_is_kept_over_answers() -> None:
    """Many short answers may not each lose what one may."""
    adaptive = AdaptiveLength(PassCost((1, 33), (1.0, 9.0)))
    lost = 0.0
    for _ in range(50):
        adaptive.begin()
        for _ in range(64):
            draft = adaptive.cut(Draft.of(range(15), "ngram", 3)) if adaptive.limit else Draft()
            adaptive.learn(draft, 0)
            lost += adaptive.cost(1 + len(draft.tokens)) - 1
    assert lost <= 0.03 * 50 * 64


def test_measuring_on_a_busy_machine_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quasar_core.timing.LoadMeter.read", lambda self: Load(0.9))
    model = TableModel(8, 0)
    cost, trouble = cost_records.measure_pass(make_pair(model), model, seconds=0.01)
    assert cost(1) > 0
    assert trouble == "the machine was busy: other programs took 90 % of the cores"


@given(st.lists(st.tuples(st.sampled_from([1, 2, 3, 4, 6, 9, 17, 65, 70]), st.floats(0.1, 9.0)), max_size=60))
@settings(deadline=None, derandomize=True, max_examples=60)
def test_a_cost_that_is_asked_between_passes_is_that_of_one_that_was_not(passes: list[tuple[int, float]]) -> None:
    """What is kept from one decision to the next is no older than the latest pass."""
    asked, other = LiveCost(TRUE), LiveCost(TRUE)
    for place, (tokens, seconds) in enumerate(passes):
        for cost in (asked, other):
            cost.observe(tokens, seconds)
            cost.move_to(place)
        assert all(asked(size) > 0 for size in (1, 5, 80))
    assert [asked(size) for size in range(90)] == [other(size) for size in range(90)]
