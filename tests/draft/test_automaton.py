"""The suffix automaton against a search of every run of tokens."""

from collections.abc import Sequence

import pytest
from helpers.token_runs import places, usual
from hypothesis import given, settings
from hypothesis import strategies as st

from quasar_core.draft import automaton as automaton_module
from quasar_core.draft.automaton import ROOT, SuffixAutomaton

TEXTS = st.lists(st.integers(0, 3), max_size=30)
EDITS = st.lists(st.tuples(TEXTS, st.integers(0, 12)), max_size=5)


def automaton_over(text: Sequence[int]) -> SuffixAutomaton:
    automaton = SuffixAutomaton()
    automaton.extend(text)
    return automaton


def find(automaton: SuffixAutomaton, run: Sequence[int]) -> int | None:
    state = ROOT
    for token in run:
        if token not in automaton.next[state]:
            return None
        state = automaton.next[state][token]
    return state


def check(automaton: SuffixAutomaton, text: Sequence[int]) -> None:
    """Every run that the text holds, and some that it does not."""
    runs = {tuple(text[begin:end]) for begin in range(len(text)) for end in range(begin + 1, len(text) + 1)}
    for run in runs:
        state = find(automaton, run)
        assert state is not None
        ends = places(text, run)
        assert automaton.count[state] == len(ends)
        assert automaton.favourite[state] == usual(text, run)
        longest = max((r for r in runs if r[-len(run) :] == run and places(text, r) == ends), key=len)
        assert automaton.length[state] == len(longest)
        shorter = [run[i:] for i in range(len(run)) if places(text, run[i:]) != ends]
        assert automaton.length[automaton.link[state]] == max(map(len, shorter), default=0)
    strangers = {(*run, token) for run in runs for token in range(5)} - runs
    assert all(find(automaton, run) is None for run in strangers)


def contents(automaton: SuffixAutomaton) -> dict:
    return {name: value for name, value in vars(automaton).items() if name != "_changes"}


@given(TEXTS)
@settings(deadline=None, derandomize=True, max_examples=60)
def test_it_knows_every_run_of_the_text(text: list[int]) -> None:
    check(automaton_over(text), text)


@pytest.mark.parametrize("undoable", [1024, 3])
@given(text=TEXTS, edits=EDITS)
@settings(deadline=None, derandomize=True, max_examples=100)
def test_what_is_forgotten_leaves_no_trace(undoable: int, text: list[int], edits: list[tuple[list[int], int]]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(automaton_module, "UNDOABLE", undoable)
        automaton, kept = automaton_over(text), list(text)
        for added, count in edits:
            automaton.extend(added)
            kept += added
            count = min(count, len(kept))
            automaton.forget(count)
            kept = kept[: len(kept) - count]
            assert contents(automaton) == contents(automaton_over(kept))
