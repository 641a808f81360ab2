"""Drafters replayed over recorded texts: tokens, steps and costs by hand."""

import json
import random
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from helpers.tiny_models import TableModel, make_pair

from quasar_core.bench.datasets import Question
from quasar_core.config import GenerationConfig
from quasar_core.decode.costs.pass_costs import PassCost
from quasar_core.decode.policy.lengths import FixedLength
from quasar_core.draft.ngram import NgramDrafter
from quasar_core.draft.successors import KnownSuccessors, key_of
from tools.study.draft_texts import Recording, read_recordings, record
from tools.study.replay_drafts import Tally, parse_costs, replay, replay_all

COST = PassCost((1, 4), (1.0, 4.0))


def recording(answer: list[int], kind: str = "qa") -> Recording:
    return Recording(kind, 1, 0, [9, 8], answer, [[token, 0] for token in answer])


def test_a_text_that_repeats_itself_takes_fewer_steps() -> None:
    tally = Tally()
    replay(recording([1, 2, 3, 1, 2, 3, 1, 2]), NgramDrafter(), FixedLength(3), COST, tally)
    # 1 comes out of the prompt's pass; 2, 3 and 1 have no draft; then 2 3 1 and the bonus 2
    assert (tally.tokens, tally.steps) == (7, 4)
    assert tally.seconds == 3 * 1.0 + 4.0
    assert tally.acceptance_length == 7 / 4
    assert tally.speedup(1.0) == 1.0


def test_every_kind_is_tallied_and_all_of_them() -> None:
    texts = [recording([1, 2, 1, 2, 1], "a"), recording([3, 4, 5], "b")]
    tallies = replay_all(texts, "none", COST, GenerationConfig())
    assert [(kind, tally.steps) for kind, tally in tallies.items()] == [("a", 4), ("b", 2), ("all", 6)]
    for name in ("ngram", "suffix", "auto"):
        assert replay_all(texts, name, COST, GenerationConfig(), fixed=2)["all"].steps < 6


def test_branches_are_followed_where_rows_cost_nothing() -> None:
    """After each token two may follow in turn: a chain is wrong half of the time, and a tree of any depth never."""
    contexts = np.array([key_of([token]) for token in range(1, 4)], np.int64)
    tokens = np.full((3, 8), -1, np.int32)
    tokens[:, :2] = [[2, 3], [3, 1], [1, 2]]
    known = KnownSuccessors(contexts, tokens, np.full((3, 8), 120, np.uint8))
    answer, dice = [1], random.Random(0)
    for _ in range(300):
        answer.append(int(tokens[answer[-1] - 1, dice.randrange(2)]))
    flat = PassCost((1, 64), (1.0, 1.0))
    with_trees, without = (
        replay_all([recording(answer)], "auto", flat, GenerationConfig(trees=trees), known=known)["all"]
        for trees in (True, False)
    )
    assert with_trees.acceptance_length > 1.3 * without.acceptance_length
    assert with_trees.passed > with_trees.steps + with_trees.tokens / 2


def test_costs_are_read() -> None:
    assert parse_costs("1:10,4:20") == PassCost((1, 4), (0.01, 0.02))


def test_a_recording_holds_the_answer_and_what_was_likely(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tools.study.draft_texts.BEST", 3)
    pair = make_pair(TableModel(8, 0))
    (one,) = record(pair, Question(1, "writing", ("w1",)), 6)
    assert one.kind == "mt_bench"
    assert [row[0] for row in one.best] == one.answer
    assert all(len(row) == 3 for row in one.best)
    path = tmp_path / "texts.jsonl"
    path.write_text(json.dumps(asdict(one)) + "\n")
    assert read_recordings([path]) == [one]
