"""What `gated` achieved is counted on finished answers, by the target's own passes."""

from dataclasses import replace
from pathlib import Path

import pytest
from helpers.bench_pair import CountingModel, make_pair
from helpers.bench_records import make_row, make_stats

from quasar_cli.render.bench_words import describe_achieved
from quasar_core.bench import gated
from quasar_core.bench.arms import BenchConfig
from quasar_core.bench.datasets import Dataset, Question
from quasar_core.bench.gated import measure_achieved
from quasar_core.bench.metrics.document import as_document
from quasar_core.bench.results import Achieved, Row, read_results
from quasar_core.bench.run import run_bench
from quasar_core.records import FidelityReport, MarginTable, Step

DATASET = Dataset("d", (Question(1, "c", ("w3 w4", "w5")),))
SURE = FidelityReport("t", 999, 1.0, 1.0, 1.0, 0.0, 0.0, 2.0, 2.0, MarginTable([], [9999], [9999]))


def answer(arm: str, token_ids: list[int], turn: int = 0) -> Row:
    text = " ".join(f"w{token}" for token in token_ids)
    stats = make_stats(len(token_ids), 1.0, [Step(0, 0)] * (len(token_ids) - 1))
    return make_row(arm, 1, token_ids, stats, turn=turn, text=text)


@pytest.mark.parametrize("piece", [2, 32])
def test_tokens_count_that_are_the_targets_best_behind_that_text(monkeypatch: pytest.MonkeyPatch, piece: int) -> None:
    """The target counts upwards: of 5, 6, 9, 3, 4 the 9 alone is not its own. The first came with the prompt."""
    monkeypatch.setattr(gated, "PIECE", piece)
    rows = [answer("gated", [5, 6, 9, 3, 4]), answer("gated", [7, 8], 1), answer("exact", [5, 7])]
    found = measure_achieved(make_pair(), [DATASET], rows, 0.9)
    assert found == [Achieved("d", "gated", 5, 4, 0.9)]
    assert found[0].share == 0.8


def test_a_conversation_that_failed_is_left_out() -> None:
    failed = make_row("gated", 1, [], None, error="lost")
    assert measure_achieved(make_pair(), [DATASET], [answer("gated", [5, 6]), failed], 0.9) == []


def test_a_run_says_what_it_achieved(tmp_path: Path) -> None:
    """A verifier that is wrong after a 6, and that its table calls always right."""
    pair = replace(make_pair(verifier=CountingModel(wrong_after=6)), fidelity=SURE)
    config = BenchConfig(("vanilla", "gated"), max_new_tokens=15, fidelity=0.99)
    results = run_bench(pair, [DATASET], config, tmp_path / "r.json")
    (achieved,) = results.achieved
    assert achieved.tokens == sum(len(row.token_ids) - 1 for row in results.rows if row.arm == "gated")
    assert 0.5 < achieved.share <= 1
    assert results.divergences == []  # it promises none
    assert read_results(tmp_path / "r.json") == results
    assert as_document(results)["achieved"][0]["share"] == achieved.share
    assert "full-precision model's own choice behind the same text (asked for: 0.99)." in describe_achieved(results)
