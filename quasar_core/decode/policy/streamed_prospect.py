"""Say what may be expected where the target's weights are streamed, and what a verifier of more bits would give there.

A confirm then costs so many verifies that agreement bounds the speed, and bits buy agreement. Rounding to b bits errs
by 2^−b of a weight's range, so the KL divergence that it causes falls as 4^−b, and the share of tokens at which the
target does not agree, which are those whose margin is smaller than the error, as 2^−b: as the root of the divergence.
What a kernel adds by rounding activations stays. From 2 to 3, 4 and 8 bits on the demo model that share fell from
0.257 to 0.125, 0.064 and 0.0039 of sampled text.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from quasar_core.config import BITS
from quasar_core.decode.costs.pass_costs import Cost, PairCosts
from quasar_core.decode.policy.agreement import RunningAgreement, shift_to
from quasar_core.decode.policy.lengths import plan_exact
from quasar_core.decode.policy.window_values import longest_window
from quasar_core.kernels.linear import PackedLinear
from quasar_core.models.decoder.lean_decoder import LeanDecoder
from quasar_core.models.pair import Pair
from quasar_core.models.weights.streaming import LayerStream
from quasar_core.records import FidelityReport

WORTH = 1.3  # times the speed that is expected, from which on more bits are spoken of
WIDER = (6, 8)  # bits of a weight that are weighed; what is not of the format is a mean of widths by layer


@dataclass(frozen=True)
class Codes:
    """What a verifier's pass reads: layers of the blocks as (weights, bits), and bytes of its head."""

    layers: Sequence[tuple[int, float]]
    head: int

    @property
    def bits(self) -> float:
        """Of a weight, on average."""
        return sum(count * bits for count, bits in self.layers) / sum(count for count, _ in self.layers)

    @property
    def size(self) -> int:
        """Bytes of a pass."""
        return self.head + int(sum(count * bits for count, bits in self.layers)) // 8

    def growth(self, bits: float) -> int:
        """Bytes more where every layer has at least so many bits."""
        return int(sum(count * max(bits - own, 0.0) for count, own in self.layers)) // 8

    @classmethod
    def of(cls, verifier: LeanDecoder) -> "Codes":
        """Those of a loaded verifier."""
        packed = [layer for layer in verifier.packed_layers if layer is not verifier.head]
        head = verifier.head
        bits = head.bits if isinstance(head, PackedLinear) else 8 * verifier.dtype.itemsize
        layers = [(layer.in_features * layer.out_features, float(layer.bits)) for layer in packed]
        return cls(layers, verifier.vocab_size * verifier.config.hidden_size * bits // 8)


@dataclass(frozen=True)
class WiderVerifier:
    """What a verifier of so many bits would give: the chance that the target agrees, bytes more, tokens a second."""

    bits: int
    agreement: float
    growth: int
    rate: float

    def describe(self) -> str:
        """What it would give, and how it is made."""
        asked = f"--bits {self.bits}{'' if self.bits in BITS else ' --mixed'}"
        return (
            f"offload: with a verifier of {self.bits} bits, {self.growth / 1e9:.2g} GB more, the target would take "
            f"about {self.agreement:.3g} of its tokens, and about {self.rate:.2g} tokens a second would be expected: "
            f"`quasar quantize MODEL {asked}` makes it, --bits auto tries several first"
        )


def describe_expected(costs: PairCosts, rate: float, agreement: float, measured: bool) -> str:
    """What streamed weights mean for whoever waits."""
    known = "as it did when the verifier was made" if measured else "which was not measured"
    return (
        f"offload: a confirm takes {costs.confirm(1):.2g} s and a verify {costs.verify(1):.2g} s, so about {rate:.2g} "
        f"tokens a second are expected, in windows of up to {longest_window(costs)} tokens, where the target takes "
        f"{agreement:.3g} of the verifier's tokens, {known}"
    )


def describe_more_bits(
    pair: Pair, costs: PairCosts, agreement: RunningAgreement, rate: float, acceptance: float
) -> str | None:
    """What more bits would give, where that is much and memory holds them; None where nothing speaks for them."""
    verifier, source = pair.verifier, getattr(pair.target, "source", None)
    if not (isinstance(verifier, LeanDecoder) and isinstance(source, LayerStream) and pair.fidelity):
        return None
    room = Room(source.spare, source.staying_bytes, source.bandwidth)
    outlook = Outlook(Codes.of(verifier), pair.fidelity, room, costs, agreement, acceptance)
    best = max(outlook.wider(), key=lambda one: one.rate, default=None)
    return best.describe() if best and best.rate >= WORTH * rate else None


@dataclass(frozen=True)
class Room:
    """Bytes of memory that are left, those of blocks that stay and may yet be streamed, and bytes read a second."""

    spare: int
    staying: int
    bandwidth: float


@dataclass(frozen=True)
class Outlook:
    """What is known of the verifier in use, and what follows for others."""

    codes: Codes
    fidelity: FidelityReport
    room: Room
    costs: PairCosts
    agreement: RunningAgreement
    acceptance: float  # of drafts

    def wider(self) -> list[WiderVerifier]:
        """Of each wider verifier for which there is memory."""
        wider = [bits for bits in WIDER if self.codes.layers and bits > self.codes.bits]
        return [self._of(bits) for bits in wider if self._moved(bits) <= self.room.staying]

    def _of(self, bits: int) -> WiderVerifier:
        left = errors_left(self.fidelity, bits - self.codes.bits)
        curve, growth = self.agreement.curve, self.codes.growth(bits)
        mean = 1 - left * (1 - self.agreement.now.mean)
        surer = RunningAgreement(curve, shift_to(curve, mean)).now
        moved = self._moved(bits)
        costs = changed(self.costs, 1 + growth / self.codes.size, moved / self.room.bandwidth if moved else 0.0)
        return WiderVerifier(bits, surer.mean, growth, plan_exact(costs, surer, self.acceptance).rate)

    def _moved(self, bits: int) -> int:
        """Bytes of blocks that stay now, and would be streamed."""
        return max(self.codes.growth(bits) - self.room.spare, 0)


def errors_left(fidelity: FidelityReport, more: float) -> float:
    """The share of a verifier's disagreements that stays with so many bits more."""
    price = fidelity.in_use
    codes = price.kl_mean_exact if price else fidelity.kl_mean
    kernel = max(price.kl_mean - codes, 0.0) if price else 0.0
    return math.sqrt((codes / 4**more + kernel) / (codes + kernel)) if codes > 0 else 1.0


def changed(costs: PairCosts, verify_factor: float, confirm_more: float) -> PairCosts:
    """Costs of which a verify takes so many times the seconds, a confirm so many seconds more."""

    def verify(tokens: int) -> float:
        return verify_factor * costs.verify(tokens)

    def confirm(tokens: int) -> float:
        return costs.confirm(tokens) + confirm_more

    made: tuple[Cost, Cost] = verify, confirm
    return PairCosts(*made)
