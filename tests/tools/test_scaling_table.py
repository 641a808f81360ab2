"""The calculation of what speculation gains by the number of texts: by hand, and what must hold of every machine."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quasar_core.decode.costs.pass_costs import PassCost
from tools.scaling_table import Gains, Machine, Roofline, calculate, draft_rate, parse, pays_to, table


def test_a_pass_reads_or_computes() -> None:
    """1 GB of 0.5 · 10⁹ weights at 1 GB/s: a second; 10⁹ operations a row at 10¹⁰ a second: from 10 rows on those."""
    cost = Roofline(Machine(1e9, 1e10), 1e9, 0.5e9, texts=1, text_bytes=0.0)
    assert [cost(rows) for rows in (1, 10, 20)] == pytest.approx([1.0, 1.0, 2.0])
    with_texts = Roofline(Machine(1e9, 1e10, 0.25), 1e9, 0.5e9, texts=4, text_bytes=0.5e9)
    assert with_texts(1) == pytest.approx(1.0 + 2.0 + 0.25)


def test_drafts_of_a_copy_by_hand() -> None:
    """Three drafted tokens at 0.5: 1 + 0.5 + 0.25 + 0.125 tokens for three passes of the copy and one of the target."""
    target, copy = PassCost((1,), (4.0,)), PassCost((1,), (1.0,))
    assert draft_rate(target, copy, 0.5, 3) == pytest.approx(1.875 / 7)
    assert draft_rate(target, copy, 0.5, 0) == pytest.approx(1 / 4)


@settings(deadline=None, max_examples=8)
@given(
    copy=st.floats(1.0, 16.0),
    agreement=st.floats(0.3, 0.99),
    bandwidth=st.floats(100, 8000),
    tflops=st.floats(10, 2000),
    gpus=st.integers(1, 8),
)
def test_nothing_is_slower_than_plain_decoding(
    copy: float, agreement: float, bandwidth: float, tflops: float, gpus: int
) -> None:
    """A way of drafting that does not pay drafts nothing; more texts are never fewer tokens."""
    words = {"copy-gb": copy, "agreement": agreement, "bandwidth-gbs": bandwidth, "tflops": tflops, "gpus": gpus}
    rows = calculate(parse([word for name, value in words.items() for word in (f"--{name}", str(value))]))
    for row in rows:
        assert min(row.ngram, row.draft_model, row.quasar) >= 1.0 - 1e-9
        assert row.quasar >= row.ngram
    assert all(few.plain <= many.plain * 1.001 for few, many in pairwise(rows))


def test_a_copy_gains_less_with_more_texts() -> None:
    rows = calculate(parse([]))
    assert [row.draft_model for row in rows] == sorted((row.draft_model for row in rows), reverse=True)
    assert rows[0].quasar > rows[0].draft_model > rows[0].ngram


def test_texts_that_do_not_fit_are_left_out() -> None:
    assert [row.texts for row in calculate(parse(["--memory-gb", "23.4", "--context", "2000"]))] == [1, 2]


def test_the_table_and_where_it_stops_paying() -> None:
    rows = [Gains(1, 100.0, 1.5, 2.0, 4, 2.5), Gains(64, 4000.0, 1.2, 1.01, 1, 1.2)]
    assert pays_to(rows, "draft_model") == 1
    assert pays_to(rows, "ngram") == 64
    assert pays_to([Gains(1, 1.0, 1.0, 1.0, 0, 1.0)], "quasar") is None
    assert table(rows).splitlines()[2] == "| 1 | 100 | 1.50 | 2.00 (4) | 2.50 |"
