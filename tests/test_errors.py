"""Errors of other libraries become one sentence; interrupts and our own pass."""

import pytest

from quasar_core.errors import QuasarError, foreign_errors


class PanicException(BaseException):
    """As PyO3 names a panic of Rust."""


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(13, "Permission denied"), "Permission denied"),
        (KeyError("model"), "'model' is missing"),
        (RecursionError("maximum recursion"), "it is nested too deeply"),
        (ValueError(""), "ValueError"),
        (ValueError("first:\n  second\nthird"), "first: second"),
        (ValueError("first.\nsecond"), "first"),
        (ValueError("x" * 1000), "x" * 300 + "..."),
        (PanicException("index out of bounds"), "index out of bounds"),
    ],
)
def test_an_error_of_another_library_is_one_sentence(error: BaseException, reason: str) -> None:
    with pytest.raises(QuasarError) as caught, foreign_errors("It failed"):
        raise error
    assert str(caught.value) == f"It failed: {reason}."
    assert caught.value.__cause__ is error


@pytest.mark.parametrize("error", [KeyboardInterrupt(), QuasarError("Ours."), MemoryError(), SystemExit(3)])
def test_interrupts_and_our_own_errors_pass(error: BaseException) -> None:
    with pytest.raises(type(error)) as caught, foreign_errors("It failed"):
        raise error
    assert caught.value is error
