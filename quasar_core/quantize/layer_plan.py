"""How each layer is quantized: one default, and by name the layers that depart from it."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from quasar_core.config import QuantizeConfig
from quasar_core.quantize.solve.gptq import SolverConfig

HEAD = "lm_head"
# A few rows on which all the rest hangs: how fast the states of a delta rule fade, and how much is written to them; how
# much of a shared expert's output is taken, one row, which a word of codes could not hold; which experts are chosen.
KEPT = ("in_proj_a", "in_proj_b", "in_proj_ba", "shared_expert_gate", "router.proj")
KEPT_RULE = r".*\.(in_proj_(a|b|ba)|shared_expert_gate|router\.proj)$"  # the same for other loaders


def is_kept(name: str) -> bool:
    """Tell whether a layer of that name keeps the target's precision."""
    return f".{name}".endswith(tuple(f".{kept}" for kept in KEPT))


@dataclass(frozen=True)
class LayerPlan:
    """The solver's options for every layer; `layers` holds those of single layers by full name, the head's too."""

    default: SolverConfig
    layers: Mapping[str, SolverConfig] = field(default_factory=dict)

    @classmethod
    def of(cls, config: QuantizeConfig) -> "LayerPlan":
        """What the config asks for; without a quantized head, the head has no entry."""
        layers = {HEAD: _solver(config, config.lm_head_bits)} if config.lm_head_bits < 16 else {}
        return cls(_solver(config, config.bits), layers)

    def solver(self, name: str) -> SolverConfig:
        """The options for the layer of that name."""
        return self.layers.get(name, self.default)

    @property
    def quantizes_head(self) -> bool:
        """Whether the head is to be quantized."""
        return HEAD in self.layers


def _solver(config: QuantizeConfig, bits: int) -> SolverConfig:
    return SolverConfig(bits, config.groups_of, config.sym, config.act_order, config.damp)
