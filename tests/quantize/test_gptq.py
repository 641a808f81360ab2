"""The solver against a slow one written from the paper, against hand-worked layers, and against round-to-nearest."""

import statistics

import pytest
import torch
from helpers.layers import make_hessian, make_layer
from helpers.solutions import assert_same_solution, share_of_same
from hypothesis import given, settings
from hypothesis import strategies as st

from quasar_core.checkpoint.gptq_format import trivial_groups
from quasar_core.errors import QuasarError
from quasar_core.quantize.solve import gptq
from quasar_core.quantize.solve.factor import inverse_factor
from quasar_core.quantize.solve.gptq import (
    SolverConfig,
    column_order,
    pieces,
    round_columns,
    solve,
    solve_group,
    solver_rows,
)
from quasar_core.quantize.solve.grid import Grid, Lattice, fit_grid, round_to_nearest
from quasar_core.quantize.solve.hessian import HessianAccumulator

pytestmark = pytest.mark.usefixtures("solver")
SEEDS = range(5)


def losses(
    weight: torch.Tensor, codes: torch.Tensor, grid: Grid, groups: torch.Tensor, hessian: torch.Tensor
) -> torch.Tensor:
    """½ · e H eᵀ for each row's error e [in], written out."""
    error = weight - grid.scales[:, groups] * (codes - grid.zeros[:, groups])
    return 0.5 * ((error @ hessian) * error).sum(dim=1)


def fast_codes(
    weight: torch.Tensor, hessian: torch.Tensor, grid: Grid, size: int, order: torch.Tensor, damp: float
) -> torch.Tensor:
    """Codes [out, in] as the solver rounds them, columns from the last of the order to the first."""
    factor = inverse_factor(hessian, order, damp, "the layer")
    steps = round_columns(weight.t().contiguous(), Lattice.of(grid, size), factor)
    return steps.t() + grid.zeros[:, torch.arange(weight.shape[1]) // size]


def slow_codes(
    weight: torch.Tensor, hessian: torch.Tensor, grid: Grid, size: int, order: list[int], damp: float
) -> torch.Tensor:
    """Optimal brain quantization in a given order, as the paper's section 3 has it: no factor, no blocks.

    Round weight q; spread its error by δ = −e ÷ [H⁻¹]qq · H⁻¹[:, q]; take q out of H⁻¹ by a step of Gaussian
    elimination.
    """
    weight = weight.clone()
    inverse = torch.linalg.inv(
        hessian + damp * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=hessian.dtype)
    )
    codes = torch.empty_like(weight)
    for q in order:
        scale, zero = grid.scales[:, q // size], grid.zeros[:, q // size]
        codes[:, q] = (torch.round(weight[:, q] / scale) + zero).clamp(0, 2**grid.bits - 1)
        error = weight[:, q] - scale * (codes[:, q] - zero)
        weight -= error[:, None] / inverse[q, q] * inverse[q]
        inverse = inverse - torch.outer(inverse[:, q], inverse[q]) / inverse[q, q]
    return codes


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("sym", [False, True])
@pytest.mark.parametrize(
    ("bits", "out_features", "in_features", "group_size"),
    [
        (2, 3, 40, 32),
        (3, 5, 130, 128),
        (4, 4, 300, 64),
        (4, 2, 257, -1),
        (8, 3, 129, 32),
        (4, 1, 1, 128),
        (3, 6, 128, 128),
    ],
)
def test_blocks_change_nothing(
    bits: int, out_features: int, in_features: int, group_size: int, sym: bool, act_order: bool
) -> None:
    """The same codes as the slow solver in float64, on sizes that fill neither blocks of 128 columns nor groups."""
    weight, inputs = make_layer(out_features, in_features)
    weight, hessian = weight.double(), make_hessian(inputs).double()
    grid = fit_grid(weight, bits, group_size, sym)
    order = column_order(hessian, act_order)
    size = in_features if group_size == -1 else group_size
    fast = fast_codes(weight, hessian, grid, size, order, 0.05)
    assert torch.equal(fast, slow_codes(weight, hessian, grid, size, order.flip(0).tolist(), 0.05))


@pytest.mark.parametrize("act_order", [False, True])
def test_solve_in_float32_agrees_with_the_slow_solver_in_float64(act_order: bool) -> None:
    """Apart from the rare tie, and an output for which rounding to nearest was better."""
    shares = []
    for seed in SEEDS:
        weight, inputs = make_layer(16, 160, seed)
        hessian = make_hessian(inputs)
        solution = solve(weight, hessian, SolverConfig(group_size=64, act_order=act_order, sweeps=0))
        grid = fit_grid(weight, 4, 64, True)
        diagonal = hessian.diagonal()
        order = torch.argsort(diagonal, descending=True).tolist() if act_order else list(range(160))
        double = Grid(grid.scales.double(), grid.zeros.double(), 4)
        slow = slow_codes(weight.double(), hessian.double(), double, 64, order, 0.05)
        shares.append(share_of_same(solution.weight.codes.t(), slow))
    assert statistics.mean(shares) > 0.98


def test_a_layer_of_two_outputs_worked_by_hand() -> None:
    """H = [[3, 1, 0], [1, 1, 0], [0, 0, 2]], mean diagonal 2, damping ½: H + I = [[4, 1, 0], [1, 2, 0], [0, 0, 3]].

    absmax 1.5 at 2 bits: scale 2 · 1.5 ÷ 3 = 1, zero 2, points −2, −1, 0, 1. Rounding column 0 with error e moves
    column 1 by + e · H₀₁ ÷ H₁₁ = + e ÷ 2 (what is left of a 2 × 2 inverse), and column 2 by nothing.

    Output 0, (0.4, 0.4, −1.5): 0.4 → 0, e = 0.4; 0.4 + 0.2 = 0.6 → 1; −1.5 → −2. Round-to-nearest has 0, 0, −2.
      Error (0.4, −0.6, 0.5): ½ · (3 · 0.16 − 2 · 0.24 + 0.36 + 2 · 0.25) = 0.43.
    Output 1, (−0.4, 0.1, −1.5): −0.4 → 0, e = −0.4; 0.1 − 0.2 = −0.1 → 0; −1.5 → −2.
      Error (−0.4, 0.1, 0.5): ½ · (0.48 − 0.08 + 0.01 + 0.5) = 0.455.
    Mean squared output, ½ · w H wᵀ: ½ · (0.48 + 0.32 + 0.16 + 4.5) = 2.73 and ½ · (0.48 − 0.08 + 0.01 + 4.5) = 2.455.
    """
    weight = torch.tensor([[0.4, 0.4, -1.5], [-0.4, 0.1, -1.5]])
    hessian = torch.tensor([[3.0, 1, 0], [1, 1, 0], [0, 0, 2]])
    config = SolverConfig(bits=2, group_size=-1, act_order=False, damp=0.5, scale_search=False, sweeps=0)
    solution = solve(weight, hessian, config)
    assert solution.weight.codes.t().tolist() == [[2, 3, 0], [2, 2, 0]]
    assert solution.weight.scales.tolist() == [[1, 1]]
    assert solution.weight.zeros.tolist() == [[2, 2]]
    assert solution.loss == pytest.approx(0.43 + 0.455)
    assert solution.relative_loss == pytest.approx((0.43 + 0.455) / (2.73 + 2.455))


def test_act_order_by_hand() -> None:
    """The same pair of columns the other way round: the column of the larger diagonal (3) is rounded first.

    In order: 0.4 → 0, e = 0.4, and the other, 0.39, moves by 0.4 · 1 ÷ 4 = 0.1 to 0.49, which rounds to 0: codes 2, 2.
    With act-order: the second column first, 0.39 → 0, and the first moves by 0.39 ÷ 2 to 0.595 → 1: codes 3, 2.
    """
    weight = torch.tensor([[0.4, 0.39, -1.5]], dtype=torch.float64)
    hessian = torch.tensor([[1.0, 1, 0], [1, 3, 0], [0, 0, 2]], dtype=torch.float64)
    grid = fit_grid(weight, 2, -1, sym=True, search=False)
    assert column_order(hessian, act_order=False).tolist() == [2, 1, 0]  # the last is rounded first
    assert fast_codes(weight, hessian, grid, 3, torch.tensor([2, 1, 0]), 0.5).tolist() == [[2, 2, 0]]
    assert column_order(hessian, act_order=True).tolist() == [0, 2, 1]
    assert fast_codes(weight, hessian, grid, 3, torch.tensor([0, 2, 1]), 0.5).tolist() == [[3, 2, 0]]
    solution = solve(weight, hessian, SolverConfig(bits=2, group_size=-1, damp=0.5, scale_search=False, sweeps=0))
    assert solution.weight.codes.t().tolist() == [[3, 2, 0]]


@settings(max_examples=40, deadline=None)
@given(
    bits=st.sampled_from((2, 3, 4, 8)),
    sizes=st.tuples(st.integers(1, 9), st.integers(1, 70)),
    group_size=st.sampled_from((32, 64, -1)),
    flags=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    seed=st.integers(0, 10_000),
)
def test_never_worse_than_round_to_nearest(
    bits: int, sizes: tuple[int, int], group_size: int, flags: tuple[bool, bool, bool], seed: int
) -> None:
    """For every single output, whatever the options."""
    sym, act_order, search = flags
    weight, inputs = make_layer(*sizes, seed)
    hessian = make_hessian(inputs)
    solution = solve(weight, hessian, SolverConfig(bits, group_size, sym, act_order, 0.05, search))
    grid = fit_grid(weight, bits, group_size, sym, search)
    groups = trivial_groups(sizes[1], group_size).long()
    nearest = losses(weight, round_to_nearest(weight, grid, groups), grid, groups, hessian)
    solved = Grid(solution.weight.scales.t().float(), grid.zeros, bits)
    chosen = losses(weight, solution.weight.codes.t().float(), solved, groups, hessian)
    assert (chosen <= nearest * (1 + 1e-6)).all()
    assert solution.loss == pytest.approx(chosen.sum().item(), rel=1e-4, abs=1e-12)


def test_where_rounding_to_nearest_is_better_it_is_taken() -> None:
    """Output by output: among a thousand, the loop over columns is now and then the worse of the two."""
    weight, inputs = make_layer(1000, 12)
    hessian, groups = make_hessian(inputs), torch.zeros(12, dtype=torch.long)
    grid = fit_grid(weight, 2, -1, True)
    spread = fast_codes(weight, hessian, grid, 12, column_order(hessian, True), 0.05)
    by_loop, nearest = (
        losses(weight, codes, grid, groups, hessian) for codes in (spread, round_to_nearest(weight, grid, groups))
    )
    assert 0 < (by_loop > 1.001 * nearest).sum() < 500
    solution = solve(weight, hessian, SolverConfig(2, -1, sweeps=0))
    chosen = losses(weight, solution.weight.codes.t().float(), grid, groups, hessian)
    torch.testing.assert_close(chosen.sum(), torch.minimum(by_loop, nearest).sum(), rtol=1e-3, atol=0)
    assert (chosen <= nearest * (1 + 1e-5)).all()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_loss_is_the_mean_squared_output_error(bits: int) -> None:
    weight, inputs = make_layer(12, 96)
    solution = solve(weight, make_hessian(inputs), SolverConfig(bits, 32))
    missed = inputs @ (weight - solution.weight.dequantize()).t()
    squared = missed.square().sum(dim=1).mean().item()
    assert solution.loss == pytest.approx(squared, rel=1e-3)
    assert solution.relative_loss == pytest.approx(
        squared / (inputs @ weight.t()).square().sum(dim=1).mean().item(), rel=1e-3
    )


def test_it_beats_round_to_nearest_by_far_on_correlated_inputs() -> None:
    """On the mean of five layers, of which one may be unlucky."""
    shares = []
    for seed in SEEDS:
        weight, inputs = make_layer(32, 128, seed)
        hessian, groups = make_hessian(inputs), trivial_groups(128, 128).long()
        grid = fit_grid(weight, 4, 128, True)
        nearest = losses(weight, round_to_nearest(weight, grid, groups), grid, groups, hessian).sum().item()
        shares.append(solve(weight, hessian, SolverConfig()).loss / nearest)
    assert statistics.mean(shares) < 0.6, shares


def test_an_input_that_is_always_zero_gets_the_zero_code_and_disturbs_nothing() -> None:
    weight, inputs = make_layer(4, 33)
    inputs[:, [5, 20]] = 0
    alive = [i for i in range(33) if i not in (5, 20)]
    weight[:, 5] = 100.0  # would spoil the scale
    solution = solve(weight, make_hessian(inputs), SolverConfig(group_size=-1, act_order=False))
    assert (solution.weight.codes[[5, 20]] == 8).all()
    assert (solution.weight.dequantize()[:, [5, 20]] == 0).all()
    # Damping is a share of the mean over all columns, dead ones included.
    same_damping = 0.05 * 31 / 33
    config = SolverConfig(group_size=-1, act_order=False, damp=same_damping)
    without = solve(weight[:, alive], make_hessian(inputs[:, alive]), config)
    assert share_of_same(solution.weight.codes[alive], without.weight.codes) > 0.9
    assert solution.loss == pytest.approx(without.loss, rel=1e-3)


def test_inputs_that_are_all_zero_still_give_codes() -> None:
    weight, inputs = make_layer(4, 32)
    solution = solve(weight, make_hessian(inputs * 0), SolverConfig(group_size=32))
    assert (solution.weight.codes == 8).all()
    assert (solution.loss, solution.relative_loss) == (0, 0)


def test_a_singular_hessian_is_damped() -> None:
    row = torch.randn(1, 40, generator=torch.Generator().manual_seed(0))
    weight, _ = make_layer(3, 40)
    assert torch.isfinite(torch.tensor(solve(weight, make_hessian(row), SolverConfig(group_size=-1)).loss))


@pytest.mark.parametrize("hessian", [[[1.0, 1e6], [1e6, 1.0]], [[-1.0, 0.0], [0.0, -1.0]]])
def test_a_hessian_without_a_factor_fails_in_one_sentence(hessian: list[list[float]]) -> None:
    with pytest.raises(QuasarError, match=r"The Hessian of model\.layers\.3\.mlp\.up_proj has no Cholesky factor even"):
        solve(torch.ones(1, 2), torch.tensor(hessian), SolverConfig(), "model.layers.3.mlp.up_proj")


def test_weights_that_are_not_finite_fail_in_one_sentence() -> None:
    weight, inputs = make_layer(3, 16)
    weight[1, 2] = float("nan")
    with pytest.raises(QuasarError, match=r"lm_head could not be quantized: its weights or its inputs are not finite"):
        solve(weight, make_hessian(inputs), SolverConfig(), "lm_head")


def test_the_hessian_by_hand_in_two_batches() -> None:
    """(2 ÷ 3) · (x₁ x₁ᵀ + x₂ x₂ᵀ + x₃ x₃ᵀ) for x = (1, 2), (3, 0), (0, 1); bfloat16 inputs, float32 sums."""
    accumulator = HessianAccumulator(2, torch.device("cpu"))
    accumulator.add(torch.tensor([[[1.0, 2], [3, 0]]], dtype=torch.bfloat16))
    accumulator.add(torch.tensor([[0.0, 1]], dtype=torch.bfloat16))
    hessian = accumulator.finish("the layer")
    assert hessian.dtype == torch.float32
    assert torch.allclose(hessian, torch.tensor([[10.0, 2], [2, 5]]) * 2 / 3)


def test_a_hessian_of_nothing_or_of_overflow_is_refused() -> None:
    accumulator = HessianAccumulator(2, torch.device("cpu"))
    with pytest.raises(QuasarError, match="Layer a saw no calibration input"):
        accumulator.finish("a")
    accumulator.add(torch.tensor([[1.0, float("inf")]]))
    with pytest.raises(QuasarError, match="Layer a has inputs that are not finite"):
        accumulator.finish("a")


def test_solving_leaves_its_arguments_alone() -> None:
    weight, inputs = make_layer(3, 32)
    hessian = make_hessian(inputs)
    before = weight.clone(), hessian.clone()
    solve(weight, hessian, SolverConfig(group_size=32))
    assert torch.equal(weight, before[0])
    assert torch.equal(hessian, before[1])


def test_layers_of_a_group_are_solved_as_if_alone() -> None:
    """Of other sizes and widths, with one factor."""
    (first, inputs), (second, _) = make_layer(5, 40), make_layer(3, 40, seed=1)
    hessian = make_hessian(inputs)
    configs = {"a": SolverConfig(4, 32), "b": SolverConfig(3, -1, sym=False)}
    together = solve_group({"a": first, "b": second}, hessian, configs)
    for name, weight in (("a", first), ("b", second)):
        assert_same_solution(together[name], solve(weight, hessian, configs[name]))


@pytest.mark.parametrize("config", [SolverConfig(group_size=32), SolverConfig(3, 32, sym=False, act_order=False)])
def test_pieces_make_the_layer(config: SolverConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, inputs = make_layer(80, 64)
    hessian, correlations = make_hessian(inputs), 0.1 * make_layer(80, 64, seed=1)[0]
    whole = solve_group({"a": weight}, hessian, {"a": config}, {"a": correlations.clone()})["a"]
    monkeypatch.setattr(gptq, "PIECE_WEIGHTS", 30 * 64)
    assert [(rows.start, rows.stop) for rows in pieces(80, 64, on_device=False)] == [(0, 26), (26, 53), (53, 80)]
    joined = solve_group({"a": weight}, hessian, {"a": config}, {"a": correlations.clone()})["a"]
    assert_same_solution(joined, whole)


def test_a_piece_is_never_empty() -> None:
    assert solver_rows(10**9, on_device=False) == 1
    assert solver_rows(4096, on_device=True) > solver_rows(4096, on_device=False)


def test_a_weight_of_sixteen_bits_is_solved_as_its_values_are() -> None:
    weight, inputs = make_layer(4, 32)
    weight, hessian = weight.bfloat16(), make_hessian(inputs)
    narrow, wide = (solve(each, hessian, SolverConfig(group_size=32)) for each in (weight, weight.float()))
    assert_same_solution(narrow, wide)
