"""Any causal language model through transformers: slower than a decoder of our own, right for all of them."""

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import cast

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.utils import logging

from quasar_core.checkpoint.reader import VerifierCheckpoint
from quasar_core.errors import QuasarError
from quasar_core.kernels.linear import PackedLinear
from quasar_core.models.kv_cache import PreallocatedCache


class TransformersLM:
    """Implements `models.base.CausalLM` over a transformers model in evaluation mode."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model.eval()

    @property
    def vocab_size(self) -> int:
        """Width of the logits."""
        return int(self.model.config.get_text_config().vocab_size)

    @property
    def device(self) -> torch.device:
        """Where the embedding lies."""
        return self.model.get_input_embeddings().weight.device  # type: ignore[no-any-return]

    @property
    def packed_layers(self) -> Iterator[PackedLinear]:
        """Linear layers on packed codes; none in a target."""
        return (module for module in self.model.modules() if isinstance(module, PackedLinear))

    def new_cache(self, capacity: int) -> PreallocatedCache:
        """A cache for this model, and for any copy of it."""
        return PreallocatedCache(self.model.config.get_text_config().num_hidden_layers, capacity)

    @torch.inference_mode()
    def forward(self, tokens: Sequence[int], cache: PreallocatedCache, last_only: bool = False) -> torch.Tensor:
        """One pass of T tokens → float32 logits [T, V] ([1, V] with `last_only`)."""
        cache.make_room(len(tokens))
        ids = torch.tensor([tokens], device=self.device)
        output = self.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1 if last_only else 0)
        return output.logits[0].float()  # type: ignore[no-any-return]


def load_target(
    folder: Path, device: torch.device, dtype: torch.dtype, trust_remote_code: bool = False
) -> TransformersLM:
    """The model of a folder, from safetensors only."""
    bar_was_shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # it would run beside our own
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, trust_remote_code=trust_remote_code, local_files_only=True
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise QuasarError(f"The model in {folder} could not be loaded: {_first_line(error)}") from error
    finally:
        if bar_was_shown:
            logging.enable_progress_bar()
    return TransformersLM(model.to(device))  # type: ignore[arg-type]


def attach_verifier(target: TransformersLM, checkpoint: VerifierCheckpoint, kernel: str = "auto") -> TransformersLM:
    """The verifier over the target's own embedding, norms and head, which are held once.

    Every module of the verifier is the target's, apart from the linear layers whose codes the checkpoint holds.
    """
    model = cast(PreTrainedModel, _clone_structure(target.model))
    _pack_layers(model, checkpoint, target.device, target.model.dtype, kernel)
    return TransformersLM(model)


def load_verifier_alone(
    checkpoint: VerifierCheckpoint, device: torch.device, dtype: torch.dtype, kernel: str = "auto"
) -> TransformersLM:
    """The verifier without its target: its own embedding and norms come from the checkpoint."""
    config = plain_config(checkpoint.folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    _pack_layers(model, checkpoint, device, dtype, kernel)
    tensors = {name: t.to(device, dtype) for name, t in checkpoint.tensors.load_many(checkpoint.plain_names)}
    _, unexpected = model.load_state_dict(tensors, strict=False, assign=True)
    model.tie_weights()
    _build_buffers(model, config, device)
    absent = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if absent or unexpected:
        raise QuasarError(f"{checkpoint.folder} does not hold the model of its config: {(absent or unexpected)[0]}.")
    return TransformersLM(model)


def plain_config(folder: Path) -> PretrainedConfig:
    """The architecture's config without its quantization section."""
    config: PretrainedConfig = AutoConfig.from_pretrained(folder, local_files_only=True)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def _clone_structure(module: torch.nn.Module) -> torch.nn.Module:
    """A tree of modules of its own whose parameters and buffers are the original's."""
    clone = copy.copy(module)
    children = module._modules.items()
    clone._modules = {name: None if child is None else _clone_structure(child) for name, child in children}
    clone._parameters = dict(module._parameters)
    clone._buffers = dict(module._buffers)
    return clone


def _pack_layers(
    model: torch.nn.Module, checkpoint: VerifierCheckpoint, device: torch.device, dtype: torch.dtype, kernel: str
) -> None:
    for name in checkpoint.layer_names:
        linear = _linear_named(model, name, checkpoint)
        weight = checkpoint.layer(name)
        shape = (weight.out_features, weight.in_features)
        if (linear.out_features, linear.in_features) != shape:
            raise QuasarError(f"Layer {name} of {checkpoint.folder} is {shape}, and the target's is not.")
        parent, _, child = name.rpartition(".")
        packed = PackedLinear.build(weight, linear.bias, device, dtype, kernel)
        setattr(model.get_submodule(parent), child, packed)


def _linear_named(model: torch.nn.Module, name: str, checkpoint: VerifierCheckpoint) -> torch.nn.Linear:
    try:
        linear = model.get_submodule(name)
    except AttributeError as error:
        raise QuasarError(f"The target has no layer {name}, which {checkpoint.folder} quantizes.") from error
    if not isinstance(linear, torch.nn.Linear):
        raise QuasarError(f"{checkpoint.folder} quantizes {name}, which is no linear layer of the target.")
    return linear


def _build_buffers(model: PreTrainedModel, config: PretrainedConfig, device: torch.device) -> None:
    """Rotary frequencies are computed from the config, not stored: build those that are still on the meta device."""
    for name, module in list(model.named_modules()):
        if any(buffer.is_meta for buffer in module._buffers.values() if buffer is not None):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, type(module)(config=config).to(device))


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
