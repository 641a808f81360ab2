"""Values of their declared types from parsed JSON: what is given back is what was written, and all else is named."""

import json
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal, get_origin

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quasar_core.records import Confirm, Piece, Stats, Step, stored_stats
from quasar_core.typed import build, known_part


@dataclass(frozen=True)
class Part:
    """A part of a whole."""

    name: str
    size: float = 1.0


@dataclass(frozen=True)
class Whole:
    """All kinds of fields."""

    parts: list[Part]
    named: dict[str, Part]
    pair: tuple[int, ...]
    kind: Literal["a", "b"] | None
    either: int | str
    flag: bool = False
    free: Any = None
    more: list[Any] = field(default_factory=list)


SOUND: dict[str, Any] = {
    "parts": [{"name": "x", "size": 2}],
    "named": {"y": {"name": "y"}},
    "pair": [1, 2],
    "kind": "a",
    "either": "z",
}


def test_a_dataclass_within_others() -> None:
    whole = build(Whole, SOUND)
    assert whole == Whole([Part("x", 2)], {"y": Part("y")}, (1, 2), "a", "z")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"parts": {}}, "parts must be a list, not an object"),
        ({"parts": [{"name": 3}]}, "parts[0].name must be a text, not a whole number"),
        ({"parts": [{"size": 3}]}, "parts[0].name is missing"),
        ({"parts": [{"name": "x", "weight": 3}]}, "parts[0].weight is not known"),
        ({"parts": [None]}, "parts[0] must be an object, not null"),
        ({"named": {"y": []}}, "named.y must be an object, not a list"),
        ({"pair": [1, 2.0]}, "pair[1] must be a whole number, not a number"),
        ({"pair": [True]}, "pair[0] must be a whole number, not true or false"),
        ({"pair": [2**64]}, "pair[0] is a number of more than 64 bits"),
        ({"kind": "c"}, "kind must be "),
        ({"either": 2.5}, "either must be a whole number or a text, not a number"),
        ({"either": 2**70}, "either is a number of more than 64 bits"),
        ({"flag": 1}, "flag must be true or false, not a whole number"),
        ({"other": 1}, "other is not known"),
    ],
)
def test_what_does_not_fit_is_named(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the sentence is compared below
        build(Whole, {**SOUND, **changes})
    assert str(caught.value).startswith(sentence)


def test_a_known_part() -> None:
    assert known_part(Part, {"name": "x", "other": 1}) == {"name": "x"}
    assert known_part(Part, [1]) == [1]


COUNT, SECONDS = st.integers(0, 10**6), st.floats(0, 1e6)
PIECES = st.lists(st.builds(Piece, st.text(max_size=3), COUNT, COUNT), max_size=2)
MARGINS = st.lists(SECONDS, max_size=3)
STEPS = st.lists(st.builds(Step, COUNT, COUNT, PIECES, st.booleans(), MARGINS), max_size=3)
CONFIRMS = st.lists(st.builds(Confirm, COUNT, COUNT, margins=MARGINS, refused=st.none() | COUNT), max_size=3)


@given(st.builds(Stats, new_tokens=COUNT, step_log=STEPS, confirm_log=CONFIRMS, prefill_s=SECONDS, decode_s=SECONDS))
def test_statistics_come_back(stats: Stats) -> None:
    assert build(Stats, stored_stats(json.loads(json.dumps(stats.to_dict(logs=True))))) == stats


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(list(SOUND)), inner, max_size=4),
    max_leaves=8,
)


@given(VALUES)
def test_any_value_is_built_or_named(value: Any) -> None:
    for kind in (Whole, Part, list[Part], dict[str, Whole]):
        with suppress(ValueError):  # anything else is a defect
            assert isinstance(build(kind, value), get_origin(kind) or kind)
