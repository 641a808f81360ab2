"""Which words of an expected text are others, and that every arm writes what plain decoding writes."""

import pytest
from helpers.tiny_models import make_pair, quantized_copy, random_model, words

from tools.measure_prediction import EVERY, MODES, changed, measure, print_table


@pytest.mark.parametrize(
    ("every", "expected"), [(0, "ab  cd\nef gh"), (1, "ba  dc\nfe hg"), (2, "ab  dc\nef hg"), (5, "ab  cd\nef gh")]
)
def test_one_word_of_so_many_is_turned_round(every: int, expected: str) -> None:
    assert changed("ab  cd\nef gh", every) == expected


def test_all_arms_answer_and_the_table_counts_equal_ones(capsys: pytest.CaptureFixture[str]) -> None:
    pair = make_pair(random_model("llama"), quantized_copy("llama"), tokenizer=words())
    print_table(measure(pair, ["w1 w2 w3"], 12))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 + len(MODES) * len(EVERY)
    assert all(line.endswith("| 1 of 1 |") for line in lines[2:])
    assert "| exact | all but one word of 5 |" in lines[4]
