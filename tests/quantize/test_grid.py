"""The grid of a group: by hand, within the format, and never worse for searching."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quasar_core.quantize.solve.grid import SMALLEST_SCALE, Grid, fit_grid

pytestmark = pytest.mark.usefixtures("solver")


def values(grid: Grid, codes: torch.Tensor, group: int) -> torch.Tensor:
    """The weights [out, n] that codes of one group stand for."""
    return grid.scales[:, group, None] * (codes - grid.zeros[:, group, None])


def errors(weight: torch.Tensor, grid: Grid, group_size: int) -> torch.Tensor:
    """Σ |error|^2.4 of each output and group, written out."""
    size = weight.shape[1] if group_size == -1 else group_size
    sums = []
    for index, group in enumerate(weight.split(size, dim=1)):
        rounded = values(grid, grid.nearest_codes(group, index), index)
        sums.append((rounded - group).abs().pow(2.4).sum(dim=1))
    return torch.stack(sums, dim=1)


def test_symmetric_grid_by_hand() -> None:
    """absmax 3 at 2 bits: scale 2·3 ÷ 3 = 2, zero 2, so the points −4, −2, 0, 2.

    Where the weight of the largest magnitude is positive, the scale is negative: points 4, 2, 0, −2.
    """
    grid = fit_grid(torch.tensor([[-3.0, 1.0]]), bits=2, group_size=-1, sym=True, search=False)
    assert (grid.scales.item(), grid.zeros.item()) == (2, 2)
    codes = grid.nearest_codes(torch.tensor([[-3.9, 0.9, 1.1, 9.0]]), 0)
    assert codes.tolist() == [[0, 2, 3, 3]]
    assert values(grid, codes, 0).tolist() == [[-4, 0, 2, 2]]
    grid = fit_grid(torch.tensor([[3.0, -1.0]]), bits=2, group_size=-1, sym=True, search=False)
    assert (grid.scales.item(), grid.zeros.item()) == (-2, 2)
    codes = grid.nearest_codes(torch.tensor([[3.9, -0.9, -1.1, -9.0]]), 0)
    assert codes.tolist() == [[0, 2, 3, 3]]
    assert values(grid, codes, 0).tolist() == [[4, 0, -2, -2]]
    grid = fit_grid(torch.tensor([[-7.5, 7.0]]), bits=4, group_size=-1, sym=True, search=False)
    assert (grid.scales.item(), grid.zeros.item()) == (1, 8)


def test_asymmetric_grid_by_hand() -> None:
    """From −1 to 2 in three steps of 1, zero 1. Weights above 0: the range begins at 0, and the zero is 1, not 0."""
    grid = fit_grid(torch.tensor([[-1.0, 2.0], [0.5, 3.0]]), bits=2, group_size=-1, sym=False, search=False)
    assert grid.scales.flatten().tolist() == [1, 1]
    assert grid.zeros.flatten().tolist() == [1, 1]


def test_groups_are_fitted_apart_and_the_last_may_be_short() -> None:
    grid = fit_grid(torch.tensor([[1.5, 0, -3, 0, 6]]), bits=2, group_size=2, sym=True, search=False)
    assert grid.scales.tolist() == [[-1, 2, -4]]


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_group_of_zeros_stays_zero(bits: int, sym: bool) -> None:
    grid = fit_grid(torch.zeros(2, 8), bits, 4, sym)
    assert (grid.scales > 0).all()
    assert torch.isfinite(grid.scales).all()
    codes = grid.nearest_codes(torch.zeros(2, 4), 1)
    assert torch.equal(values(grid, codes, 1), torch.zeros(2, 4))
    assert torch.tensor(SMALLEST_SCALE).half() > 0


@settings(max_examples=40, deadline=None)
@given(
    bits=st.sampled_from((2, 3, 4, 8)),
    sym=st.booleans(),
    group_size=st.sampled_from((4, 7, -1)),
    seed=st.integers(0, 10_000),
)
def test_searching_is_never_worse_on_its_own_objective(bits: int, sym: bool, group_size: int, seed: int) -> None:
    weight = torch.randn(5, 21, generator=torch.Generator().manual_seed(seed))
    weight[0, 3] = 8.0  # an outlier, where shrinking pays
    searched = fit_grid(weight, bits, group_size, sym)
    plain = fit_grid(weight, bits, group_size, sym, search=False)
    assert (errors(weight, searched, group_size) <= errors(weight, plain, group_size) * (1 + 1e-5)).all()
    assert torch.equal(searched.scales, searched.scales.half().float()), "scales are what float16 stores"
    assert ((searched.zeros >= 1) & (searched.zeros <= 2**bits - 1)).all(), "version 1 stores zero − 1"
    assert torch.equal(searched.zeros, searched.zeros.round())


def test_the_sign_of_a_scale_follows_the_largest_weight() -> None:
    """So the mirrored weight has the mirrored grid, and no group is rounded worse than its mirror."""
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    grid, mirrored = (fit_grid(part, 4, 32, sym=True) for part in (weight, -weight))
    assert torch.equal(grid.scales, -mirrored.scales)
    extreme = weight.unflatten(1, (-1, 32)).gather(2, weight.unflatten(1, (-1, 32)).abs().argmax(2, keepdim=True))
    assert torch.equal(grid.scales.sign(), -extreme[..., 0].sign())


def test_searching_pays_with_an_outlier() -> None:
    """On the mean of 200 groups."""
    weight = torch.randn(200, 64, generator=torch.Generator().manual_seed(0))
    weight[:, 0] = 4.5
    before = errors(weight, fit_grid(weight, 3, -1, True, search=False), -1)
    assert errors(weight, fit_grid(weight, 3, -1, True), -1).mean() < 0.95 * before.mean()
