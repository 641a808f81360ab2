"""Solve a layer a piece of its outputs at a time: outputs are independent, and the workspace stays small.

Letters: out and in the layer's sizes.
"""

from dataclasses import replace

import torch

from quasar_core.quantize.gptq import Solution, SolverConfig, solve

# Weights of a piece: 36 MB in float32, which the C library gives back to the system when it is freed (32 MB and less it
# may keep); more on a GPU, whose time goes by the number of pieces.
PIECE_WEIGHTS = 9_000_000
DEVICE_PIECE_WEIGHTS = 2**27


def solver_rows(in_features: int, on_device: bool) -> int:
    """Outputs of a piece, at the most."""
    return max(1, (DEVICE_PIECE_WEIGHTS if on_device else PIECE_WEIGHTS) // in_features)


def solve_in_pieces(weight: torch.Tensor, hessian: torch.Tensor, config: SolverConfig, name: str) -> Solution:
    """Quantize weight [out, in] under H [in, in]; as `gptq.solve`, within bounds."""
    rows = solver_rows(weight.shape[1], weight.device.type != "cpu")
    pieces = weight.tensor_split(-(-weight.shape[0] // rows))  # nearly equal ones: each costs a factor of H
    solutions = [solve(piece, hessian, config, name) for piece in pieces]
    return solutions[0] if len(solutions) == 1 else _joined(solutions)


def _joined(solutions: list[Solution]) -> Solution:
    weights = [solution.weight for solution in solutions]
    joined = replace(
        weights[0],
        codes=torch.cat([weight.codes for weight in weights], dim=1),
        scales=torch.cat([weight.scales for weight in weights], dim=1),
        zeros=torch.cat([weight.zeros for weight in weights], dim=1),
    )
    loss = sum(solution.loss for solution in solutions)
    output = sum(solution.loss / solution.relative_loss for solution in solutions if solution.relative_loss > 0)
    return Solution(joined, loss, loss / output if output > 0 else 0.0)
