"""The rules of recurrent layers in PyTorch's operations: a causal convolution, then a state that every token changes.

The gated delta rule (Yang et al., 2024, arXiv 2412.06464) and Mamba-2 (Dao and Gu, 2024, arXiv 2405.21060) keep for
each head a matrix S [Dk, Dv]. A token with query q, key k and value v leaves S = a·S + kᵀw and gives q·S, where w is
b·(v − k·S) in the delta rule, what is missing from v, and b·v in Mamba-2. Tokens are taken one after the other with
the same sums whatever the pass, so a token's output does not depend on how a text is cut into passes: to the last bit
where PyTorch's functions of single numbers round alike, as they do where rows fill its vectors. Letters: T tokens of a
pass, C channels, K taps, Hk heads of keys, Hv of values, Dk and Dv their sizes.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch.nn.functional import rms_norm, silu, softplus

from quasar_core.kernels.cpu.library import why_not_here
from quasar_core.models.config.recurrence import RecurrenceConfig
from quasar_core.models.recurrent import compiled_rule
from quasar_core.models.recurrent.compiled_rule import CompiledRule
from quasar_core.models.recurrent.states import Inputs, LayerStates, State


@dataclass(frozen=True)
class Recurrence:
    """A recurrent layer between its products; the weights are in float32."""

    shape: RecurrenceConfig
    eps: float
    taps: torch.Tensor  # [K, C], the oldest channel's first
    bias: torch.Tensor | None = None  # [C]
    fading: torch.Tensor | None = None  # [Hv], the logarithm of how fast states fade
    step_bias: torch.Tensor | None = None  # [Hv]
    passed_by: torch.Tensor | None = None  # [Hv], Mamba-2's D: what of the values goes by the state
    norm: torch.Tensor | None = None  # [Dv], or of all values

    @property
    def weights(self) -> tuple[torch.Tensor, ...]:
        """The rule's weights that there are."""
        every = (self.taps, self.bias, self.fading, self.step_bias, self.passed_by, self.norm)
        return tuple(weight for weight in every if weight is not None)

    @cached_property
    def compiled(self) -> CompiledRule | None:
        """The rule in C++, where that runs; for states on the CPU in bfloat16 or float32."""
        if self.taps.device.type != "cpu" or compiled_rule.why_not(self.shape) or why_not_here():
            return None
        names = ("bias", "fading", "step_bias", "passed_by", "norm")
        weights = {"weights": self.taps, **{name: getattr(self, name) for name in names}}
        return CompiledRule(self.shape, compiled_rule.describe(self.shape, self.eps, weights))

    def empty(self, device: torch.device, dtype: torch.dtype) -> State:
        """The state in front of a text, which takes no memory."""
        shape = self.shape
        window = torch.zeros((), device=device, dtype=dtype).expand(shape.taps - 1, shape.channels)
        if shape.kind == "conv":
            return State(window)
        size = shape.value_heads, shape.key_size, shape.value_size
        return State(window, torch.zeros((), device=device).expand(*size))

    def __call__(
        self, projected: torch.Tensor, rates: torch.Tensor | None, states: LayerStates, start: int
    ) -> torch.Tensor:
        """What the first product gives of T tokens at position `start` → what the last one reads [T, values].

        `rates` [T, 2·Hv] are a product of their own in the delta rule: of writing, and of fading.
        """
        gate, inputs = self._read(projected, rates)
        begin = states.at(start, self.advance)
        outputs, pieces, done = [], list[tuple[Inputs, State]](), 0
        for count in states.pieces(len(inputs)):
            piece = inputs[done : done + count]
            mixed, begin = self._run(begin, piece)
            outputs.append(mixed)
            pieces.append((piece, begin))
            done += count
        states.record(start, pieces)
        return self._gated(outputs[0] if len(outputs) == 1 else torch.cat(outputs), gate).to(projected.dtype)

    def advance(self, state: State, inputs: Inputs) -> State:
        """The state behind tokens whose outputs are known."""
        return self._run(state, inputs)[1]

    def _read(self, projected: torch.Tensor, rates: torch.Tensor | None) -> tuple[torch.Tensor, Inputs]:
        """What gates the outputs [T, values], and what the rule reads."""
        shape = self.shape
        if shape.kind == "conv":
            before, gate, x = projected.split(shape.width, -1)
            return gate, Inputs(before * x, projected.new_empty(len(x), 2, 0, dtype=torch.float32))
        assert self.fading is not None
        if shape.kind == "delta":
            channels, gate = projected.split([shape.channels, shape.values], -1)
            assert rates is not None
            written, step = rates.float().split(shape.value_heads, -1)
            written = written.sigmoid()
            step = softplus(step + self.step_bias)
        else:
            gate, channels, step = projected.split([shape.values, shape.channels, shape.value_heads], -1)
            written = step = softplus(step.float() + self.step_bias)
        left = (-self.fading.exp() * step).exp()
        return gate, Inputs(channels, torch.stack((left, written), 1))

    def _run(self, state: State, inputs: Inputs) -> tuple[torch.Tensor, State]:
        """The rule over T tokens → outputs [T, values] in float32, and the state behind them."""
        if self.compiled is not None and inputs.channels.dtype in compiled_rule.DTYPES:
            return self.compiled(state, inputs)
        return self._run_in_torch(state, inputs)

    def _run_in_torch(self, state: State, inputs: Inputs) -> tuple[torch.Tensor, State]:
        shape, count = self.shape, len(inputs)
        seen = torch.cat((state.window, inputs.channels))
        window, mixed = seen[count:].clone(), self._convolved(seen, count)
        if shape.kind == "conv":
            return mixed, State(window)
        q, k, v = self._heads(silu(mixed))
        assert state.matrices is not None
        outputs, matrices = _fold(q, k, v, inputs.rates, state.matrices, corrects=shape.kind == "delta")
        if self.passed_by is not None:
            outputs = outputs + v * self.passed_by[:, None]
        return outputs.flatten(1), State(window, matrices)

    def _convolved(self, seen: torch.Tensor, count: int) -> torch.Tensor:
        """Channels [K − 1 + T, C] → their causal convolution [T, C] in float32, tap after tap."""
        seen = seen.float()
        total = seen[:count] * self.taps[0]
        for tap in range(1, self.shape.taps):
            total = torch.addcmul(total, seen[tap : tap + count], self.taps[tap])
        return total if self.bias is None else total + self.bias

    def _heads(self, mixed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Channels [T, C] as queries and keys [T, Hv, Dk] and values [T, Hv, Dv]."""
        shape = self.shape
        if shape.kind == "delta":
            q, k, v = mixed.split([shape.keys, shape.keys, shape.values], -1)
        else:
            v, k, q = mixed.split([shape.values, shape.keys, shape.keys], -1)
        q, k = (x.unflatten(-1, (shape.key_heads, shape.key_size)) for x in (q, k))
        if shape.kind == "delta":
            q, k = _unit(q) * shape.key_size**-0.5, _unit(k)
        group = shape.value_heads // shape.key_heads
        q, k = (x.repeat_interleave(group, 1) for x in (q, k))
        return q, k, v.unflatten(-1, (shape.value_heads, shape.value_size))

    def _gated(self, mixed: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        """Outputs [T, values] behind their norm and gate."""
        shape, gate = self.shape, gate.float()
        if shape.kind == "conv":
            return gate * mixed
        assert self.norm is not None
        if shape.kind == "delta":
            heads = mixed.unflatten(-1, (shape.value_heads, shape.value_size))
            return rms_norm(heads, (shape.value_size,), self.norm, self.eps).flatten(1) * silu(gate)
        groups = (mixed * silu(gate)).unflatten(-1, (shape.key_heads, -1))
        return rms_norm(groups, groups.shape[-1:], None, self.eps).flatten(1) * self.norm


def _fold(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rates: torch.Tensor, matrices: torch.Tensor, corrects: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Take tokens one after the other → outputs [T, Hv, Dv], and the matrices [Hv, Dk, Dv] behind them."""
    left, written = rates[..., None, None].unbind(1)  # [T, Hv, 1, 1]
    outputs = []
    for t in range(len(q)):
        # The first product is a new tensor, which the rest of the pass writes into.
        matrices = matrices * left[t] if t == 0 else matrices.mul_(left[t])
        value, key = v[t][:, None], k[t][:, None]  # [Hv, 1, ·]
        if corrects:
            value = value - key @ matrices
        matrices.addcmul_(key.mT, value * written[t])
        outputs.append((q[t][:, None] @ matrices)[:, 0])
    return torch.stack(outputs), matrices


def _unit(x: torch.Tensor) -> torch.Tensor:
    """Vectors [..., D] of length 1."""
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6)
