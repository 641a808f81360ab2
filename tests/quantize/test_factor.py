"""The factor of the damped Hessian's inverse: against float64's inverse, in every size of blocks, and without one."""

import pytest
import torch
from helpers.layers import make_hessian, make_layer

from quasar_core.errors import QuasarError
from quasar_core.quantize.solve import factor
from quasar_core.quantize.solve.factor import inverse_factor
from quasar_core.quantize.solve.gptq import column_order


@pytest.mark.parametrize("block", [256, 20, 7, 3])
def test_the_factor_gives_the_inverse(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(factor, "BLOCK", block)
    hessian = make_hessian(make_layer(1, 20)[1]).double()
    before, order = hessian.clone(), column_order(hessian, act_order=True)
    found = inverse_factor(hessian, order, 0.05, "the layer")
    damped = hessian + 0.05 * hessian.diagonal().mean() * torch.eye(20, dtype=torch.float64)
    inverse = torch.linalg.inv(damped[order][:, order])
    assert torch.equal(found.unit, found.unit.tril())
    assert torch.allclose(found.unit.diagonal(), torch.ones(20, dtype=torch.float64))
    assert torch.allclose(found.unit.t() @ torch.diag(found.pivots) @ found.unit, inverse, rtol=1e-8)
    columns = torch.randn(20, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(found.apply_(columns.clone()), inverse @ columns, rtol=1e-8)
    assert torch.equal(hessian, before)


def test_in_float32_it_solves_as_well_as_two_triangular_solutions() -> None:
    """Against float64's solution, where eigenvalues span 10⁶; one wrong row in a block would be off by far more."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(300, 300, dtype=torch.float64, generator=generator)).Q
    hessian = basis @ torch.diag(torch.logspace(0, -6, 300, dtype=torch.float64)) @ basis.t()
    columns, order = torch.randn(300, 8, dtype=torch.float64, generator=generator), torch.arange(300)
    exact = inverse_factor(hessian, order, 0.01, "the layer").apply_(columns.clone())
    damped = hessian.float() + 0.01 * hessian.diagonal().mean() * torch.eye(300)
    usual = torch.cholesky_solve(columns.float(), torch.linalg.cholesky(damped))
    ours = inverse_factor(hessian.float(), order, 0.01, "the layer").apply_(columns.float())
    error, theirs = ((found.double() - exact).norm() / exact.norm() for found in (ours, usual))
    assert error < max(2 * theirs, 1e-6)


def test_damping_grows_until_the_factor_exists() -> None:
    """Eigenvalues 6 and −4, mean diagonal 1: damping 0.05 and 0.5 are too little, 5 is enough."""
    hessian = torch.tensor([[1.0, 5], [5, 1]], dtype=torch.float64)
    found = inverse_factor(hessian, torch.arange(2), 0.05, "the layer")
    wanted = torch.linalg.inv(torch.tensor([[6.0, 5], [5, 6]], dtype=torch.float64))
    assert torch.allclose(found.apply_(torch.eye(2, dtype=torch.float64)), wanted)


def test_an_input_that_is_always_zero_counts_as_one_of_mean_size() -> None:
    found = inverse_factor(torch.diag(torch.tensor([4.0, 0, 2])), torch.arange(3), 0.5, "the layer")
    torch.testing.assert_close(found.apply_(torch.eye(3)), torch.diag(torch.tensor([1 / 5, 1 / 3, 1 / 3])))
    nothing = inverse_factor(torch.zeros(2, 2), torch.arange(2), 0.5, "the layer")
    torch.testing.assert_close(nothing.apply_(torch.eye(2)), torch.eye(2))


WITHOUT_A_FACTOR = {
    "eigenvalue -999999": [[1.0, 1e6], [1e6, 1.0]],
    "negative": [[-1.0, 0.0], [0.0, -1.0]],
    "denormal": [[1e-45, 0], [0, 1.0]],
    "denormal pivot": [[1.2e-38, 1.19e-38], [1.19e-38, 1.2e-38]],
}


@pytest.mark.parametrize("flushed", [False, True], ids=["denormals", "denormals flushed"])
@pytest.mark.parametrize("hessian", WITHOUT_A_FACTOR.values(), ids=WITHOUT_A_FACTOR)
def test_a_hessian_without_a_factor_fails_in_one_sentence(hessian: list[list[float]], flushed: bool) -> None:
    """Of a denormal the pivot, 1 ÷ 1e-45, is beyond float32; where denormals are flushed, it is a zero."""
    torch.set_flush_denormal(False)
    matrix = torch.tensor(hessian)
    torch.set_flush_denormal(flushed)
    with pytest.raises(QuasarError, match=r"Hessian of up_proj has no Cholesky factor even with damping 0: use more"):
        inverse_factor(matrix, torch.arange(2), 0.0, "up_proj")
