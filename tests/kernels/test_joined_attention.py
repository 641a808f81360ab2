"""Attention that rotates, writes and merges by itself leaves the bits that launches of their own leave."""

from unittest.mock import patch

import pytest
import torch
from helpers import interpreted  # noqa: F401  # first: it decides how kernels are compiled
from hypothesis import given, settings
from hypothesis import strategies as st

from quasar_core.kernels.triton import attention
from quasar_core.kernels.triton.language import scratch
from tools.gpu_bench.attention_checks import Shape, run

CPU = torch.device("cpu")


@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    """Passes at the ends of shares and far from them, of all that a block may do to its heads."""
    kv_heads, group = draw(st.sampled_from([(1, 1), (1, 3), (2, 2)]))
    is_tree = draw(st.booleans())
    return Shape(
        4 if is_tree else draw(st.integers(1, 16)),
        kv_heads * group,
        kv_heads,
        draw(st.sampled_from([16, 24])),
        draw(st.one_of(st.integers(0, 200), st.integers(1020, 1030))),
        draw(st.sampled_from([None, 1, 50])),
        draw(st.sampled_from(["none", "first", "last"])),
        draw(st.booleans()),
        draw(st.booleans()),
        is_tree,
        draw(st.booleans()),
    )


def assert_same_bits(shape: Shape, multiprocessors: int) -> None:
    with patch.object(attention, "multiprocessors", lambda device: multiprocessors):
        joined, apart = (run(shape, joins, CPU, torch.float16) for joins in (True, False))
    for own, other in zip(joined, apart, strict=True):
        assert own.isfinite().all(), shape
        assert torch.equal(own, other), shape
    assert not scratch(CPU).counters.any()


@settings(max_examples=4, deadline=None)
@given(shapes(), st.sampled_from([1, 3, 40]))
def test_bits_are_those_of_three_launches(shape: Shape, multiprocessors: int) -> None:
    assert_same_bits(shape, multiprocessors)


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(shapes(), st.sampled_from([1, 3, 40]))
def test_bits_are_those_of_three_launches_in_many_shapes(shape: Shape, multiprocessors: int) -> None:
    assert_same_bits(shape, multiprocessors)
