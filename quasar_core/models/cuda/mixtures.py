"""Mixtures of experts in recorded passes: the router's choice stays on the device, and products read it there.

Five launches in the place of a gated MLP's two or three: scores, choice, gates and what they gate, down, sum; an expert
of every token has launches of its own beside them. Letters: T tokens of a pass, H hidden size, k experts of a token.
"""

from collections.abc import Sequence
from typing import Any

import torch

from quasar_core.kernels.linear import PackedLinear
from quasar_core.kernels.triton.blocks import why_not_gated
from quasar_core.kernels.triton.products import multiply_dense
from quasar_core.kernels.triton.routed import MOST_TOKENS, RoutedWeight, multiply_routed, routed_weight
from quasar_core.kernels.triton.routing import add_experts, choose_experts
from quasar_core.kernels.triton.weights import TritonWeight
from quasar_core.models.decoder.experts import Experts
from quasar_core.models.decoder.layer import DenseLinear, Linear
from quasar_core.models.decoder.lean_decoder import LeanDecoder
from quasar_core.models.decoder.linear import has_both


class RoutedExperts:
    """The experts of one block that are chosen on the way."""

    def __init__(self, experts: Experts) -> None:
        self._experts, self._inner = experts, experts.config.inner
        self._gate_up, self._down = (routed(some, experts.config.chosen) for some in experts.routed)

    def __call__(self, x: torch.Tensor, last: torch.Tensor, always: torch.Tensor | None) -> torch.Tensor:
        """x [T, H] → [T, H]; tokens behind `last` [1] choose nobody, `always` [T, H] is the expert of every token's.

        More tokens than one launch takes, which passes over streamed weights have, go one part after the other.
        """
        parts = [
            self._mix(rows, last - begin if begin else last, None if always is None else always[begin:end])
            for rows, begin, end in _parts(x)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _mix(self, x: torch.Tensor, last: torch.Tensor, always: torch.Tensor | None) -> torch.Tensor:
        experts, config, count = self._experts, self._experts.config, len(x)
        scores = x.new_empty(count, config.count, dtype=torch.float32)
        multiply_dense(x, experts.router, scores)
        chosen = x.new_empty(count, config.chosen, dtype=torch.int32)
        shares = x.new_empty(count, config.places, dtype=torch.float32)
        choose_experts(
            scores,
            config.scores,
            chosen,
            shares,
            last,
            normalised=config.normalised,
            scale=config.scale,
            added=config.row.added,
            correction=experts.correction,
            x=None if experts.shared_gate is None else x,
            gate=experts.shared_gate,
        )
        gated = x.new_empty(chosen.numel(), self._inner)
        multiply_routed(x, self._gate_up, chosen, gated, gated=True)
        rows = x.new_empty(chosen.numel(), x.shape[1], dtype=torch.float32)
        multiply_routed(gated, self._down, chosen, rows)
        out = torch.empty_like(x)
        add_experts(rows, chosen, shares, out, always)
        return out


def _parts(x: torch.Tensor) -> list[tuple[torch.Tensor, int, int]]:
    """Rows that one launch takes, with where they begin and end."""
    begins = range(0, len(x), MOST_TOKENS)
    return [(x[begin : begin + MOST_TOKENS], begin, begin + MOST_TOKENS) for begin in begins]


def routed(products: Sequence[Linear], chosen: int) -> RoutedWeight:
    """One product of all experts; `why_not_routed` has said that it can be had."""
    weights: Any = [_weight(product) for product in products]
    return routed_weight(weights, chosen)


def why_not_routed(decoder: LeanDecoder) -> str | None:
    """Why a decoder's experts cannot be chosen within a recorded pass, or None where they can."""
    mixture = decoder.config.mixture
    if mixture is None:
        return None
    if has_both(decoder.config):
        return "its experts stand beside MLPs, which no recorded pass has"
    if decoder.config.activation != "silu":
        return f"its experts' gates are of {decoder.config.activation}, and the kernels know silu"
    obstacle = why_not_gated(2 * mixture.inner)
    if obstacle:
        return f"its experts' {obstacle}"
    for experts in (layer.experts for layer in decoder.layers if layer.experts is not None):
        if any(_weight(product) is None for some in experts.routed for product in some):
            return "its experts run on another kernel than Triton's"
        try:
            RoutedExperts(experts)
        except ValueError as error:
            return str(error)
    return None


def _weight(product: Linear) -> torch.Tensor | TritonWeight | None:
    """A product's weight as the kernels take it; None where another kernel has it."""
    if isinstance(product, DenseLinear) and product.bias is None:
        return product.weight
    if isinstance(product, PackedLinear) and product.bias is None and isinstance(product.prepared, TritonWeight):
        return product.prepared
    return None
