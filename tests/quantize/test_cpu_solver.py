"""The solver's loops in C++ against PyTorch's: the same grids and codes but for ties within float32's rounding."""

from collections.abc import Callable
from typing import TypeVar

import pytest
import torch
from helpers.layers import make_hessian, make_layer
from helpers.solutions import assert_same_solution, share_of_same

from quasar_core.models.decoder.rows import attend_rows
from quasar_core.quantize.fidelity import Tally
from quasar_core.quantize.logit_rows import likeliest
from quasar_core.quantize.solve import cpp
from quasar_core.quantize.solve.factor import inverse_factor
from quasar_core.quantize.solve.gptq import SolverConfig, column_order, round_columns, solve
from quasar_core.quantize.solve.grid import (
    SEARCH_EXPONENT,
    SEARCH_STEPS,
    SMALLEST_SCALE,
    Lattice,
    fit_grid,
    search_grids,
)
from quasar_core.quantize.solve.refine import descend, gradient_and_loss

pytestmark = pytest.mark.usefixtures("cpp_solver")
T = TypeVar("T")
ODD = [(1, 40, 32), (63, 130, 64), (65, 300, 128), (130, 257, -1), (16, 1, 128)]  # outputs, inputs, group size


def both(monkeypatch: pytest.MonkeyPatch, run: Callable[[], T]) -> tuple[T, T]:
    """What C++ gives, and what PyTorch gives."""
    ours = run()
    with monkeypatch.context() as patch:
        patch.setattr(cpp, "runs", lambda tensor: False)
        return ours, run()


def errors(groups: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, bits: int) -> torch.Tensor:
    """Σ |error|^2.4 in float64."""
    groups, scales, zeros = groups.double(), scales.double()[:, None], zeros.double()[:, None]
    steps = torch.round(groups / scales).clamp(-zeros, 2**bits - 1 - zeros)
    return (groups - scales * steps).abs().pow(2.4).sum(dim=1)


@pytest.mark.parametrize("size", [128, 32, 37, 1])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_search_finds_the_same_grids(bits: int, sym: bool, size: int) -> None:
    """Where the two differ, their errors do not."""
    groups = torch.randn(500, size, generator=torch.Generator().manual_seed(bits))
    groups[0], groups[1, 0], groups[2] = 0, 9.0, 1e-9
    theirs = search_grids(groups, bits, sym)
    ours = cpp.search_grids(groups, bits, sym, SEARCH_STEPS, SMALLEST_SCALE, SEARCH_EXPONENT)
    same = (ours[0] == theirs[0]) & (ours[1] == theirs[1])
    assert same.float().mean() > 0.9
    assert torch.equal(ours[0], ours[0].half().float())
    torch.testing.assert_close(errors(groups, *ours, bits), errors(groups, *theirs, bits), rtol=1e-4, atol=1e-12)


def lattice_of(weight: torch.Tensor, size: int, bits: int = 3) -> Lattice:
    """A grid of its own zeros."""
    return Lattice.of(fit_grid(weight, bits, size, sym=False), weight.shape[1] if size == -1 else size)


@pytest.mark.parametrize(("outputs", "inputs", "size"), ODD)
@pytest.mark.parametrize("act_order", [True, False])
def test_columns_are_rounded_to_the_same_steps(
    outputs: int, inputs: int, size: int, act_order: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, rows = make_layer(outputs, inputs)
    hessian, lattice = make_hessian(rows), lattice_of(weight, size)
    factor = inverse_factor(hessian, column_order(hessian, act_order), 0.05, "the layer")
    ours, theirs = both(monkeypatch, lambda: round_columns(weight.t().contiguous(), lattice, factor))
    assert share_of_same(ours, theirs) > 0.9  # a tie moves the columns after it
    torch.testing.assert_close(
        *(gradient_and_loss(s, lattice, weight.t(), hessian)[1].sum() for s in (ours, theirs)), rtol=0.02, atol=1e-6
    )


@pytest.mark.parametrize(("outputs", "inputs", "size"), ODD)
def test_descent_takes_the_same_steps(outputs: int, inputs: int, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, rows = make_layer(outputs, inputs)
    rows[:, inputs // 2] = 0  # an input that is always 0
    hessian, lattice = make_hessian(rows), lattice_of(weight, size)
    weight = weight.t().contiguous()
    start = lattice.nearest(weight)
    gradient = gradient_and_loss(start, lattice, weight, hessian)[0]
    ours, theirs = both(monkeypatch, lambda: descend(start, gradient.clone(), lattice, hessian))
    same = (ours[0] == theirs[0]).all(dim=0)
    assert same.float().mean() > 0.9
    torch.testing.assert_close(ours[1].sum(), theirs[1].sum(), rtol=0.02, atol=1e-5)
    torch.testing.assert_close(ours[1][same], theirs[1][same], rtol=1e-3, atol=1e-5)
    assert inputs == 1 or not torch.equal(ours[0], start)


def test_a_whole_layer_is_solved_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, rows = make_layer(96, 256)
    hessian = make_hessian(rows)
    ours, theirs = both(monkeypatch, lambda: solve(weight, hessian, SolverConfig()))
    assert_same_solution(ours, theirs)


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    weight, rows = make_layer(300, 160)
    hessian = make_hessian(rows)
    lattice, start = lattice_of(weight, 64), torch.zeros(160, 300)
    factor = inverse_factor(hessian, column_order(hessian, True), 0.05, "the layer")
    gradient = gradient_and_loss(start, lattice, weight.t(), hessian)[0]
    found = []
    errors, moves = torch.empty(128, 300), torch.empty(128, 300)
    block, kernel, curvature = lattice.block(range(128)), hessian[:128, :128].contiguous(), hessian.diagonal()[:128]
    for count in (1, 3):
        torch.set_num_threads(count)
        steps, gains = torch.empty(128, 300), torch.zeros(300)
        block.round(weight.t()[:128].contiguous(), factor.unit[:128, :128].contiguous(), steps, errors)
        moved = start[:128].clone()
        block.descend(gradient[:128].clone(), kernel.neg(), curvature.contiguous(), moved, moves, gains)
        found.append((lattice_of(weight, 64).scales, steps, errors.clone(), moved, moves.clone(), gains))
    assert all(torch.equal(one, three) for one, three in zip(*found, strict=True))


def test_other_tensors_are_left_to_pytorch() -> None:
    assert cpp.runs(torch.zeros(1))
    assert not cpp.runs(torch.zeros(1, dtype=torch.float64))
    assert not cpp.runs(torch.zeros(1, device="meta"))


@pytest.mark.parametrize("size", [2, 16, 17, 1000])
def test_logits_are_compared_as_pytorch_does(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The figures of a row; ties, equal rows and a token that neither can say among them."""
    torch.manual_seed(size)
    p, q = 4 * torch.randn(2, 12, size)
    q[0], q[1, :2], p[2, 1], q[3] = p[0], 9.0, -200.0, q[3].bfloat16().float()
    tokens = torch.randint(size, (12,))

    def tally() -> Tally:
        counted = Tally()
        counted.add(p, q, tokens, 1)
        return counted

    ours, theirs = both(monkeypatch, tally)
    for name in ("kl", "overlap", "margin"):
        found, expected = (torch.cat(getattr(counted, name)) for counted in (ours, theirs))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-6)
    assert torch.equal(torch.cat(ours.agreed), torch.cat(theirs.agreed))
    assert ours.kl[0][0] == 0
    assert ours.target_nll == pytest.approx(theirs.target_nll, rel=1e-5)
    assert ours.verifier_nll == pytest.approx(theirs.verifier_nll, rel=1e-5)


@pytest.mark.parametrize("size", [1, 8, 19, 1000])
def test_the_likeliest_tokens_as_pytorch_finds_them(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(size)
    logits = 4 * torch.randn(9, size)
    logits[1] = logits[1].sort().values
    (tokens, chances), theirs = both(monkeypatch, lambda: likeliest(logits, min(8, size)))
    assert torch.equal(tokens, theirs[0])
    torch.testing.assert_close(chances, theirs[1], rtol=1e-5, atol=1e-7)


def test_of_equal_logits_the_first_tokens_are_the_likeliest() -> None:
    tokens, chances = cpp.likeliest(torch.zeros(2, 40), 3)
    assert tokens.tolist() == [[0, 1, 2]] * 2
    assert chances.tolist() == [[pytest.approx(1 / 40)] * 3] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("first", "end"), [(0, 1), (0, 16), (3, 40), (17, 18)])
@pytest.mark.parametrize(("scale", "cap"), [(None, None), (0.3, 2.0)])
def test_texts_in_step_attend_as_in_pytorch(
    dtype: torch.dtype, first: int, end: int, scale: float | None, cap: float | None
) -> None:
    """Against the operations in float64; what is not seen may be anything."""
    torch.manual_seed(end)
    queries, states = torch.randn(3, 6, 32).to(dtype), torch.randn(2, 3, 2, 41, 32).to(dtype)
    states[..., end:, :] = states[..., :first, :] = 9e9
    found = cpp.attend_rows(queries, states, first, end, scale, cap)
    exact = attend_rows(queries.double(), states.double(), first, end, scale, cap)
    assert (found - exact).norm() < (1e-6 if dtype == torch.float32 else 2**-7) * exact.norm()
