"""Metrics from hand-written rows, worked out by hand."""

from dataclasses import replace

import numpy as np
import pytest
from helpers.bench_records import make_results, make_row, make_run, make_stats
from hypothesis import given, settings
from hypothesis import strategies as st

from quasar_core.bench.arms import BenchConfig
from quasar_core.bench.metrics.arm_metrics import ArmMetrics, mean_over_datasets, measure, pool, speedup_over_all
from quasar_core.bench.metrics.estimates import estimate, mean_of_ratios, ratio_of_totals
from quasar_core.bench.results import Results
from quasar_core.records import Confirm, Step


def by_arm(results: Results) -> dict[str, ArmMetrics]:
    return {metric.arm: metric for metric in measure(results)}


def test_acceptance_by_hand() -> None:
    ngram = by_arm(make_results())["ngram"]
    # Question 1: 4 tokens from 2 steps; question 2: 3 tokens from 2 steps.
    assert (ngram.new_tokens, ngram.steps, ngram.questions, ngram.failed) == (9, 4, 2, 0)
    assert ngram.acceptance_length == pytest.approx(7 / 4)
    assert ngram.acceptance_length_mean == pytest.approx((4 / 2 + 3 / 2) / 2)
    # 3 of 7 drafted tokens accepted, by 3 steps that had a draft.
    assert ngram.acceptance_rate == pytest.approx(3 / 7)
    assert ngram.acceptance_length_vllm == pytest.approx(1 + 3 / 3)
    assert ngram.confirm_rate is None


def test_speed_by_hand() -> None:
    metrics = by_arm(make_results())
    assert metrics["vanilla"].tokens_per_s == pytest.approx(7 / 7)
    assert metrics["ngram"].tokens_per_s == pytest.approx(7 / 2.5)
    assert metrics["ngram"].prefill_s == pytest.approx(0.5)
    mean, total = metrics["ngram"].speedup_mean, metrics["ngram"].speedup_total
    assert mean is not None
    assert total is not None
    # Question 1: (4/1) ÷ (4/4) = 4; question 2: (3/1.5) ÷ (3/3) = 2.
    assert mean.value == pytest.approx(3.0)
    assert total.value == pytest.approx((7 / 2.5) / (7 / 7))
    # Two questions: a quarter of the draws holds only the first, a quarter only the second.
    assert mean.interval == pytest.approx((2.0, 4.0))
    assert metrics["vanilla"].speedup_mean == estimate(mean_of_ratios, np.ones((2, 2)), np.ones((2, 2)))


def test_speedups_by_hand_where_vanilla_is_slow() -> None:
    """Vanilla writes a token in two seconds: at a speed of 1, as above, a product would look like a ratio."""
    arm, vanilla = np.array([[4, 1.0], [3, 1.5]]), np.array([[4, 8.0], [3, 6.0]])
    assert mean_of_ratios(arm, vanilla) == pytest.approx((4 / 0.5 + 2 / 0.5) / 2)
    assert ratio_of_totals(arm, vanilla) == pytest.approx((7 / 2.5) / 0.5)


def test_speed_of_whole_answers_by_hand() -> None:
    """9 tokens each; with a quarter of a second for each prompt, 7.5 seconds beside 3."""
    metrics = by_arm(make_results())
    assert metrics["ngram"].speedup_answers is not None
    assert metrics["ngram"].speedup_answers.value == pytest.approx(7.5 / 3)
    assert metrics["vanilla"].speedup_answers is not None
    assert metrics["vanilla"].speedup_answers.value == 1
    over_all = speedup_over_all(make_results(), "ngram", 0.0, whole=True)
    assert over_all == metrics["ngram"].speedup_answers
    assert speedup_over_all(make_results(), "ngram", 0.0) == metrics["ngram"].speedup_total
    assert speedup_over_all(make_results(), "exact", 0.0) is None
    assert speedup_over_all(make_results(), "ngram", 1.0) is None


def test_identical_counts_questions_whose_ids_are_all_vanillas() -> None:
    metrics = by_arm(make_results())
    assert metrics["ngram"].identical == 1
    assert metrics["vanilla"].identical == 2


def test_identical_needs_every_turn() -> None:
    results = make_results()
    later = [
        make_row("vanilla", 1, [4], make_stats(1, 0.0, []), turn=1),
        make_row("ngram", 1, [5], make_stats(1, 0.0, []), turn=1),
    ]
    assert by_arm(Results(results.run, results.rows + later))["ngram"].identical == 0


def test_sampled_text_is_compared_but_with_that_of_other_programs() -> None:
    """Our arms draw by the same seeds, others by numbers of their own."""
    results = make_results()
    expected = by_arm(results)["ngram"].identical
    for arm, identical in (("ngram", expected), ("transformers", None)):
        run = make_run(config=BenchConfig(("vanilla", arm), temperatures=(1.0,)))
        arms = {"ngram": arm}
        rows = [replace(row, temperature=1.0, arm=arms.get(row.arm, row.arm)) for row in results.rows]
        assert by_arm(Results(run, rows))[arm].identical == identical


def test_a_failed_turn_fails_its_question_and_leaves_the_others() -> None:
    rows = make_results().rows
    failed = make_row("ngram", 1, [], None, turn=1, error="out of memory")
    ngram = by_arm(Results(make_run(), [*rows, failed]))["ngram"]
    assert (ngram.questions, ngram.failed, ngram.new_tokens, ngram.identical) == (2, 1, 4, 0)
    assert ngram.speedup_mean is not None
    assert ngram.speedup_mean.value == pytest.approx(2.0)
    assert ngram.speedup_mean.interval is None


def test_turns_and_repeats_of_a_question_are_pooled() -> None:
    rows = make_results().rows
    again = [replace(row, repeat=1) for row in rows]
    once, twice = by_arm(Results(make_run(), rows))["ngram"], by_arm(Results(make_run(), rows + again))["ngram"]
    assert (twice.questions, twice.new_tokens) == (2, 18)
    assert twice.acceptance_length == once.acceptance_length
    assert twice.speedup_mean == once.speedup_mean


def test_without_vanilla_there_is_no_speedup() -> None:
    results = make_results()
    rows = [row for row in results.rows if row.arm == "ngram"]
    ngram = by_arm(Results(results.run, rows))["ngram"]
    assert (ngram.speedup_mean, ngram.speedup_total, ngram.identical) == (None, None, None)


def test_an_answer_that_ends_in_the_prompts_pass_has_no_ratio() -> None:
    rows = [make_row(arm, 1, [2], make_stats(1, 0.0, [])) for arm in ("vanilla", "ngram")]
    ngram = by_arm(Results(make_run(), rows))["ngram"]
    assert (ngram.acceptance_length, ngram.tokens_per_s, ngram.speedup_mean, ngram.identical) == (None, None, None, 1)


def test_confirm_rate_by_hand() -> None:
    run = make_run(config=BenchConfig(("exact",)))
    stats = make_stats(6, 1.0, [Step(2, 2), Step(2, 1)], [Confirm(3, 3), Confirm(5, 1)])
    (exact,) = measure(Results(run, [make_row("exact", 1, [1] * 6, stats)]))
    assert exact.confirm_rate == pytest.approx(4 / 8)


def test_categories_and_means() -> None:
    results = make_results()
    rows = [replace(row, category="x") if row.question_id == 2 else row for row in results.rows]
    rows += [replace(row, dataset="e") for row in rows if row.question_id == 1]
    results = Results(results.run, rows)
    places = [(metric.dataset, metric.category, metric.arm) for metric in measure(results, by_category=True)]
    assert places == [(d, c, arm) for d, c in [("d", "c"), ("d", "x"), ("e", "c")] for arm in ("vanilla", "ngram")]
    vanilla, ngram = mean_over_datasets(measure(results))
    assert (vanilla.arm, vanilla.speedup, vanilla.acceptance_length) == ("vanilla", 1.0, 1.0)
    assert ngram.speedup == pytest.approx((2.8 + 4.0) / 2)
    assert ngram.acceptance_length == pytest.approx((7 / 4 + 4 / 2) / 2)


def test_pool_adds_counts_and_joins_logs() -> None:
    first, second = make_stats(5, 1.0, [Step(3, 2)]), make_stats(4, 1.5, [Step(0, 0)], [Confirm(2, 1)])
    first.peak_memory_bytes, second.peak_memory_bytes = 10, 20
    total = pool([first, second])
    assert (total.new_tokens, total.prefill_tokens, total.decode_s) == (9, 2, 2.5)
    assert (total.step_log, total.confirm_log) == ([Step(3, 2), Step(0, 0)], [Confirm(2, 1)])
    assert total.peak_memory_bytes == 20
    assert first.step_log == [Step(3, 2)]


pairs_of_questions = st.lists(
    st.tuples(st.integers(1, 500), st.floats(0.01, 100), st.integers(1, 500), st.floats(0.01, 100)),
    min_size=2,
    max_size=12,
).map(np.array)


@settings(derandomize=True, deadline=None)
@given(pairs_of_questions)
def test_mean_speedup_lies_between_the_slowest_and_the_fastest_question(questions: np.ndarray) -> None:
    arm, vanilla = questions[:, :2], questions[:, 2:]
    ratios = (arm[:, 0] / arm[:, 1]) / (vanilla[:, 0] / vanilla[:, 1])
    mean = estimate(mean_of_ratios, arm, vanilla)
    assert ratios.min() * 0.999 <= mean.value <= ratios.max() * 1.001
    for statistic in (mean_of_ratios, ratio_of_totals):
        one = estimate(statistic, arm, vanilla)
        assert one.interval is not None
        assert one.interval[0] <= one.interval[1]
        assert estimate(statistic, arm, vanilla) == one


@settings(derandomize=True, deadline=None)
@given(pairs_of_questions, st.floats(0.1, 10))
def test_an_arm_that_is_faster_by_a_factor_has_that_speedup_without_doubt(questions: np.ndarray, factor: float) -> None:
    vanilla = questions[:, 2:]
    arm = vanilla / [1, factor]
    for statistic in (mean_of_ratios, ratio_of_totals):
        one = estimate(statistic, arm, vanilla)
        assert one.interval is not None
        assert (one.value, *one.interval) == pytest.approx((factor,) * 3)
