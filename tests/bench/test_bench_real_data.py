"""The public benchmarks as they are, where the folder that QUASAR_DATA names holds them."""

import os
from pathlib import Path

import pytest

from quasar_core.bench.datasets import load_datasets

FOLDER = os.environ.get("QUASAR_DATA", "")
pytestmark = pytest.mark.skipif(
    not (Path(FOLDER) / "spec_bench" / "question.jsonl").is_file(),
    reason="QUASAR_DATA names no folder with spec_bench/question.jsonl",
)


@pytest.mark.parametrize(
    ("name", "questions", "turns"),
    [("mt-bench", 80, 2), ("gsm8k", 80, 1), ("cnn-dm", 80, 1), ("spec-bench", 480, None)],
)
def test_their_questions_are_read(name: str, questions: int, turns: int | None) -> None:
    (dataset,) = load_datasets(name)
    assert len(dataset.questions) == questions
    assert all(turn.strip() for question in dataset.questions for turn in question.turns)
    if turns is not None:
        assert {len(question.turns) for question in dataset.questions} == {turns}


def test_spec_bench_holds_mt_bench() -> None:
    (mt_bench,) = load_datasets("mt-bench")
    assert {question.question_id for question in mt_bench.questions} == set(range(81, 161))
