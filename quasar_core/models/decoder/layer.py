"""What the lean decoder is made of: linear layers, the weights of a block, and inputs that each block has of its own.

Letters: T tokens of a pass, H key-value heads, G query heads per key-value head, D head size, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn.functional import embedding, linear

from quasar_core.kernels.cpu.compressed import CompressedWeight
from quasar_core.models.config.block import BlockConfig
from quasar_core.models.decoder.experts import Experts
from quasar_core.models.decoder.heads import normed
from quasar_core.models.recurrent.rules import Recurrence

Linear = Callable[[torch.Tensor], torch.Tensor]  # [T, in] → [T, out]


@dataclass(frozen=True)
class DenseLinear:
    """A linear layer of 16 or 32 bits: weight [out, in], bias [out]."""

    weight: torch.Tensor
    bias: torch.Tensor | None = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, in] → [T, out]."""
        return linear(x, self.weight, self.bias)


@dataclass(frozen=True)
class CompressedLinear:
    """A linear layer of bfloat16 in fewer bits, without loss: passes in C++ read it so, PyTorch has it restored."""

    weight: CompressedWeight
    bias: torch.Tensor | None = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, in] → [T, out]."""
        return linear(x, self.weight.restore(), self.bias)


@dataclass(frozen=True)
class FusedLinear:
    """Linear layers of one input as one layer; each keeps its own weight, such as packed ones of different widths."""

    parts: tuple[Linear, ...]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, in] → [T, sum of out]."""
        return torch.cat([part(x) for part in self.parts], dim=-1)


@dataclass(frozen=True)
class DecoderLayer:
    """Weights and switches of one block."""

    shape: BlockConfig
    input_norm: torch.Tensor | None
    qkv: Linear  # the queries of all heads, then keys, then values; of a recurrent layer, what its rule reads
    head_norms: torch.Tensor | None  # [H·G + H, D], of the queries' heads, then of the keys'
    out: Linear
    out_norm: torch.Tensor | None  # of what attention adds
    mlp_norm: torch.Tensor | None
    gate_up: Linear | None  # gates, then what they gate; without gates, what is activated
    activation: torch.Tensor | None  # weights of the activation, where it has some
    down: Linear | None
    down_norm: torch.Tensor | None  # of what the MLP adds
    experts: Experts | None = None  # in the place of gate_up and down, or beside them
    shares: bool = False  # keys and values are an earlier block's
    input_gate: Linear | None = None  # of the block's own input, where it has one
    input_out: Linear | None = None
    input_out_norm: torch.Tensor | None = None
    scalar: torch.Tensor | None = None  # [1], times what the block gives
    recurrence: Recurrence | None = None  # in place of attention
    rates: Linear | None = None  # how fast its states fade, and how much is written to them
    mix_gate: Linear | None = None  # of what attention mixes, where the gates are no part of `qkv`

    @property
    def mlp(self) -> tuple[Linear, Linear]:
        """The products of an MLP, where there is one."""
        assert self.gate_up is not None
        assert self.down is not None
        return self.gate_up, self.down

    @property
    def linears(self) -> tuple[Linear, ...]:
        """Its products: four, one more of a delta rule or gates, two of its own input, and those of experts."""
        attention = (self.qkv, self.rates, self.mix_gate, self.out)
        every = (*attention, self.gate_up, self.down, self.input_gate, self.input_out)
        experts = self.experts.linears if self.experts else ()
        return (*(product for product in every if product is not None), *experts)

    @property
    def norms(self) -> tuple[torch.Tensor, ...]:
        """The norms that the block has."""
        every = (self.input_norm, self.head_norms, self.out_norm, self.mlp_norm, self.down_norm, self.input_out_norm)
        return tuple(norm for norm in every if norm is not None)


@dataclass(frozen=True)
class LayerInputs:
    """Inputs that each block has of its own (Gemma 4's E sizes): of the token, and of its embedding."""

    embedding: torch.Tensor  # [V, blocks · P]
    projection: Linear  # hidden → blocks · P
    norm: torch.Tensor  # [P]
    scale: float  # √P as the weights' dtype has it

    def __call__(self, tokens: torch.Tensor, hidden: torch.Tensor, eps: float) -> torch.Tensor:
        """The blocks' own inputs [blocks, T, P] of T tokens with embeddings [T, in]."""
        own = embedding(tokens, self.embedding) * self.scale
        projected = (self.projection(hidden) * hidden.shape[-1] ** -0.5).unflatten(-1, (-1, len(self.norm)))
        mixed = (normed(projected, self.norm, eps) + own.view_as(projected)) * 2**-0.5
        return mixed.transpose(0, 1)


@dataclass(frozen=True)
class Joint:
    """What stands before the block of a head that goes on from another model's rows (`models/drafting/mtp.py`)."""

    embedding_norm: torch.Tensor  # [in]
    rows_norm: torch.Tensor  # [in]
    projection: Linear  # 2·in → in, of the embedding and the row beside one another

    def __call__(self, embedded: torch.Tensor, given: torch.Tensor, eps: float) -> torch.Tensor:
        """Join embeddings and rows, both [T, in] → [T, in]."""
        both = normed(embedded, self.embedding_norm, eps), normed(given, self.rows_norm, eps)
        return self.projection(torch.cat(both, dim=-1))
