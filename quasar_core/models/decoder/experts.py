"""A mixture of experts in PyTorch's operations: route, run the chosen experts on the rows that chose them, add up.

Letters: T tokens of a pass, E experts, H hidden, k experts of a token.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch.nn.functional import linear

from quasar_core.models.config.mixture import MixtureConfig
from quasar_core.models.decoder.activations import activated

Linear = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Experts:
    """A block's experts; where every token goes through one of its own, that is the last."""

    config: MixtureConfig
    router: torch.Tensor  # [E, H]
    correction: torch.Tensor | None  # [E], float32
    gate_up: tuple[Linear, ...]
    down: tuple[Linear, ...]
    shared_gate: torch.Tensor | None  # [1, H]

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

    def __call__(self, x: torch.Tensor, activation: str) -> torch.Tensor:
        """x [T, H] → [T, H]; outputs are added in float32."""
        total = torch.zeros_like(x, dtype=torch.float32)
        for index, rows, shares in self._assignments(x):
            y = self.down[index](activated(self.gate_up[index](x[rows]), activation))
            total.index_add_(0, rows, y.float() * shares[:, None])
        return total.to(x.dtype)

    def _assignments(self, x: torch.Tensor) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """Each expert that some rows go through, with these rows and its shares in them."""
        chosen, shares = route(self.config, linear(x.float(), self.router.float()), self.correction)
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
    """Of scores [T, E] the chosen experts and their shares, both [T, k]."""
    if config.scores == "chosen":
        best, chosen = scores.topk(config.chosen, dim=-1)
        return chosen, best.softmax(dim=-1) * config.scale
    odds = scores.sigmoid() if config.scores == "sigmoid" else scores.softmax(dim=-1)
    chosen = (odds if correction is None else odds + correction).topk(config.chosen, dim=-1).indices
    shares = odds.gather(1, chosen)
    if config.normalised:
        shares = shares / (shares.sum(dim=-1, keepdim=True) + 1e-20)
    return chosen, shares * config.scale
