"""What the demo model reads: sources, cuts, chats, and the n-gram yardstick."""

import math
import random
import re

import numpy as np
import pytest

from tools.demo.corpus import Function, find_functions, make_chats
from tools.demo.ngram_lm import NgramModel
from tools.demo.train import TrainConfig, cut_after_spaces, describe_stages, find_openings, learning_rate_scale

SOURCE = '''class A:
    def area(self, width, height):
        """Width times height."""
        size = width * height
        return size

    def tiny(self): pass
'''


def test_functions_are_cut_dedented_and_without_their_docstring() -> None:
    assert find_functions(SOURCE) == [
        Function(
            "area",
            "def area(self, width, height):\n    size = width * height\n    return size",
            "Width times height.",
        )
    ]


def test_a_file_that_does_not_parse_has_no_functions() -> None:
    assert find_functions("def broken(:\n    pass\n") == []


def test_chats_alternate_and_answers_hold_the_asked_code() -> None:
    functions = find_functions(SOURCE) * 40
    chats = list(make_chats(functions, seed=1))
    assert chats
    for chat in chats:
        assert [message["role"] for message in chat] == ["user", "assistant"] * (len(chat) // 2)
    copies = [chat for chat in chats if re.match("Repeat|Copy|Print", chat[0]["content"])]
    assert copies
    for chat in copies:
        assert chat[0]["content"].endswith(chat[1]["content"])


def test_a_rename_leaves_no_old_name() -> None:
    functions, renamed = find_functions(SOURCE) * 40, 0
    for chat in make_chats(functions, seed=2):
        match = re.match(r"(?:Rename|Replace|Change the name) `(\w+)` (?:to|by) `(\w+)`", chat[0]["content"])
        if match:
            old, new = match.groups()
            assert re.search(rf"\b{new}\b", chat[1]["content"])
            assert not re.search(rf"\b{old}\b", chat[1]["content"])
            renamed += 1
    assert renamed > 10


def test_chats_depend_on_the_seed_alone() -> None:
    functions = find_functions(SOURCE) * 10
    assert list(make_chats(functions, 3)) == list(make_chats(functions, 3))
    assert list(make_chats(functions, 3)) != list(make_chats(functions, 4))


def test_cuts_lose_nothing_and_stand_behind_spaces() -> None:
    pieces = cut_after_spaces(SOURCE * 30, 0.5, random.Random(0))
    assert "".join(pieces) == SOURCE * 30
    assert len(pieces) > 10
    assert all(piece.endswith(" ") for piece in pieces[:-1])
    assert cut_after_spaces(SOURCE, 0.0, random.Random(0)) == [SOURCE]


def test_the_learning_rate_warms_up_holds_and_falls_to_zero() -> None:
    config = TrainConfig(steps=100, warmup_steps=10, decay_share=0.5)
    assert learning_rate_scale(0, config) == pytest.approx(0.1)
    assert learning_rate_scale(30, config) == 1.0
    assert learning_rate_scale(75, config) == pytest.approx(0.5)
    assert learning_rate_scale(100, config) == 0.0


def test_the_ngram_model_by_hand() -> None:
    """Text 0 1 0 1 0 over 2 tokens, order 2. Unigrams: 0 three times, 1 twice, 2 types of 5 tokens.

    P1(0) = (3 + 2 · ½) / 7 = 4/7, P1(1) = 3/7. After 0 came 1 twice (1 type): P2(1 | 0) = (2 + 3/7) / 3 = 17/21.
    After 1 came 0 twice: P2(0 | 1) = (2 + 4/7) / 3 = 18/21.
    """
    model = NgramModel(np.array([0, 1, 0, 1, 0]), vocab_size=2, order=2)
    assert model.bits(np.array([0, 1])) == pytest.approx(-math.log2(17 / 21))
    assert model.bits(np.array([0, 1, 0])) == pytest.approx(-math.log2(17 / 21) - math.log2(18 / 21))


def test_ngram_probabilities_sum_to_one() -> None:
    tokens = np.random.default_rng(0).integers(0, 5, size=300)
    model = NgramModel(tokens, vocab_size=5, order=3)
    total = sum(2 ** -model.bits(np.array([1, 2, last])) for last in range(5))
    assert total == pytest.approx(1.0)


def test_an_order_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="63 bits"):
        NgramModel(np.array([0, 1]), vocab_size=50_000, order=5)


def test_openings_begin_at_the_left_edge_and_are_cut_behind_their_word() -> None:
    openings = find_openings([SOURCE, "import os\n", "x = 1\n"], random.Random(0))
    assert sorted(openings) == [["class ", SOURCE.removeprefix("class ")], ["import ", "os\n"]]


def test_stages_are_told_in_their_order() -> None:
    first = {"before": {}, "stage": "main", "config": {"steps": 1900, "seed": 0}}
    second = {"before": first, "stage": "openings", "config": {"steps": 50, "seed": 1}}
    assert describe_stages(second) == "1,900 of stage main (seed 0), 50 of stage openings (seed 1)"
