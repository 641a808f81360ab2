"""Answers that leave vanilla's: found, placed, and judged by the target's two best logits."""

from dataclasses import replace
from pathlib import Path

import pytest
from helpers.bench_pair import CountingModel, make_pair
from helpers.bench_records import make_row, make_stats

from quasar_cli.render.bench_words import describe_divergences
from quasar_core.bench.arms import BenchConfig
from quasar_core.bench.datasets import Dataset, Question
from quasar_core.bench.divergence import find_divergences, first_difference
from quasar_core.bench.results import Divergence, Row, read_results
from quasar_core.bench.run import run_bench
from quasar_core.records import Step

DATASET = Dataset("d", (Question(1, "c", ("w3 w4", "w5")),))


def answer(arm: str, token_ids: list[int], turn: int = 0) -> Row:
    text = " ".join(f"w{token}" for token in token_ids)
    stats = make_stats(len(token_ids), 1.0, [Step(0, 0)] * (len(token_ids) - 1))
    return make_row(arm, 1, token_ids, stats, turn=turn, text=text)


def test_first_difference_by_hand() -> None:
    assert first_difference([1, 2, 3], [1, 2, 4]) == 2
    assert first_difference([1, 2], [1, 2, 4]) == 2
    assert first_difference([], [5]) == 0


def test_only_arms_that_promise_the_targets_output_are_judged() -> None:
    rows = [answer("vanilla", [5, 6]), answer("quantized", [9, 9]), answer("ngram", [5, 6]), answer("exact", [5, 7])]
    (found,) = find_divergences(make_pair(), [DATASET], rows)
    assert (found.arm, found.turn, found.position) == ("exact", 0, 1)


def test_a_conversation_is_judged_at_its_first_difference_alone() -> None:
    rows = [
        *(answer("vanilla", [5, 6], turn) for turn in (0, 1)),
        answer("exact", [5, 6], 0),
        answer("exact", [7, 6], 1),
    ]
    (found,) = find_divergences(make_pair(), [DATASET], rows)
    assert (found.turn, found.position) == (1, 0)


def test_a_model_that_is_sure_of_itself_leaves_no_near_tie() -> None:
    rows = [answer("vanilla", [5, 6]), answer("exact", [5, 7])]
    (found,) = find_divergences(make_pair(), [DATASET], rows)
    assert found.gap > found.rounding
    assert not found.near_tie
    assert replace(found, gap=found.rounding).near_tie


def test_a_failed_answer_is_not_judged() -> None:
    failed = make_row("exact", 1, [], None, error="lost")
    assert find_divergences(make_pair(), [DATASET], [answer("vanilla", [5, 6]), failed]) == []


def test_a_faithful_run_has_none_and_the_file_says_so(tmp_path: Path) -> None:
    pair = make_pair(verifier=CountingModel(wrong_after=6))
    config = BenchConfig(("vanilla", "ngram", "exact"), max_new_tokens=12)
    results = run_bench(pair, [DATASET], config, tmp_path / "r.json")
    assert results.divergences == []
    assert describe_divergences(results) == ""
    assert read_results(tmp_path / "r.json") == results


@pytest.mark.parametrize(("gap", "verdict"), [(0.01, "lie within it"), (3.0, "at 1 of those places")])
def test_the_sentence_tells_rounding_from_a_defect(tmp_path: Path, gap: float, verdict: str) -> None:
    pair = make_pair(verifier=CountingModel(wrong_after=6))
    results = run_bench(pair, [DATASET], BenchConfig(("vanilla", "exact"), max_new_tokens=8), tmp_path / "r.json")
    divergence = Divergence("d", 1, 0, "exact", 0, 3, gap, 0.06)
    sentence = describe_divergences(replace(results, divergences=[divergence]))
    assert sentence.startswith("1 answer leaves vanilla's text")
    assert verdict in sentence
