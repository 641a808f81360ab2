"""Which other programs load a checkpoint, or which layer each of them refuses, and why. Pure: sizes and a config.

The rules as of late 2026, read in their sources; vLLM's CPU build and GPTQModel were also tried with a small model of
every architecture, transformers with some (`tests/interop`), SGLang and vLLM's GPU kernels with none:

- vLLM 0.32 (`quantization/auto_gptq.py`, `kernels/linear/mixed_precision/`): symmetric codes of 4 or 8 bits, in groups
  of 32, 64, 128 or one per output. It makes room for inputs ÷ group scales, rounded down, so the group must divide the
  inputs. On a GPU it pads sizes that fit no tile. Its CPU kernel takes 4 bits, inputs and outputs a multiple of 32; the
  one for experts asks for AMX, and was not tried. It reads codes where `modules_in_block_to_quantize` lists the layer,
  or without a list where a file has them, but asks under names of its own (`fused_names.py`): some need the list.
- SGLang 0.5.23 (`quantization/gptq/`, `quantization/__init__.py`): on NVIDIA's GPUs by Marlin alone, without padding;
  exllama's kernel, which earlier versions had for other codes, is gone.
- GPTQModel 7.6 (`nn_modules/qlinear/torch.py`): every width; groups of 16 to 1024 or one per output; sizes of any kind.
  It looks for codes of some families under other names, or for none of experts (`gptqmodel_names.py`).
- transformers 5 with optimum 2: what GPTQModel's kernel takes, but one width for all layers, and no quantized head. It
  holds all experts of a block in one tensor, and leaves their codes unread without a word.

vLLM and SGLang ask the rules of `dynamic` for the names of fused products (`fused_names.py`), GPTQModel for each
layer's own name.

W8A8 and fp8 checkpoints (compressed-tensors) are read by all but GPTQModel.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from quasar_core.checkpoint.fused_names import fused_name, name_in_vllm, unnamed_layers
from quasar_core.checkpoint.gptqmodel_names import NAMINGS, USUAL, is_exported
from quasar_core.checkpoint.headers import BITS as MARLIN_BITS
from quasar_core.checkpoint.headers import GROUP_SIZES as MARLIN_GROUP_SIZES
from quasar_core.checkpoint.headers import StoredLayer
from quasar_core.errors import QuasarError

Width = tuple[int, int]  # bits and group size; a group size of −1 is one scale per output
Rule = Callable[[StoredLayer], "str | None"]  # why a loader refuses a layer or a fused product

# Architectures that vLLM's CPU build does not compute rightly before anything is quantized.
VLLM_CPU_FAILS = {
    "ApertusForCausalLM": "this architecture's activation gives float32, which its products do not take",
    "Lfm2ForCausalLM": "it rotates this architecture's queries and keys wrongly",
}
# Architectures that GPTQModel has classes or passes of, which fail with transformers 5.23 whatever the checkpoint is.
GPTQMODEL_FAILS = {
    "GraniteMoeHybridForCausalLM": "its class for this architecture fails",
    "Glm4MoeForCausalLM": "its pass of this architecture fails",
}
EXPORTED = "`quasar models export` writes what it loads"
GPTQMODEL_GROUP_SIZES = (-1, 16, 32, 64, 128, 256, 512, 1024)


@dataclass(frozen=True)
class Config:
    """What `quantization_config` tells loaders of GPTQ: the usual width, and by pattern other ones (None: no codes)."""

    bits: int
    group_size: int
    sym: bool = True
    desc_act: bool = False
    dynamic: Sequence[tuple[re.Pattern[str], Mapping[str, Any] | None]] = ()
    named: frozenset[str] | None = None  # layers that have codes, where the config lists them
    architecture: str = ""  # as config.json names it; "" is one that no loader treats apart
    exported: bool = False  # under GPTQModel's names

    @classmethod
    def of(cls, section: Mapping[str, Any], architecture: str = "") -> "Config":
        """QuasarError for rules that are none."""
        rules = section.get("dynamic") or {}
        try:
            dynamic = [_compiled(pattern, width) for pattern, width in rules.items()]
        except (AttributeError, TypeError, re.error) as error:
            raise QuasarError(f"The rules of `dynamic` in quantization_config cannot be read ({error}).") from error
        group_size = section.get("group_size")
        return cls(
            section.get("bits", 4),
            -1 if group_size is None else group_size,
            bool(section.get("sym", True)),
            bool(section.get("desc_act", False)),
            dynamic,
            _listed(section.get("modules_in_block_to_quantize")),
            architecture,
            is_exported(section),
        )

    @property
    def usual(self) -> Width:
        """The width of layers that no rule names."""
        return self.bits, self.group_size

    def width(self, name: str) -> Width | None:
        """The width of a layer or fused product, by the first rule that matches from the name's beginning."""
        found = next((width for pattern, width in self.dynamic if pattern.match(name)), {})
        return None if found is None else (found.get("bits", self.bits), found.get("group_size", self.group_size))


def _compiled(pattern: str, width: Mapping[str, Any]) -> tuple[re.Pattern[str], Mapping[str, Any] | None]:
    """A rule; `-:` before it leaves what it matches as it was."""
    plain = pattern[2:] if pattern[:2] in ("+:", "-:") else pattern
    return re.compile(plain), None if pattern.startswith("-:") else dict(width)


def _listed(modules: Any) -> frozenset[str] | None:
    """Names in a list, or in the lists of a list."""
    if not isinstance(modules, Sequence) or not modules:
        return None
    parts = (part if isinstance(part, Sequence) and not isinstance(part, str) else [part] for part in modules)
    return frozenset(name for part in parts for name in part if isinstance(name, str))


@dataclass(frozen=True)
class Verdict:
    """Whether a loader takes a checkpoint: the layers that it refuses, each with its reason, and what would help."""

    refused: tuple[tuple[str, str], ...] = ()
    remedy: str = ""

    def __str__(self) -> str:
        if not self.refused:
            return "yes"
        return f"no: {self.reason}; {self.remedy}" if self.remedy else f"no: {self.reason}"

    @property
    def reason(self) -> str:
        """Why it refuses the first of them, and which that is."""
        (name, reason), more = self.refused[0], len(self.refused) - 1
        return f"{reason} ({name}" + (f" and {more} more)" if more else ")")


def describe_loaders(
    layers: Sequence[StoredLayer], section: Mapping[str, Any], architecture: str = ""
) -> dict[str, str]:
    """What each loader says to a checkpoint of these layers and this `quantization_config`: yes, or no and why."""
    method = section.get("quant_method", "gptq")
    if method == "compressed-tensors":
        return {name: "no: it does not read compressed-tensors" if name == "GPTQModel" else "yes" for name in LOADERS}
    if method != "gptq":
        return dict.fromkeys(LOADERS, f"not known: the method is {method}")
    config = Config.of(section, architecture)
    if config.exported and NAMINGS.get(architecture, USUAL).in_16_bits:
        others = dict.fromkeys(LOADERS, "no: its experts have no codes, and the names that GPTQModel looks for")
        return {**others, "GPTQModel": str(judge_gptqmodel(layers, config))}
    return {name: str(judge(layers, config)) for name, judge in LOADERS.items()}


def judge_vllm(layers: Sequence[StoredLayer], config: Config) -> Verdict:
    """On a GPU."""
    unnamed = unnamed_layers([layer.name for layer in layers], config.named or frozenset())
    return _judge_fused(layers, config, lambda product: _why_not_vllm(product, config, unnamed), name_in_vllm)


def judge_vllm_cpu(layers: Sequence[StoredLayer], config: Config) -> Verdict:
    """Its CPU build."""
    unnamed = unnamed_layers([layer.name for layer in layers], config.named or frozenset())

    def rule(product: StoredLayer) -> str | None:
        reason = _why_not_vllm(product, config, unnamed) or VLLM_CPU_FAILS.get(config.architecture)
        if reason is None and product.bits != 4:
            reason = f"it takes 4 bits, not {product.bits}"
        if reason is None and ".experts." in product.name:
            reason = "its kernel for the codes of experts asks for AMX"
        return reason or _why_no_multiple(product, 32, 32)

    return _judge_fused(layers, config, rule, name_in_vllm)


def judge_sglang(layers: Sequence[StoredLayer], config: Config) -> Verdict:
    """On an NVIDIA GPU, where it asks whether Marlin takes the usual width before it looks at any layer."""

    def rule(product: StoredLayer) -> str | None:
        usual = replace(product, bits=config.bits, group_size=config.group_size)
        reason = _why_not_mixtral_names(product, config) or _why_not_marlin_codes(usual, config)
        return reason or _why_not_sglang_marlin(product, config)

    return _judge_fused(layers, config, rule)


def judge_gptqmodel(layers: Sequence[StoredLayer], config: Config) -> Verdict:
    """Whether GPTQModel takes the layers, by its kernel in PyTorch, which takes most."""
    fails = GPTQMODEL_FAILS.get(config.architecture)

    def kernel(layer: StoredLayer) -> str | None:
        return fails or _why_not_gptqmodel_kernel(layer, config)

    verdict = _judge(layers, lambda layer: _why_not_gptqmodel_names(layer.name) or kernel(layer))
    can_be_exported = config.architecture in NAMINGS and not _judge(layers, kernel).refused
    return replace(verdict, remedy=EXPORTED) if can_be_exported and verdict.refused else verdict


def judge_transformers(layers: Sequence[StoredLayer], config: Config) -> Verdict:
    """With optimum and GPTQModel installed."""
    names = {layer.name for layer in layers}

    def rule(layer: StoredLayer) -> str | None:
        before, _, last = layer.name.rpartition(".")
        if last == "in_proj_qkv" and config.named is None and f"{before}.in_proj_a" not in names:
            return "its config does not list the layers with codes, and optimum takes in_proj_a for one"
        if layer.name == "lm_head":
            return "optimum knows no quantized head"
        if ".experts." in layer.name:
            return "it holds all experts in one tensor, and reads no codes of theirs"
        if (own := NAMINGS.get(config.architecture, USUAL).own(layer.name)[0]) != layer.name:
            return f"its model has {own.rpartition('.')[2]} in one layer"
        if _width_of(layer) != _whole_row(layer, config.usual):
            return f"optimum reads all layers at {_words(config.usual)}, and this one has {_words(_width_of(layer))}"
        return None

    verdict = _judge(layers, rule)
    return verdict if verdict.refused else _judge(layers, lambda layer: _why_not_gptqmodel_kernel(layer, config))


LOADERS: Mapping[str, Callable[[Sequence[StoredLayer], Config], Verdict]] = {
    "vLLM": judge_vllm,
    "vLLM on a CPU": judge_vllm_cpu,
    "SGLang": judge_sglang,
    "GPTQModel": judge_gptqmodel,
    "transformers": judge_transformers,
}


def _judge(layers: Iterable[StoredLayer], rule: Rule) -> Verdict:
    return Verdict(tuple((layer.name, reason) for layer in layers if (reason := rule(layer)) is not None))


def _judge_fused(
    layers: Sequence[StoredLayer], config: Config, rule: Rule, asked: Callable[[str], str] = str
) -> Verdict:
    """Judge as loaders do that fuse layers: parts of a product must have one width, and the rules must tell it.

    `asked` gives the name for which they ask the rules.
    """
    products: dict[str, list[StoredLayer]] = {}
    for layer in layers:
        products.setdefault(fused_name(layer.name) or layer.name, []).append(layer)

    def whole_rule(product: StoredLayer) -> str | None:
        widths = {part.name.rpartition(".")[2]: _words(_width_of(part)) for part in products[product.name]}
        if len(set(widths.values())) > 1:
            told = ", ".join(f"{name} has {width}" for name, width in widths.items())
            return f"it reads them as one product, and {told}"
        return _why_other_width(replace(product, name=asked(product.name)), config) or rule(product)

    joined = (
        replace(parts[0], name=name, out_features=sum(part.out_features for part in parts))
        for name, parts in products.items()
    )
    return _judge(joined, whole_rule)


def _why_not_gptqmodel_names(name: str) -> str | None:
    """Tried with a small model of every architecture of the lean decoder (`tests/interop/test_families.py`)."""
    if name.endswith(".gate_up_proj"):
        return "it reads gate and up as two layers"
    if ".block_sparse_moe.experts." in name or ".feed_forward.experts." in name:  # Mixtral's and Granite's, LFM2's
        return "it looks for experts under other names"
    if re.search(r"layers\.\d+\.experts\.", name):
        return "it leaves experts beside an MLP unread"
    return "it fails on Mamba's layers" if ".mamba." in name else None


def _why_not_gptqmodel_kernel(layer: StoredLayer, config: Config) -> str | None:
    if layer.group_size in (*GPTQMODEL_GROUP_SIZES, layer.in_features):
        return _why_other_width(layer, config)
    sizes = ", ".join(map(str, GPTQMODEL_GROUP_SIZES[1:]))
    return f"it takes groups of {sizes} or a whole row, not {layer.group_size}"


def _why_other_width(layer: StoredLayer, config: Config) -> str | None:
    """Whether the rules of `dynamic` tell another width than the one that is stored."""
    told = config.width(layer.name)
    if told is not None and _whole_row(layer, told) == _width_of(layer):
        return None
    return f"its config tells {_words(told) if told else 'no codes'}, and stored are {_words(_width_of(layer))}"


def _why_not_vllm(product: StoredLayer, config: Config, unnamed: frozenset[str]) -> str | None:
    if product.name in unnamed:
        return "its config does not list it under the name that vLLM asks for"
    if config.desc_act and product.group_size != -1:
        return "it takes no groups in the order of activations (desc_act)"
    reason = _why_not_mixtral_names(product, config) or _why_not_marlin_codes(product, config)
    return reason or _why_groups_do_not_divide(product)


def _why_not_mixtral_names(product: StoredLayer, config: Config) -> str | None:
    """vLLM and SGLang keep the module's first name, GPTQModel has that of transformers 5: read, not tried."""
    if config.architecture == "MixtralForCausalLM" and ".mlp.experts." in product.name:
        return "it looks for experts in block_sparse_moe"
    return None


def _why_not_sglang_marlin(product: StoredLayer, config: Config) -> str | None:
    if reason := _why_not_marlin_codes(product, config) or _why_groups_do_not_divide(product):
        return reason
    narrow, wide = _why_no_multiple(product, 128, 64), _why_no_multiple(product, 64, 128)
    return narrow if narrow and wide else None


def _why_not_marlin_codes(product: StoredLayer, config: Config) -> str | None:
    if not config.sym:
        return "it takes no asymmetric codes"
    if product.bits not in MARLIN_BITS:
        return f"it takes 4 and 8 bits, not {product.bits}"
    if product.group_size not in MARLIN_GROUP_SIZES:
        return f"it takes groups of 32, 64, 128 or a whole row, not {product.group_size}"
    return None


def _why_groups_do_not_divide(product: StoredLayer) -> str | None:
    if product.group_size == -1 or product.in_features % product.group_size == 0:
        return None
    return f"{product.in_features} inputs are not a multiple of the group of {product.group_size}"


def _why_no_multiple(product: StoredLayer, inputs: int, outputs: int) -> str | None:
    if product.in_features % inputs:
        return f"{product.in_features} inputs are not a multiple of {inputs}"
    if product.out_features % outputs:
        return f"{product.out_features} outputs are not a multiple of {outputs}"
    return None


def _width_of(layer: StoredLayer) -> Width:
    return _whole_row(layer, (layer.bits, layer.group_size))


def _whole_row(layer: StoredLayer, width: Width) -> Width:
    """A group of as many weights as a row has is a whole row."""
    return (width[0], -1) if width[1] == layer.in_features else width


def _words(width: Width) -> str:
    return f"{width[0]} bits" + ("" if width[1] == -1 else f" in groups of {width[1]}")
