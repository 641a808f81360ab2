"""Bars of other libraries are not seen while our own may be, and are seen again afterwards."""

import io

import pytest
from tqdm import std
from tqdm.auto import tqdm
from transformers.utils import logging

from quasar_core.foreign_bars import hidden_bars


def drawn(bar: type[std.tqdm]) -> str:
    """What a bar draws that is asked to show itself."""
    seen = io.StringIO()
    assert list(bar(range(3), disable=False, file=seen)) == [0, 1, 2]
    return seen.getvalue()


@pytest.mark.parametrize("bar", [std.tqdm, tqdm, logging.tqdm])
def test_bars_are_hidden_within_and_seen_afterwards(bar: type[std.tqdm]) -> None:
    for failure in (None, ValueError):
        try:
            with hidden_bars():
                assert drawn(bar) == ""
                if failure:
                    raise failure
        except ValueError:
            pass
        assert "3/3" in drawn(bar)
