"""Solving a layer in pieces of its outputs against solving it at once."""

import pytest
import torch

from quasar_core.quantize import pieces
from quasar_core.quantize.gptq import SolverConfig, solve
from quasar_core.quantize.pieces import solve_in_pieces, solver_rows


@pytest.mark.parametrize("config", [SolverConfig(group_size=32), SolverConfig(3, 32, sym=False, act_order=False)])
def test_pieces_make_the_layer(config: SolverConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, inputs = torch.randn(80, 64, generator=generator), torch.randn(200, 64, generator=generator)
    hessian = 2 / 200 * inputs.t() @ inputs
    whole = solve(weight, hessian, config)
    monkeypatch.setattr(pieces, "PIECE_WEIGHTS", 30 * 64)
    sizes: list[int] = []

    def watched(piece: torch.Tensor, *others: object) -> object:
        sizes.append(len(piece))
        return solve(piece, *others)  # type: ignore[arg-type]

    monkeypatch.setattr(pieces, "solve", watched)
    joined = solve_in_pieces(weight, hessian, config, "layer")
    assert sizes == [27, 27, 26]
    assert torch.equal(joined.weight.codes, whole.weight.codes)
    assert torch.equal(joined.weight.scales, whole.weight.scales)
    assert torch.equal(joined.weight.zeros, whole.weight.zeros)
    assert torch.equal(joined.weight.g_idx, whole.weight.g_idx)
    assert joined.loss == pytest.approx(whole.loss, rel=1e-4)
    assert joined.relative_loss == pytest.approx(whole.relative_loss, rel=1e-4)


def test_a_piece_is_never_empty() -> None:
    assert solver_rows(10**9, on_device=False) == 1
    assert solver_rows(4096, on_device=True) > solver_rows(4096, on_device=False)
