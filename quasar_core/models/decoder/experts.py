"""A mixture of experts in PyTorch's operations: route, run the chosen experts on the rows that chose them, add up.

Letters: T tokens of a pass, E experts, H hidden, k experts of a token.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch.nn.functional import linear

from quasar_core.models.config.mixture import MixtureConfig
from quasar_core.models.decoder.activations import activated
from quasar_core.models.decoder.heads import normed

Linear = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class BesideMlp:
    """What experts have that stand beside an MLP (Gemma 4): norms [H] of their own, and factors of their shares [E]."""

    mlp_out_norm: torch.Tensor
    norm: torch.Tensor
    out_norm: torch.Tensor
    router_scale: torch.Tensor  # [H]
    factors: torch.Tensor

    @property
    def router_norm(self) -> torch.Tensor:
        """The weight [H] of the norm of what the router reads."""
        root: float = len(self.router_scale) ** 0.5
        return self.router_scale / root

    def join(
        self, experts: "Experts", from_mlp: torch.Tensor, hidden: torch.Tensor, activation: str, eps: float
    ) -> torch.Tensor:
        """What an MLP gives [T, H], and what the experts give of the residual stream [T, H] → [T, H]."""
        routing = normed(hidden, self.router_norm, eps)
        mixed = experts(normed(hidden, self.norm, eps), activation, routing)
        return normed(from_mlp, self.mlp_out_norm, eps) + normed(mixed, self.out_norm, eps)


@dataclass(frozen=True)
class Experts:
    """A block's experts; where every token goes through one of its own, that is the last."""

    config: MixtureConfig
    router: torch.Tensor  # [E, H]
    correction: torch.Tensor | None  # [E], float32
    gate_up: tuple[Linear, ...]
    down: tuple[Linear, ...]
    shared_gate: torch.Tensor | None  # [1, H]
    beside: BesideMlp | None = None  # else they stand in the place of the block's MLP

    @property
    def linears(self) -> tuple[Linear, ...]:
        """The products of all experts."""
        return (*self.gate_up, *self.down)

    @property
    def routed(self) -> tuple[tuple[Linear, ...], tuple[Linear, ...]]:
        """The products of the experts that are chosen: of gates and what they gate, and down."""
        return self.gate_up[: self.config.count], self.down[: self.config.count]

    @property
    def shared(self) -> tuple[Linear, Linear] | None:
        """The products of the expert of every token, where there is one."""
        return (self.gate_up[-1], self.down[-1]) if self.config.shared_inner else None

    def __call__(self, x: torch.Tensor, activation: str, routing: torch.Tensor | None = None) -> torch.Tensor:
        """x [T, H] → [T, H]; outputs are added in float32. The router reads `routing` [T, H], or x."""
        total = torch.zeros_like(x, dtype=torch.float32)
        for index, rows, shares in self._assignments(x, x if routing is None else routing):
            y = self.down[index](activated(self.gate_up[index](x[rows]), activation))
            total.index_add_(0, rows, y.float() * shares[:, None])
        return total.to(x.dtype)

    def _assignments(self, x: torch.Tensor, routing: torch.Tensor) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """Each expert that some rows go through, with these rows and its shares in them."""
        chosen, shares = route(self.config, linear(routing.float(), self.router.float()), self.correction)
        if self.beside is not None:
            shares = shares * self.beside.factors.float()[chosen]
        for index in chosen.unique().tolist():
            rows, places = torch.where(chosen == index)
            yield index, rows, shares[rows, places]
        if self.config.shared_inner:
            rows = torch.arange(len(x), device=x.device)
            gate = self.shared_gate
            share = (
                torch.ones(len(x), device=x.device) if gate is None else linear(x.float(), gate.float())[:, 0].sigmoid()
            )
            yield self.config.count, rows, share


def route(
    config: MixtureConfig, scores: torch.Tensor, correction: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose experts by scores [T, E] → the chosen ones and their shares, both [T, k]."""
    if config.scores == "chosen":
        best, chosen = scores.topk(config.chosen, dim=-1)
        return chosen, best.softmax(dim=-1) * config.scale
    odds = scores.sigmoid() if config.scores == "sigmoid" else scores.softmax(dim=-1)
    chosen = (odds if correction is None else odds + correction).topk(config.chosen, dim=-1).indices
    shares = odds.gather(1, chosen)
    if config.normalised:
        shares = shares / (shares.sum(dim=-1, keepdim=True) + config.row.added)
    return chosen, shares * config.scale
