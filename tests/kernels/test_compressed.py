"""Weights of bfloat16 in 12 bits: what is restored is what was there, whatever its bits."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from quasar_core.kernels.cpu.compressed import CompressedWeight, row_bytes

pytestmark = [pytest.mark.usefixtures("cpp_pass")]


def as_bits(weight: torch.Tensor) -> list[list[int]]:
    """The bits of bfloat16 numbers, in which NaN equals itself and −0 is not 0."""
    return weight.view(torch.int16).tolist()


def normal(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)).bfloat16()


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize(("rows", "columns"), [(1, 16), (16, 32), (37, 48), (20, 144), (33, 576)])
def test_a_weight_is_restored_to_the_bit(rows: int, columns: int) -> None:
    weight = normal(rows, columns)
    weight[0, :6] = torch.tensor([0.0, -0.0, 1e30, float("inf"), float("nan"), 1e-39])
    assert as_bits(CompressedWeight.of(weight).restore()) == as_bits(weight)


@settings(max_examples=40, deadline=None)
@given(arrays.arrays(np.int16, st.tuples(st.integers(1, 20), st.sampled_from([16, 48, 160]))))
def test_any_bits_are_restored(bits: "np.ndarray[tuple[int, int], np.dtype[np.int16]]") -> None:
    weight = torch.from_numpy(bits).view(torch.bfloat16)
    assert as_bits(CompressedWeight.of(weight).restore()) == bits.tolist()


def test_normal_weights_take_three_quarters_of_their_bytes() -> None:
    weight = normal(64, 1024)
    compressed = CompressedWeight.of(weight)
    assert compressed.strips.nbytes == 64 * row_bytes(1024) == weight.nbytes * 3 // 4
    assert compressed.nbytes < 0.78 * weight.nbytes
    assert len(compressed.outliers) < weight.numel() / 500


def test_one_weight_far_from_the_others_is_an_outlier() -> None:
    weight = normal(16, 64).abs() + 1
    weight[3, 5] = 1e30
    compressed = CompressedWeight.of(weight)
    assert len(compressed.outliers) == 1
    column, row = (
        compressed.outliers[0, :4].view(torch.int32).item(),
        compressed.outliers[0, 4:6].view(torch.int16).item(),
    )
    assert (row, column) == (3, 5)
