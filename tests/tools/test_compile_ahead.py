"""Checks are walked in threads first, and launch nothing then."""

import threading
from typing import Any

import pytest
import torch
from helpers import interpreted  # noqa: F401  # first: it decides how kernels are compiled
from triton.runtime.jit import JITFunction

from tools.gpu_bench.cases import Case
from tools.gpu_bench.compile_ahead import compile_ahead, compiling_only

CPU = torch.device("cpu")


def test_launches_compile_and_do_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Triton's own `warmup` does: it asks for the same with the same words."""
    asked: list[Any] = []
    monkeypatch.setattr(JITFunction, "run", lambda self, *given, **named: asked.append((given, named)))
    kernel = JITFunction(test_launches_compile_and_do_not_run)
    with compiling_only():
        kernel[(3,)](7, SIZE=16)
    kernel[(3,)](7, SIZE=16)
    ways = [named.pop("warmup") for _, named in asked]
    assert ways == [True, False]
    assert asked[0] == asked[1] == ((7,), {"grid": (3,), "SIZE": 16})


def test_every_case_is_walked_and_failures_are_counted() -> None:
    walked, names = set[str](), threading.Lock()

    def case(name: str) -> Case:
        def measure() -> tuple[float, float]:
            with names:
                walked.add(name)
            if name == "b":
                raise RuntimeError("PassManager::run failed")
            return 0.0, 0.0

        return name, measure

    assert compile_ahead([case(name) for name in "abc"], CPU, 60.0) == (3, 1)
    assert walked == set("abc")
    assert compile_ahead([case("d")], CPU, 0.0) == (0, 0)
    assert "d" not in walked
