"""Agreement with the target's own text, and scores."""

import fcntl
import sys
import time
from pathlib import Path

import pytest

from quasar_core.bench.datasets import Question
from quasar_core.bench.metrics.quality import Agreement, agreement, final_number, is_right_number
from quasar_core.bench.run import is_correct
from quasar_core.bench.run_code import passes, program, runs


def test_agreement_by_hand() -> None:
    pairs = [([1, 2, 3], [1, 2, 3]), ([1, 9, 3, 4], [1, 2, 3]), ([5], [5, 6])]
    # 3 of 3, 2 of 4, 1 of 2 places; the texts that differ do so at 1 and at 1.
    assert agreement(pairs) == Agreement(6, 9, 1)
    assert agreement(pairs).value == pytest.approx(6 / 9)
    assert agreement([([1], [1])]).first is None
    assert agreement([]).value is None


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so 3 + 4 = 7. The answer is 7.", "7"),
        ("It costs $1,250.50 in all.", "1250.5"),
        ("#### 18\nLet me check: 5", "18"),
        ("minus -3", "-3"),
        ("2.00", "2"),
        ("100", "100"),
        ("none", None),
    ],
)
def test_the_number_that_an_answer_ends_in(text: str, number: str | None) -> None:
    assert final_number(text) == number


def test_exact_match() -> None:
    assert is_right_number("That makes 1,000 dollars", "400+600=1000\n#### 1000")
    assert not is_right_number("That makes 1001", "#### 1000")
    assert not is_right_number("nothing", "no number")


PROMPT = 'import math\n\ndef double(x):\n    """Twice x."""\n'
TEST = "def check(candidate):\n    assert candidate(4) == 8\n"


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("    return 2 * x\n", True),
        ("    return x\n", False),
        ("Here:\n```python\ndef double(x):\n    return int(math.fsum([x, x]))\n```\nDone.", True),
        ("def double(x):\n    return x + x", True),
        ("    return 2 * x\0", False),
    ],
)
def test_a_program_is_run_against_its_test(text: str, right: bool) -> None:
    assert passes(PROMPT, text, TEST, "double") == right


def test_a_block_that_defines_something_else_is_not_the_program() -> None:
    assert program(PROMPT, "```\nx = 1\n```", "double").startswith(PROMPT)


@pytest.mark.skipif(sys.platform != "linux", reason="limits of memory are Linux's")
@pytest.mark.parametrize(
    "source",
    ["while True: pass", "x = bytearray(1 << 32)", "open('f', 'wb').write(b'0' * (1 << 22))", "raise SystemExit(1)"],
)
def test_a_program_has_limits(source: str) -> None:
    assert not runs(source, seconds=1)


@pytest.mark.skipif(sys.platform != "linux", reason="file locks and groups of processes as Linux has them")
@pytest.mark.parametrize("rest", ["", "while True: pass"], ids=["it ends", "its time ends"])
def test_what_a_program_has_begun_ends_with_it(tmp_path: Path, rest: str) -> None:
    """A child that would sleep on holds a lock, which goes with its process."""
    path = str(tmp_path / "lock")
    source = f"""
import fcntl, os, time
lock = open({path!r}, "w")
fcntl.flock(lock, fcntl.LOCK_EX)
if os.fork() == 0:
    time.sleep(600)
{rest}"""
    assert runs(source, seconds=2 if rest else 60) == (rest == "")
    with open(path) as lock:
        end = time.monotonic() + 60
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                assert time.monotonic() < end, "the child lives on"
                time.sleep(0.02)


def test_a_program_inherits_no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "x")
    assert runs("import os; assert 'SECRET' not in os.environ")


def test_code_is_run_only_where_that_is_asked_for() -> None:
    question = Question("h", "coding", ("Write double.",), (), TEST, "double", PROMPT)
    assert is_correct(question, 0, "    return 2 * x\n", run_code=False) is None
    assert is_correct(question, 0, "    return 2 * x\n", run_code=True) is True
    maths = Question(1, "math", ("2 + 2?", "And now?"), ("#### 4",))
    assert is_correct(maths, 0, "4", run_code=False) is True
    assert is_correct(maths, 1, "4", run_code=False) is None
