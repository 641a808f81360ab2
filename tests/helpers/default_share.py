"""Cases of which the default run takes some, and `make test-slow` the others."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def some(cases: Iterable[Any], default: Collection[Any]) -> list[Any]:
    """All cases for `parametrize`, those that are not in the default run marked slow. ValueError where one is none."""
    cases = list(cases)
    if unknown := [case for case in default if case not in cases]:
        raise ValueError(f"{unknown[0]} is no case")
    return [case if case in default else pytest.param(case, marks=pytest.mark.slow) for case in cases]
