"""Refining codes and scales: against least squares, against all codes tried, and never for the worse."""

import itertools

import pytest
import torch
from helpers.layers import make_hessian, make_layer
from helpers.solutions import share_of_same

from quasar_core.quantize.solve.grid import Lattice, fit_grid
from quasar_core.quantize.solve.refine import Rounded, descend, fit_scales, gradient_and_loss, refine

pytestmark = pytest.mark.usefixtures("solver")


def rounded(bits: int, size: int, sym: bool = True) -> tuple[torch.Tensor, torch.Tensor, Rounded]:
    """A layer of 6 outputs and 64 inputs, columns first: weight, Hessian, and what rounding makes of it."""
    weight, inputs = make_layer(6, 64)
    lattice, hessian = Lattice.of(fit_grid(weight, bits, size, sym), size), make_hessian(inputs)
    weight = weight.t().contiguous()
    steps = lattice.nearest(weight)
    return weight, hessian, Rounded(steps, lattice, gradient_and_loss(steps, lattice, weight, hessian)[1])


def test_gradient_and_loss_by_hand() -> None:
    """Steps 1 and −1 of lengths 2 and 3 against weights 1 and −1: errors 1 and −2; H = [[2, 1], [1, 4]].

    H e = (0, −7); ½ · (0 + 14) = 7.
    """
    bounds = torch.tensor([[-2.0], [-2.0]]), torch.tensor([[1.0], [1.0]])
    lattice = Lattice(torch.tensor([[2.0], [3.0]]), *bounds, size=1)
    gradient, loss = gradient_and_loss(
        torch.tensor([[1.0], [-1.0]]), lattice, torch.tensor([[1.0], [-1.0]]), torch.tensor([[2.0, 1], [1, 4]])
    )
    assert (gradient.tolist(), loss.tolist()) == ([[0], [-7]], [7])


@pytest.mark.parametrize(("sym", "size"), [(True, 16), (False, 16), (True, 24)])
def test_scales_are_the_least_squares_solution(sym: bool, size: int) -> None:
    """Output by output: with L Lᵀ = H, minimise ‖Lᵀ (w − Σ s_g b_g)‖ over the scales; a last group may be short."""
    weight, hessian, before = rounded(3, size, sym)
    fitted = fit_scales(before, hessian, hessian @ weight)
    upper = torch.linalg.cholesky(hessian.double() + 1e-9 * torch.eye(64, dtype=torch.double)).t()
    groups = torch.arange(64) // size
    for output in range(6):
        steps = before.steps[:, output].double()
        design = torch.stack([upper @ (steps * (groups == g)) for g in range(len(fitted.scales))], dim=1)
        best = torch.linalg.lstsq(design, (upper @ weight[:, output].double())[:, None]).solution[:, 0]
        torch.testing.assert_close(fitted.scales[:, output].double(), best, rtol=2e-3, atol=1e-5)


def test_a_group_whose_codes_are_all_zero_keeps_its_scale() -> None:
    weight, hessian, before = rounded(4, 32)
    before.steps[:32] = 0
    fitted = fit_scales(before, hessian, hessian @ weight)
    torch.testing.assert_close(fitted.scales[0], before.lattice.scales[0], rtol=1e-3, atol=0)


def test_descent_ends_where_no_single_code_can_be_better() -> None:
    weight, hessian, before = rounded(2, 64)
    steps, lattice = before.steps, before.lattice
    for _ in range(20):
        steps, _ = descend(steps, gradient_and_loss(steps, lattice, weight, hessian)[0], lattice, hessian)
    least = gradient_and_loss(steps, lattice, weight, hessian)[1]
    for column, step in itertools.product(range(64), range(-2, 2)):
        other = steps.clone()
        other[column] = step
        assert (gradient_and_loss(other, lattice, weight, hessian)[1] >= least * (1 - 1e-4)).all()


def test_descent_tells_by_how_much_the_loss_has_changed() -> None:
    weight, hessian, before = rounded(3, 32)
    gradient, loss = gradient_and_loss(before.steps, before.lattice, weight, hessian)
    steps, gains = descend(before.steps, gradient, before.lattice, hessian)
    after = gradient_and_loss(steps, before.lattice, weight, hessian)[1]
    torch.testing.assert_close(loss + gains, after, rtol=1e-5, atol=0)
    assert (gains <= 1e-5 * loss).all()
    assert gains.sum() < -0.05 * loss.sum()


def test_blocks_of_columns_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, hessian, before = rounded(3, 32)
    gradient = gradient_and_loss(before.steps, before.lattice, weight, hessian)[0]
    whole, gains = descend(before.steps, gradient.clone(), before.lattice, hessian)
    monkeypatch.setattr("quasar_core.quantize.solve.refine.BLOCK", 7)
    again, others = descend(before.steps, gradient, before.lattice, hessian)
    assert share_of_same(again, whole) > 0.9  # a tie that falls otherwise moves the columns after it
    torch.testing.assert_close(gains.sum(), others.sum(), rtol=0.02, atol=0)
    assert not torch.equal(whole, before.steps)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_every_output_is_better_or_as_it_was(bits: int) -> None:
    weight, hessian, before = rounded(bits, 32)
    found = refine(before, weight, hessian, hessian @ weight, sweeps=2)
    after = gradient_and_loss(found.steps, found.lattice, weight, hessian)[1]
    torch.testing.assert_close(found.loss, after, rtol=1e-3, atol=0)
    assert (after <= before.loss * (1 + 1e-3)).all()
    assert after.sum() < 0.95 * before.loss.sum()
    codes = found.steps - found.lattice.spread(found.lattice.low, 64)
    assert codes.min() >= 0
    assert codes.max() < 2**bits
    assert refine(before, weight, hessian, hessian @ weight, sweeps=0) is before


def test_an_output_keeps_what_it_had_where_the_other_is_worse() -> None:
    _, _, before = rounded(4, 32)
    other = Rounded(before.steps + 1, before.lattice.with_scales(2 * before.lattice.scales), before.loss.clone())
    other.loss[:3] *= 0.5
    other.loss[4] *= 2  # output 3, 5: no better
    both = before.or_better(other)
    for output in range(6):
        chosen = other if output < 3 else before
        assert torch.equal(both.steps[:, output], chosen.steps[:, output])
        assert torch.equal(both.lattice.scales[:, output], chosen.lattice.scales[:, output])
        assert both.loss[output] == chosen.loss[output]


def test_an_input_that_is_always_zero_keeps_its_code() -> None:
    weight, hessian, before = rounded(4, 64)
    hessian[5] = hessian[:, 5] = 0
    gradient = gradient_and_loss(before.steps, before.lattice, weight, hessian)[0]
    moved, gains = descend(before.steps, gradient, before.lattice, hessian)
    assert torch.equal(moved[5], before.steps[5])
    assert torch.isfinite(gains).all()
