"""Refining codes and scales: against least squares, against all codes tried, and never for the worse."""

import itertools

import pytest
import torch
from test_gptq import make_hessian, make_layer

from quasar_core.checkpoint.packing import trivial_groups
from quasar_core.quantize.gptq import round_to_nearest
from quasar_core.quantize.grid import Grid, fit_grid
from quasar_core.quantize.refine import descend, fit_scales, losses, refine


def rounded(bits: int, group_size: int, sym: bool = True) -> tuple[torch.Tensor, torch.Tensor, Grid, torch.Tensor]:
    """A layer of 6 outputs and 64 inputs: weight, Hessian, grid, codes by rounding."""
    weight, inputs = make_layer(6, 64)
    grid = fit_grid(weight, bits, group_size, sym)
    return weight, make_hessian(inputs), grid, round_to_nearest(weight, grid, trivial_groups(64, group_size).long())


@pytest.mark.parametrize("sym", [True, False])
def test_scales_are_the_least_squares_solution(sym: bool) -> None:
    """Row by row: with L Lᵀ = H, minimise ‖(w − Σ s_g b_g) L‖ over the four scales."""
    weight, hessian, grid, codes = rounded(3, 16, sym)
    groups = trivial_groups(64, 16).long()
    fitted = fit_scales(weight, codes, grid, groups, hessian)
    lower = torch.linalg.cholesky(hessian.double() + 1e-9 * torch.eye(64, dtype=torch.double))
    for row in range(6):
        steps = (codes[row] - grid.zeros[row, groups]).double()
        design = torch.stack([(steps * (groups == g)) @ lower for g in range(4)], dim=1)
        best = torch.linalg.lstsq(design, (weight[row].double() @ lower)[:, None]).solution[:, 0]
        torch.testing.assert_close(fitted.scales[row].double(), best, rtol=2e-3, atol=1e-5)


def test_a_group_whose_codes_are_all_zero_keeps_its_scale() -> None:
    weight, hessian, grid, codes = rounded(4, 32)
    codes[:, :32] = 8
    fitted = fit_scales(weight, codes, grid, trivial_groups(64, 32).long(), hessian)
    torch.testing.assert_close(fitted.scales[:, 0], grid.scales[:, 0], rtol=1e-3, atol=0)


def test_descent_ends_where_no_single_code_can_be_better() -> None:
    weight, hessian, grid, codes = rounded(2, -1)
    groups = torch.zeros(64, dtype=torch.long)
    for _ in range(20):
        codes = descend(weight, codes, grid, groups, hessian)
    least = losses(weight, codes, grid, groups, hessian)
    for column, code in itertools.product(range(64), range(4)):
        other = codes.clone()
        other[:, column] = code
        assert (losses(weight, other, grid, groups, hessian) >= least * (1 - 1e-5)).all()


def test_blocks_of_columns_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, hessian, grid, codes = rounded(3, 32)
    groups = trivial_groups(64, 32).long()
    whole = descend(weight, codes, grid, groups, hessian)
    monkeypatch.setattr("quasar_core.quantize.refine.BLOCK_COLUMNS", 7)
    assert torch.equal(descend(weight, codes, grid, groups, hessian), whole)
    assert not torch.equal(whole, codes)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_every_row_is_better_or_as_it_was(bits: int) -> None:
    weight, hessian, grid, codes = rounded(bits, 32)
    groups = trivial_groups(64, 32).long()
    before = losses(weight, codes, grid, groups, hessian)
    refined, fitted = refine(weight, codes, grid, groups, hessian, sweeps=2)
    after = losses(weight, refined, fitted, groups, hessian)
    assert (after <= before).all()
    assert after.sum() < 0.9 * before.sum()
    assert refined.min() >= 0
    assert refined.max() < 2**bits
    same, untouched = refine(weight, codes, grid, groups, hessian, sweeps=0)
    assert torch.equal(same, codes)
    assert torch.equal(untouched.scales, grid.scales)


def test_an_input_that_is_always_zero_keeps_its_code() -> None:
    weight, hessian, grid, codes = rounded(4, -1)
    hessian[5] = hessian[:, 5] = 0
    moved = descend(weight, codes, grid, torch.zeros(64, dtype=torch.long), hessian)
    assert torch.equal(moved[:, 5], codes[:, 5])
