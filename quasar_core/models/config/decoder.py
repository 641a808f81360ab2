"""What a config.json says to the lean decoder, by its row of the table: sizes and switches, or why it is not run.

The options that transformers gives values where a file leaves them out have the same values here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quasar_core.errors import QuasarError
from quasar_core.models.architectures import ARCHITECTURES
from quasar_core.models.architectures.row import (
    ACTIVATIONS,
    Architecture,
    BlockNorms,
    HeadNorms,
    LayerNames,
    Switch,
)
from quasar_core.models.config.block import (
    BlockConfig,
    head_size_of,
    inner_size_of,
    inputs_size_of,
    read_blocks,
    why_not_differing,
    why_not_layers,
)
from quasar_core.models.config.mixture import MixtureConfig, read_mixture, why_not_mixture
from quasar_core.models.config.options import ONLY_VALUES, REQUIRED, wrong_option
from quasar_core.models.config.rope import read_ropes, why_not_rope
from quasar_core.models.rope import RopeConfig


@dataclass(frozen=True)
class DecoderConfig:
    """One model's sizes and switches, in the decoder's own words."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    eps: float
    behind_eps: float  # of norms behind attention and MLP
    max_positions: int
    tied: bool
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    norms: BlockNorms
    centred_norms: bool
    centred_last_norm: bool
    norms_embedding: bool
    head_norms: HeadNorms | None
    gated: bool
    activation: str
    fused: frozenset[str]
    names: LayerNames
    gates_attention: bool
    recurrent_module: str  # the name in the files of layers with a state
    embedding_scale: float
    rounds_embedding_scale: bool  # to the weights' dtype
    residual_scale: float
    scores_scale: float | None  # None is 1 ÷ √D
    logits_scale: float
    scores_cap: float | None
    logits_cap: float | None
    query_growth: tuple[float, int] | None  # β and L: queries grow by 1 + β · ln(1 + ⌊position ÷ L⌋)
    inputs_size: int  # P, of the inputs that each block has of its own; 0 is none
    inputs_vocab: int  # tokens that have such inputs
    mixture: MixtureConfig | None  # of the sparse blocks
    further_blocks: int  # stored behind the last one, and not run
    blocks: tuple[BlockConfig, ...]
    ropes: tuple[RopeConfig, ...]

    @classmethod
    def parse(cls, config: Mapping[str, Any]) -> "DecoderConfig":
        """From the content of config.json; QuasarError where the decoder does not run it."""
        obstacle = why_not_lean(config)
        if obstacle:
            raise QuasarError(f"The lean decoder does not run this model: {obstacle}.")
        name = config["architectures"][0]
        row = ARCHITECTURES[name]
        options = complete(row, config)
        heads = options["num_attention_heads"]
        return cls(
            architecture=name,
            vocab_size=options["vocab_size"],
            hidden_size=options["hidden_size"],
            intermediate_size=inner_size_of(row, options),
            num_layers=options["num_hidden_layers"],
            num_heads=heads,
            num_kv_heads=options.get("num_key_value_heads") or heads,
            head_size=head_size_of(options),
            eps=(eps := options.get(row.eps_option, 1e-6)),
            behind_eps=options.get(row.behind_eps_option, eps),
            max_positions=options["max_position_embeddings"],
            tied=options.get("tie_word_embeddings", False),
            qkv_bias=_is_on(row.qkv_bias, options),
            out_bias=_is_on(row.out_bias, options),
            mlp_bias=_is_on(row.mlp_bias, options),
            norms=row.norms,
            centred_norms=row.centred_norms,
            centred_last_norm=row.centred_norms and row.centred_last_norm,
            norms_embedding=row.norms_embedding,
            head_norms=_head_norms(row, options),
            gated=row.gated,
            activation=_activation(row, options),
            fused=row.fused,
            names=row.names,
            gates_attention=row.gates_attention,
            recurrent_module=row.recurrent.module if row.recurrent else "",
            **_scales(row, options),
            inputs_size=(inputs := inputs_size_of(row, options)),
            inputs_vocab=options["vocab_size_per_layer_input"] if inputs else 0,
            mixture=read_mixture(row.mixture, options),
            further_blocks=(options.get(row.further_blocks) or 0) if row.further_blocks else 0,
            blocks=(blocks := read_blocks(row, options)),
            ropes=read_ropes(row, options, _head_sizes_by_type(blocks)),
        )

    @property
    def windows(self) -> tuple[int | None, ...]:
        """How many positions each layer sees, its own included; None is all of them."""
        return tuple(block.window for block in self.blocks)

    @property
    def is_recurrent(self) -> bool:
        """Whether some blocks have a state in place of attention."""
        return any(block.recurrence is not None for block in self.blocks)

    @property
    def blocks_are_scaled(self) -> bool:
        """Whether what a block gives is multiplied by a stored number."""
        return ARCHITECTURES[self.architecture].blocks_differ

    @property
    def can_be_smoothed(self) -> bool:
        """Whether norms stand before their readers alone and linearly, and all layers are stored apart."""
        plain = self.gated and not self.centred_norms and not self.fused and not self.is_recurrent
        return plain and self.mixture is None and self.norms == BlockNorms()


def complete(row: Architecture, config: Mapping[str, Any]) -> dict[str, Any]:
    """The options with the values that hold where config.json does not name them."""
    given = {key: value for key, value in config.items() if value is not None or key != "rope_parameters"}
    if given.get("rope_scaling"):
        given.setdefault("rope_parameters", None)
    given |= {name: given[other] for other, name in row.aliases.items() if given.get(other) is not None}
    return {**row.defaults, **given}


def why_not_lean(config: Mapping[str, Any]) -> str | None:
    """Why the lean decoder does not run a model with this config.json, or None where it does."""
    name = (config.get("architectures") or ["no architecture"])[0]
    if name not in ARCHITECTURES:
        return f"{name} is not in its table of architectures"
    row = ARCHITECTURES[name]
    options = complete(row, config)
    missing = [key for key in REQUIRED if not options.get(key)]
    if missing:
        return f"config.json has no {missing[0]}"
    wrong = wrong_option(config)
    if wrong:
        return f"in its config.json {wrong}"
    differing = why_not_differing(row, options) if row.blocks_differ else None
    mixture = why_not_mixture(row.mixture, options)
    return (
        mixture
        or differing
        or _why_not_options(name, options)
        or why_not_layers(row, options)
        or why_not_rope(row, options)
    )


def _why_not_options(name: str, options: Mapping[str, Any]) -> str | None:
    row = ARCHITECTURES[name]
    model_type = options.get("model_type", row.model_type)
    if model_type != row.model_type:
        return f"{name} is not of the model_type {model_type}"
    if _activation(row, options) not in ACTIVATIONS.values():
        return f"it has no activation {_activation(row, options)}"
    if _activation(row, options) == "xielu" and row.model_type != "apertus":
        return f"{row.model_type} has no weights of the activation xielu"
    known = {**ONLY_VALUES, **row.only}
    other = next((key for key, values in known.items() if values and options.get(key, values[0]) not in values), None)
    return f"it has no {other} of {options[other]}" if other else None


def _activation(row: Architecture, options: Mapping[str, Any]) -> str:
    name = options.get(row.activation_option, "silu")
    return ACTIVATIONS.get(name, str(name))


def _scales(row: Architecture, options: Mapping[str, Any]) -> dict[str, Any]:
    """Constant factors and caps, by their fields."""
    scales, of_hidden = row.scales, row.scales.embedding == "√hidden"
    embedding = options["hidden_size"] ** 0.5 if of_hidden else _factor(scales.embedding, options)
    scores = _factor(scales.scores, options) if scales.scores else None
    if scales.scores_are_plain:
        scores = 1.0
    if scales.scores_root:
        scores = float(options[scales.scores_root] ** -0.5)
    if scales.queries:
        scores = _factor(scales.queries, options) * head_size_of(options) ** -0.5
    rope = options.get("rope_scaling") or options.get("rope_parameters") or {}
    growth = None
    if row.grows_queries:
        growth = rope["llama_4_scaling_beta"], rope["original_max_position_embeddings"]
    return {
        "embedding_scale": embedding,
        "rounds_embedding_scale": of_hidden,
        "residual_scale": _factor(scales.residual, options),
        "scores_scale": scores,
        "logits_scale": _factor(scales.logits, options) / _factor(scales.logits_divisor, options),
        "scores_cap": options.get(row.scores_cap),
        "logits_cap": options.get(row.logits_cap),
        "query_growth": growth,
    }


def _factor(option: str, options: Mapping[str, Any]) -> float:
    return float(options[option]) if option else 1.0


def _head_norms(row: Architecture, options: Mapping[str, Any]) -> HeadNorms | None:
    norms = row.head_norms
    return norms if norms and (not norms.option or options.get(norms.option)) else None


def _is_on(switch: Switch, options: Mapping[str, Any]) -> bool:
    return bool(options.get(switch, False)) if isinstance(switch, str) else switch


def _head_sizes_by_type(blocks: Sequence[BlockConfig]) -> tuple[int, int]:
    """Head sizes of full layers and of sliding ones, which rotate by different tables where there are two."""
    full = [block.head_size for block in blocks if block.window is None]
    sliding = [block.head_size for block in blocks if block.window is not None]
    return (full or sliding)[0], (sliding or full)[0]
