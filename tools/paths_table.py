"""Which path runs each architecture, and which other programs load its verifiers, as the code's own rules say."""

from typing import Any

from quasar_core.checkpoint.fused_names import listed_layers
from quasar_core.checkpoint.gptqmodel_names import NAMINGS
from quasar_core.checkpoint.headers import StoredLayer
from quasar_core.checkpoint.loaders import EXPORTED, describe_loaders
from quasar_core.models.architectures import ARCHITECTURES
from quasar_core.models.architectures.row import Architecture
from quasar_core.models.config.decoder import DecoderConfig
from quasar_core.models.decoder.linear import block_products, has_both, mixture_products
from quasar_core.quantize.layer_plan import is_kept

BITS, GROUP = 4, 32
SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "full_attn_idxs": [1, 3],
    "max_position_embeddings": 128,
}
EXPERTS: dict[str, Any] = {"moe_intermediate_size": 64, "num_experts": 4, "n_shared_experts": 1}
COLUMNS = ("architecture", "drafts", "on CUDA", "GPTQModel", "vLLM's CPU build")


def table() -> str:
    """One row for each architecture; mixtures that an option switches on have one of their own."""
    rows = [_line(name, row, experts) for name, row in ARCHITECTURES.items() for experts in _forms(row)]
    return "\n".join([f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|", *rows]) + "\n"


def _forms(row: Architecture) -> tuple[bool, ...]:
    """Whether the model has experts: both ways where an option says so."""
    return (False, True) if row.mixture and row.mixture.option else (bool(row.mixture),)


def _line(name: str, row: Architecture, experts: bool) -> str:
    config = small_config(name, row, experts)
    loaders = describe_loaders(*_checkpoint(config))
    switched = " with experts" if experts and len(_forms(row)) > 1 else ""
    cells = [
        f"{name.removesuffix('ForCausalLM')}{switched}",
        "chains" if config.is_recurrent else "chains, trees",
        _on_cuda(config),
        _exported(name) if EXPORTED in loaders["GPTQModel"] else _short(loaders["GPTQModel"]),
        _short(loaders["vLLM on a CPU"]),
    ]
    return f"| {' | '.join(cells)} |"


def small_config(name: str, row: Architecture, experts: bool) -> DecoderConfig:
    """The architecture at its usual options, of small sizes."""
    options: dict[str, Any] = {**row.defaults, **SIZES, "architectures": [name], "model_type": row.model_type}
    if row.mixture:
        numbers = dict.fromkeys(row.mixture.counts[:1], EXPERTS["num_experts"]) | {row.mixture.chosen: 2}
        options |= {**EXPERTS, **numbers} if experts else {}
        if row.mixture.option:
            options[row.mixture.option] = options.get(row.mixture.option, True) if experts else 0
    return DecoderConfig.parse(options)


def _checkpoint(config: DecoderConfig) -> tuple[list[StoredLayer], dict[str, Any], str]:
    """The quantized layers of a verifier, and what its config says of them."""
    products = [product for index in range(config.num_layers) for product in block_products(config, index).values()]
    mixtures = filter(None, (mixture_products(config, index) for index in range(config.num_layers)))
    products += [product for mixture in mixtures for product in mixture.of_experts]
    layers = {
        name: StoredLayer(name, product.columns, rows, BITS, GROUP)
        for product in products
        for name, rows in zip(product.names, product.rows, strict=True)
        if not is_kept(name)
    }
    section = {"bits": BITS, "group_size": GROUP, "modules_in_block_to_quantize": listed_layers(list(layers))}
    return list(layers.values()), section, config.architecture


def _on_cuda(config: DecoderConfig) -> str:
    """As `models/cuda/choose.py` decides it."""
    if config.is_recurrent or config.gates_attention or has_both(config):
        return "PyTorch's operations"
    return "graphs, by Triton alone" if config.mixture else "graphs"


def _exported(name: str) -> str:
    """What `models export` makes of it."""
    return "exported" + ", experts in 16 bits" * bool(NAMINGS[name].in_16_bits)


def _short(verdict: str) -> str:
    """Without the layer's name."""
    return verdict.partition(" (")[0]
