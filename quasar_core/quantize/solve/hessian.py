"""The Hessian of a layer's squared output error, H = (2 / n) · Σ x xᵀ over n inputs x, and the weight W* to round.

Asymmetric calibration fits a layer to the outputs of the full-precision model. A layer of the verifier reads
activations x that already carry the error of earlier layers; the same layer of the full-precision model reads x̄. The
weight whose outputs on x are closest to W x̄ is the least-squares solution

    W* = W + (W · Σ (x̄ − x) xᵀ + ½ · Σ (r̄ − r) xᵀ) · (Σ x xᵀ + λI)⁻¹,

which takes W's place in the solver. The first term, W ΔX Xᵀ H⁻¹, is that of GPTAQ (Li et al., 2025, arXiv 2504.02692),
which folds it into each column's update; rounding W* needs no solver of its own. The second, ours, does the same for
the residual stream r that the outputs are added to; half of it did better than all. The bracket is the correlation of
the output error with the inputs, the inverse is the solver's own factor, and λ its damping.
"""

from collections.abc import Mapping

import torch

from quasar_core.errors import QuasarError
from quasar_core.quantize.solve.cpp import add_token_sums
from quasar_core.quantize.solve.matmul import product, product_of_bf16, sums_pairs

# Float32 values of a batch that are copied at a time: 16 MB.
COPIED_VALUES = 2**22
# Rows of a tile, and their number: only the tiles on and below the diagonal of H are computed.
TILE_ROWS, TILES = 128, 8


class HessianAccumulator:
    """Sums inputs [..., in] into H [in, in], in float32 whatever the model's dtype.

    What is summed beside them, where they are bfloat16, is rounded to it as they are, and its products are not.
    """

    def __init__(self, in_features: int, device: torch.device) -> None:
        self.sum = torch.zeros(in_features, in_features, dtype=torch.float32, device=device)  # the lower triangle
        self.error_sum: torch.Tensor | None = None
        self.count = 0

    def add(self, inputs: torch.Tensor, errors: torch.Tensor | None = None) -> None:
        """Add the inputs of one batch, and the errors [..., k] of the same rows where they are known."""
        rows = inputs.reshape(-1, inputs.shape[-1])
        beside = None if errors is None else errors.reshape(len(rows), -1).to(rows.dtype)
        at_once = max(1, COPIED_VALUES // rows.shape[1])
        for begin in range(0, len(rows), at_once):
            part = slice(begin, begin + at_once)
            self._add(rows[part], None if beside is None else beside[part])
        self.count += len(rows)

    def _add(self, rows: torch.Tensor, errors: torch.Tensor | None) -> None:
        total = None if errors is None else self._errors_of(errors.shape[1])
        if sums_pairs(rows):
            add_token_sums(rows, rows, self.sum, lower=True)
            if errors is not None and total is not None:
                add_token_sums(errors, rows, total)
            return
        columns = _columns(rows)
        multiply = product_of_bf16 if rows.dtype == torch.bfloat16 else product
        for tile in _tiles(len(columns)):
            self.sum[tile, : tile.stop] += multiply(columns[tile], columns[: tile.stop])
        if errors is None or total is None:
            return
        beside = _columns(errors)
        for tile in _tiles(len(beside)):
            total[tile] += multiply(beside[tile], columns)

    def _errors_of(self, size: int) -> torch.Tensor:
        """The sum of errors [size, in]."""
        if self.error_sum is None:
            self.error_sum = self.sum.new_zeros(size, len(self.sum))
        return self.error_sum

    def subtract_outputs(self, weight: torch.Tensor) -> None:
        """Subtract what a lone layer [k, in] gives on the summed inputs, W Σ x xᵀ, from the sum of wanted outputs.

        So no product is computed token by token for it. What rounding leaves is that of the wanted outputs, which
        differs from token to token.
        """
        total = self._errors_of(len(weight))
        inputs = symmetrize_(self.sum)
        for rows, some in zip(total.split(PIECE), weight.split(PIECE), strict=True):
            rows.addmm_(some.float(), inputs, alpha=-1)

    def errors(self) -> torch.Tensor | None:
        """Return (2 / n) · Σ e xᵀ [k, in]; None without errors. Consumes the sum: call once."""
        found, self.error_sum = self.error_sum, None
        return None if found is None else found.mul_(2.0 / self.count)

    def finish(self, name: str) -> torch.Tensor:
        """Return H; QuasarError that names the layer where it is empty or not finite. Consumes the sum: call once."""
        if self.count == 0:
            raise QuasarError(f"Layer {name} saw no calibration input.")
        hessian = symmetrize_(self.sum).mul_(2.0 / self.count)  # in place: the matrix may be half a gigabyte
        if not all(bool(torch.isfinite(hessian[tile]).all()) for tile in _tiles(len(hessian))):
            raise QuasarError(
                f"Layer {name} has inputs that are not finite: the model's weights or the dtype overflow on this text."
            )
        return hessian


def symmetrize_(matrix: torch.Tensor) -> torch.Tensor:
    """Copy what lies below the diagonal of a square matrix to above it, in place."""
    for tile in _tiles(len(matrix)):
        matrix[: tile.start, tile] = matrix[tile, : tile.start].t()
        corner = matrix[tile, tile].tril()
        matrix[tile, tile] = corner.add_(corner.tril(-1).t())
    return matrix


def shrunk(hessian: torch.Tensor, count: int) -> torch.Tensor:
    """Shrink H of `count` rows as though `in` rows of white noise of the same size had been read too; in place.

    What few rows say of single directions is chance, and the solver would fit it: the fewer rows a layer has read for
    its inputs, the more H becomes a multiple of the identity, under which solving is rounding to nearest. Ledoit and
    Wolf (2004) shrink covariances so; dev/log.md has the error on other text. An input that is always 0 stays so.
    """
    diagonal = hessian.diagonal()
    diagonal += (diagonal > 0) * (len(hessian) / count * diagonal.mean())
    return hessian


def _tiles(rows: int) -> list[slice]:
    """Split the rows of a matrix into tiles."""
    at_once = max(TILE_ROWS, -(-rows // TILES))
    return [slice(begin, min(begin + at_once, rows)) for begin in range(0, rows, at_once)]


def _columns(rows: torch.Tensor) -> torch.Tensor:
    """Transpose rows [n, k] to float32 [k, n], contiguous along the sum of the product."""
    return torch.empty(rows.shape[1], rows.shape[0], dtype=torch.float32, device=rows.device).copy_(rows.t())


STREAM_SHARE = 0.5
PIECE = 512  # outputs


def wanted_outputs(outputs: torch.Tensor, stream_error: torch.Tensor | None) -> torch.Tensor:
    """Add half of the stream's error to the outputs of the full-precision layer: W x̄ + ½ (r̄ − r), where r is known."""
    return outputs if stream_error is None else outputs.add(stream_error, alpha=STREAM_SHARE)


def error_correlation(weights: Mapping[str, torch.Tensor], errors: torch.Tensor) -> dict[str, torch.Tensor]:
    """Correlate each layer's output error with its inputs, [out, in] by name: W ΔX Xᵀ of GPTAQ.

    `errors` [k, in] correlates the inputs with the output errors of a lone layer, else with ΔX, which W multiplies.
    """
    if len(weights) == 1:
        return dict.fromkeys(weights, errors)
    return {name: _weighted(weight, errors) for name, weight in weights.items()}


def _weighted(weight: torch.Tensor, drift: torch.Tensor) -> torch.Tensor:
    """Multiply W [out, in] by ΔX Xᵀ [in, in], some outputs at a time, since the weight may have 16 bits."""
    correlation = torch.empty(weight.shape, device=weight.device)
    for rows, some in zip(correlation.split(PIECE), weight.split(PIECE), strict=True):
        torch.mm(some.float(), drift, out=rows)
    return correlation
