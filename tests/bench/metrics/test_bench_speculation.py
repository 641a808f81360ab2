"""How drafts and confirms went, of logs that were written by hand."""

import pytest

from quasar_core.bench.metrics.speculation import accepted_lengths, by_drafter, by_place, by_position, speculation
from quasar_core.records import Confirm, Piece, Stats, Step

STEPS = [
    Step(4, 3, [Piece("suffix", 1, 2), Piece("recycle", 1, 2)]),
    Step(2, 0, [Piece("suffix", 1, 2)]),
    Step(0, 0),
    Step(3, 3, [Piece("recycle", 1, 3)]),
]


def test_a_step_without_a_draft_is_not_in_the_histogram() -> None:
    assert accepted_lengths(STEPS) == [1, 0, 0, 2]
    assert accepted_lengths([Step(0, 0)]) == []


def test_acceptance_by_place_counts_what_lies_behind_a_refusal_as_refused() -> None:
    assert [(share.name, share.count, share.total) for share in by_place(STEPS)] == [
        ("1", 2, 3),
        ("2", 2, 3),
        ("3", 2, 2),
        ("4", 0, 1),
    ]


def test_acceptance_by_drafter() -> None:
    shares = {share.name: (share.count, share.total) for share in by_drafter(STEPS, "x")}
    assert shares == {"suffix": (2, 4), "recycle": (4, 5)}


def test_tokens_per_step_by_position() -> None:
    stats = Stats(new_tokens=1 + 4 + 27 + 2, prefill_tokens=1, step_log=[Step(4, 3), Step(40, 26), Step(1, 1)])
    # The steps begin at 1, 5 and 32; positions from 32 on are another range.
    assert [(share.name, share.count, share.total) for share in by_position([stats])] == [
        ("0–32", 31, 2),
        ("32–64", 2, 1),
    ]


def test_confirms_by_hand() -> None:
    stats = Stats(
        new_tokens=8,
        prefill_tokens=1,
        step_log=[Step(2, 2, margins=[3.0, 0.3, 5.0]), Step(0, 0, margins=[0.3]), Step(1, 1, margins=[9.0, 0.05])],
        confirm_log=[Confirm(4, 1), Confirm(2, 2)],
    )
    found = speculation([stats])
    # Of the first window 3.0 was accepted and 0.3 refused; what lies behind it was not judged.
    refused = {share.name: (share.count, share.total) for share in found.refused_by_margin}
    assert refused == {"0–0.1": (0, 1), "0.25–0.5": (1, 1), "2–4": (0, 1), "from 8": (0, 1)}
    assert found.tokens_per_confirm == pytest.approx(7 / 2)
    assert speculation([Stats(step_log=STEPS)]).tokens_per_confirm is None
