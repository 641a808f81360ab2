"""Whether an engine takes a pair: the checkpoint's widths, the sizes that ranks share out, and what would be taken.

Tensor parallelism, by vLLM's and SGLang's linear layers: heads are shared out, so their number must divide; so must
that of key-value heads, or it is divided by the ranks' (each then holds a copy). The inputs of o_proj and down_proj are
shared out too, and each share must be whole groups of the codes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from quasar_core.checkpoint.fused_names import fused_name, listed_layers
from quasar_core.checkpoint.headers import StoredLayer
from quasar_core.checkpoint.loaders import LOADERS, VLLM_CPU_FAILS, Config
from quasar_core.config import GROUP_CHOICES

SHARED_INPUTS = ("o_proj", "down_proj")


def why_no_ranks(config: Mapping[str, Any], ranks: int) -> str | None:
    """Why a model of this config.json cannot be shared out among so many ranks; None where it can, or is not known."""
    text = config.get("text_config") or config
    heads = text.get("num_attention_heads")
    groups = text.get("num_key_value_heads") or heads
    if isinstance(heads, int) and heads % ranks:
        return f"its {heads} attention heads cannot be divided among {ranks} ranks"
    if isinstance(groups, int) and groups % ranks and ranks % groups:
        return f"its {groups} key-value heads cannot be divided among {ranks} ranks"
    return None


def shares(layers: Sequence[StoredLayer], ranks: int) -> list[StoredLayer]:
    """What each rank holds of the layers."""
    return [
        replace(layer, in_features=layer.in_features // ranks)
        if layer.name.rpartition(".")[2] in SHARED_INPUTS
        else replace(layer, out_features=layer.out_features // ranks)
        for layer in layers
    ]


def judge(
    loader: str, layers: Sequence[StoredLayer], section: Mapping[str, Any], ranks: int = 1, architecture: str = ""
) -> str:
    """What a loader of `LOADERS` says of a checkpoint of these layers, shared out: "yes", or "no: " and why."""
    if section.get("quant_method", "gptq") == "compressed-tensors":
        return "yes"
    return str(LOADERS[loader](shares(layers, ranks), Config.of(section, architecture)))


def what_it_would_take(
    loader: str, layers: Sequence[StoredLayer], ranks: int = 1, architecture: str = ""
) -> str | None:
    """Options of `quantize` whose checkpoint the loader takes; None where none of those tried would do."""
    if loader == "vLLM on a CPU" and architecture in VLLM_CPU_FAILS:
        return None
    listed = listed_layers([layer.name for layer in layers])
    for size in GROUP_CHOICES:
        others = [replace(layer, bits=4, group_size=size) for layer in layers if layer.name != "lm_head"]
        section = {"bits": 4, "group_size": size, "modules_in_block_to_quantize": listed}
        if judge(loader, others, section, ranks) == "yes":
            return f"--bits 4 --group-size {size}"
    return "--method w8a8" if any(fused_name(layer.name) for layer in layers) else None
