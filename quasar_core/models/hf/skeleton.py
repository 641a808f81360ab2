"""Build a transformers model without its weights, from the config alone: modules, names and shapes.

Weights are put in later, part by part, from memory-mapped files. Buffers, which no file holds, are there at once.
"""

import copy
import inspect
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from quasar_core.checkpoint.tensor_files import TensorFiles
from quasar_core.errors import QuasarError
from quasar_core.models.hf.config_errors import config_errors
from quasar_core.models.hf.experts import separate_experts
from quasar_core.models.hf.stored_names import StoredNames
from quasar_core.store.model_config import read_config
from quasar_core.store.text_part import has_text_part

LARGEST_BUFFER = 2**32  # bytes of what a config may ask to be computed
_PANGU = "PanguEmbeddedForCausalLM"  # Llama by another name, which transformers does not know

# Model types whose classes in transformers generate with no cache of keys and values by position.
_OWN_CACHES = {
    "cpmant": "passes over a prompt with tokens of its own in front, by a cache of its own",
    "minimax": "takes a cache of its own class",
    "openai-gpt": "takes no cache",
    "rwkv": "keeps a state that it takes in a way of its own",
}


def read_model_config(folder: Path, trust_remote_code: bool = False) -> PretrainedConfig:
    """The config of a model's folder as transformers understands it, without a quantization section.

    That of its text part, where the model is multimodal.
    QuasarError where transformers refuses it, and for a model that needs code of its own without `trust_remote_code`.
    """
    content = read_config(folder)
    is_pangu = _PANGU in (content.get("architectures") or ())
    if not is_pangu:
        _refuse_unknown(folder, content, trust_remote_code)
    failed = f"The config in {folder} is not one that transformers understands"
    with config_errors(failed, folder / "config.json", content):
        if is_pangu:
            config: PretrainedConfig = _pangu_as_llama(content)
        else:
            config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
    if has_text_part(content):
        text, shared = config.get_text_config(), config
        text.tie_word_embeddings = getattr(shared, "tie_word_embeddings", text.tie_word_embeddings)
        config = text
    _refuse_foreign_windows(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def _refuse_unknown(folder: Path, content: Mapping[str, Any], trust_remote_code: bool) -> None:
    """A model type that this transformers does not have: code of its own runs only if that was asked for."""
    kind = content.get("model_type")
    if kind in _OWN_CACHES:
        raise QuasarError(_unsupported(kind, content, f"it {_OWN_CACHES[kind]}"))
    if kind is None or kind in CONFIG_MAPPING or (content.get("auto_map") and trust_remote_code):
        return
    if content.get("auto_map"):
        raise QuasarError(
            f"The model in {folder} brings Python code of its own (auto_map in its config.json); "
            "it runs only with --trust-remote-code."
        )
    raise QuasarError(
        _unsupported(kind, content, f"transformers {transformers.__version__} does not know the model type {kind}")
    )


def _unsupported(kind: Any, content: Mapping[str, Any], why: str) -> str:
    """The sentence for an architecture that does not run here."""
    named = content.get("architectures")
    name = named[0] if isinstance(named, list) and named else kind
    return f"The architecture {name} is not supported: {why}; docs/architectures.md lists what is."


def _refuse_foreign_windows(config: PretrainedConfig) -> None:
    """QuasarError for a window that the architecture does not have.

    The model would attend to everything, and transformers' cache drop what is behind the window: its text would depend
    on the passes that made it.
    """
    text = config.get_text_config()
    known = {*inspect.signature(type(text)).parameters, *text.attribute_map}
    positions = getattr(text, "max_position_embeddings", None)
    for option in ("sliding_window", "attention_chunk_size"):
        window = getattr(text, option, None)
        if option not in known and window is not None and not (positions and window >= positions):
            raise QuasarError(f"config.json has {option} {window}, which {text.model_type} does not have: take it out.")


def build_skeleton(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a config in evaluation mode, its weights on the meta device, experts apart, buffers on the CPU."""
    model = build_empty(config, dtype)
    separate_experts(model)
    _compute_buffers(model)
    return cast(PreTrainedModel, model.eval())


def build_empty(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a config as transformers has it, on the meta device.

    QuasarError where its buffers, which are computed from the config, are too large to be meant.
    """
    if config.model_type == "muse_glimmer_text":
        from quasar_core.models.hf.muse_glimmer import register  # not every transformers has its blocks

        register()
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not getattr(config, "auto_map", None):
        why = "transformers has no causal language model of this kind"
        raise QuasarError(_unsupported(config.model_type, config.to_dict(), why))
    failed, path = "transformers builds no causal language model from the config", Path(config.name_or_path or "")
    with config_errors(failed, path / "config.json", config.to_dict()), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    for name, buffer in model.named_buffers():
        if buffer.nbytes > LARGEST_BUFFER:
            raise QuasarError(f"By its config the model has a buffer {name} of {buffer.nbytes / 1e9:,.0f} GB.")
    return cast(PreTrainedModel, model)


def clone_structure(module: torch.nn.Module) -> torch.nn.Module:
    """A tree of modules of its own whose parameters and buffers are the original's."""
    clone = copy.copy(module)
    children = module._modules.items()
    clone._modules = {name: None if child is None else clone_structure(child) for name, child in children}
    clone._parameters = dict(module._parameters)
    clone._buffers = dict(module._buffers)
    clone._forward_hooks, clone._forward_pre_hooks = OrderedDict(), OrderedDict()
    return clone


def emptied(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of a loaded model whose weights wait for their content again; the model stays as it is."""
    clone = cast(PreTrainedModel, clone_structure(model))
    for module in clone.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = torch.nn.Parameter(parameter.to("meta"), requires_grad=False)
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                module._buffers[name] = buffer.to("meta")
    return clone


class Weights:
    """The files of a model, by the names that its modules have."""

    def __init__(self, model: PreTrainedModel, files: TensorFiles) -> None:
        self.files = files
        self.names = StoredNames(model, files.names(), str(files.folder))
        self.tied = self._tie(model)

    def stored(self, name: str) -> str:
        """The name in the files of a parameter, a layer, or a part of a packed layer."""
        return self.files.stored(self.names.stored(name))

    def _tie(self, model: PreTrainedModel) -> Mapping[str, str]:
        """Parameters that are another one, by name, as transformers has it when it loads.

        Of two that the config ties the one that is stored counts, and both where they are stored and differ: those are
        untied in the model as well.
        """
        tied: dict[str, str] = {}
        for name, source in dict(getattr(model, "all_tied_weights_keys", None) or {}).items():
            own, shared = self.stored(name), self.stored(source)
            if own in self.files and shared in self.files and not self.files.equal(own, shared):
                model.all_tied_weights_keys.pop(name)
                put(model, name, torch.empty_like(model.get_parameter(name)))
            elif own in self.files and shared not in self.files:
                tied[source] = name
            else:
                tied[name] = source
        return tied

    def check_shapes(self, model: PreTrainedModel) -> None:
        """QuasarError where a stored tensor has another shape than in the model; from the files' headers alone."""
        for name, tensor in waiting(model):
            stored = self.stored(name)
            if stored in self.files:
                self.files.check_shape(stored, tuple(tensor.shape))

    def missing(self, model: PreTrainedModel) -> list[str]:
        """Parameters and stored buffers that the files do not hold under their name."""
        names = [name for name, _ in waiting(model)]
        return [name for name in names if name not in self.tied and self.stored(name) not in self.files]

    def fill(self, module: torch.nn.Module, prefix: str, device: torch.device) -> None:
        """Put the module's weights in, and move what it holds already; on the CPU the files stay memory-mapped.

        `prefix` is the module's name in the model and a dot, or nothing. QuasarError where a tensor is missing or of
        another shape.
        """
        empty = {prefix + name: tensor for name, tensor in waiting(module)}
        places = {self.stored(name): name for name in empty if name not in self.tied}
        absent = [stored for stored in places if stored not in self.files]
        if absent:
            raise QuasarError(f"{self.files.folder} holds no tensor {absent[0]}.")
        for stored, name in places.items():
            self.files.check_shape(stored, tuple(empty[name].shape))
        for stored, tensor in self.files.load_many(list(places)):
            name = places[stored]
            put(module, name.removeprefix(prefix), tensor.to(device, empty[name].dtype))
        for name, source in self.tied.items():
            if name in empty:
                put(module, name.removeprefix(prefix), module.get_parameter(source.removeprefix(prefix)))
        _move(module, device)


def waiting(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and buffers that have no content yet, by their name within the module."""
    for tensors in (module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False)):
        yield from ((name, tensor) for name, tensor in tensors if tensor.is_meta)


def put(module: torch.nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Set a parameter or buffer, in this module alone."""
    parent, _, last = name.rpartition(".")
    owner = module.get_submodule(parent)
    if last in owner._buffers:
        owner._buffers[last] = tensor
    elif isinstance(tensor, torch.nn.Parameter):
        owner._parameters[last] = tensor
    else:
        owner._parameters[last] = torch.nn.Parameter(tensor, requires_grad=False)


def _move(module: torch.nn.Module, device: torch.device) -> None:
    """Bring what has content to the device; what is still waiting stays where it is."""
    for owner in module.modules():
        for name, buffer in owner._buffers.items():
            if buffer is not None and not buffer.is_meta:
                owner._buffers[name] = buffer.to(device)
        for name, parameter in owner._parameters.items():
            if parameter is not None and not parameter.is_meta and parameter.device != device:
                owner._parameters[name] = torch.nn.Parameter(parameter.data.to(device), requires_grad=False)


def _compute_buffers(model: PreTrainedModel) -> None:
    """Buffers such as rotary frequencies are computed from the config; transformers does so when it sets weights up."""
    for name, module in list(model.named_modules()):
        own = {key: buffer for key, buffer in module._buffers.items() if buffer is not None and buffer.is_meta}
        computed = [key for key in own if key in module._non_persistent_buffers_set]
        for key in computed:
            # Not a number until it is computed, so that nothing is left unnoticed.
            fill = float("nan") if own[key].is_floating_point() else 0
            module._buffers[key] = torch.full_like(own[key], fill, device="cpu")
        if computed:
            with torch.no_grad():
                model._init_weights(module)
        for key in computed:
            if not bool(torch.isfinite(cast(torch.Tensor, module._buffers[key])).all()):
                raise QuasarError(f"{type(model).__name__} has a buffer {name}.{key} that its config does not give.")


def _pangu_as_llama(content: dict[str, Any]) -> LlamaConfig:
    known = {key: value for key, value in content.items() if key not in ("model_type", "architectures", "auto_map")}
    return LlamaConfig(**known, attention_bias=bool(content.get("bias")), architectures=["LlamaForCausalLM"])
