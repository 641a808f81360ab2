"""A model of which one part at a time is in memory: its blocks one by one, its ends, or all of it memory-mapped."""

import copy
from pathlib import Path
from typing import cast

import torch
from transformers import PreTrainedModel

from quasar_core.checkpoint.gptq_format import why_not_packable
from quasar_core.checkpoint.reader import VerifierCheckpoint
from quasar_core.checkpoint.tensor_files import TensorFiles
from quasar_core.errors import QuasarError
from quasar_core.kernels.linear import PackedLinear
from quasar_core.models.hf.causal_lm import load_target
from quasar_core.models.hf.experts import separate_experts
from quasar_core.models.hf.skeleton import Weights, build_skeleton, clone_structure, emptied, read_model_config
from quasar_core.quantize.layer_plan import HEAD, LayerPlan, is_kept
from quasar_core.store.model_config import read_config


def find_blocks(model: PreTrainedModel) -> tuple[str, torch.nn.ModuleList]:
    """The list of decoder blocks and its name, such as `model.layers`; a vision tower has another of its own."""
    count = model.config.get_text_config().num_hidden_layers
    inside = set(map(id, model.get_decoder().modules()))
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, torch.nn.ModuleList)]
    for name, module in lists:
        if len(module) == count and id(module) in inside:
            return name, module
    raise QuasarError(f"No list of {count} decoder blocks was found in {type(model).__name__}.")


def find_head(model: PreTrainedModel) -> tuple[torch.nn.Module, torch.nn.Linear]:
    """The final norm and the head that reads it."""
    norm, head = getattr(model.base_model, "norm", None), getattr(model, "lm_head", None)
    norm = getattr(model.base_model, "embedding_norm", norm)  # LFM2's
    if norm is None or not isinstance(head, torch.nn.Linear):
        raise QuasarError(f"--lm-head-bits: {type(model).__name__} has no final norm and lm_head to quantize.")
    return norm, head


def linear_layers(module: torch.nn.Module) -> dict[str, torch.nn.Linear]:
    """The linear layers inside a module that get codes, by their name within it."""
    found = {name: child for name, child in module.named_modules() if isinstance(child, torch.nn.Linear)}
    return {name: linear for name, linear in found.items() if not is_kept(name)}


def quantized_layers(model: PreTrainedModel, plan: LayerPlan) -> dict[str, torch.nn.Linear]:
    """Every layer that gets codes, by full name; refused, before any work, where the format cannot hold one."""
    prefix, blocks = find_blocks(model)
    layers = {f"{prefix}.{name}": linear for name, linear in linear_layers(blocks).items()}
    head = {HEAD: find_head(model)[1]} if plan.quantizes_head else {}
    if not layers:
        raise QuasarError(f"{type(model).__name__} has no linear layers in its blocks: there is nothing to quantize.")
    for name, parameter in blocks.named_parameters():
        if parameter.dim() == 3 and min(parameter.shape) > 1:
            raise QuasarError(f"{prefix}.{name} holds experts in a form that this version does not quantize.")
    layers |= head
    for name, linear in layers.items():
        obstacle = why_not_packable(linear.in_features, linear.out_features, plan.solver(name).bits)
        if obstacle:
            raise QuasarError(f"Layer {name} cannot be packed: {obstacle}.")
    return layers


class StreamedModel:
    """Implements `layerwise.Blocks`. `whole_because` says why the model is in memory after all, where it is."""

    def __init__(
        self,
        skeleton: PreTrainedModel,
        files: TensorFiles,
        device: torch.device,
        *,
        checkpoint: VerifierCheckpoint | None = None,
        kernel: str = "dense",
        whole_because: str | None = None,
    ) -> None:
        self.skeleton, self.device, self.whole_because = skeleton, device, whole_because
        self.weights = Weights(skeleton, files)
        self.prefix, self._blocks = find_blocks(skeleton)
        self.count = len(self._blocks)
        self._checkpoint, self._kernel = checkpoint, kernel
        own = self.weights.names.of_layer
        self._packed = {own(name): name for name in checkpoint.layer_names} if checkpoint else {}

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the forward pass."""
        return self.skeleton.dtype

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding."""
        return int(self.skeleton.config.get_text_config().vocab_size)

    def stored(self, name: str) -> str:
        """Return the name that the model's files have for a layer or tensor."""
        return self.weights.stored(name)

    def block(self, index: int) -> torch.nn.Module:
        """One block on the device, to be changed at will."""
        block = copy.deepcopy(self._blocks[index])
        self._fill(block, f"{self.prefix}.{index}.", self.device)
        return block

    def ends(self, device: torch.device | None = None) -> PreTrainedModel:
        """Embedding, final norm and head, on the model's device or another one; the blocks stay empty."""
        model = cast(PreTrainedModel, clone_structure(self.skeleton))
        parent, _, name = self.prefix.rpartition(".")
        owner = model.get_submodule(parent)
        blocks, owner._modules[name] = owner._modules[name], torch.nn.ModuleList()
        self._fill(model, "", device or self.device)
        owner._modules[name] = blocks
        return model

    def whole(self, device: torch.device | None = None) -> PreTrainedModel:
        """All of the model; on the CPU in its stored dtype it stays in the files, whose pages the system may drop."""
        model = cast(PreTrainedModel, clone_structure(self.skeleton))
        self._fill(model, "", device or self.device)
        return model

    def _fill(self, module: torch.nn.Module, prefix: str, device: torch.device) -> None:
        for name, linear in list(module.named_modules()):
            stored = self._packed.get(prefix + name)
            if stored is not None and self._checkpoint is not None and isinstance(linear, torch.nn.Linear):
                weight = self._checkpoint.layer(stored)
                packed = PackedLinear.build(weight, linear.bias, device, self.dtype, self._kernel)
                parent, _, last = name.rpartition(".")
                setattr(module.get_submodule(parent), last, packed)
        self.weights.fill(module, prefix, device)


def open_target(
    folder: Path, device: torch.device, dtype: torch.dtype, trust_remote_code: bool = False
) -> StreamedModel:
    """The model of a folder, nothing of it read yet; one that transformers cannot build so is loaded as a whole."""
    files = TensorFiles(folder)
    own_code = trust_remote_code and "auto_map" in read_config(folder)
    if not own_code:
        skeleton = build_skeleton(read_model_config(folder), dtype)
        weights = Weights(skeleton, files)
        weights.check_shapes(skeleton)
        missing = weights.missing(skeleton)
        if not missing:
            return StreamedModel(skeleton, files, device)
    reason = "it runs code of its own" if own_code else f"its files name {missing[0]} otherwise"
    loaded = load_target(folder, torch.device("cpu"), dtype, trust_remote_code).model
    separate_experts(loaded)
    return StreamedModel(loaded, files, device, whole_because=reason)


def open_verifier(checkpoint: VerifierCheckpoint, target: StreamedModel, kernel: str = "dense") -> StreamedModel:
    """The verifier as its checkpoint was written, its products on one kind of kernel; nothing of it is read yet."""
    if target.whole_because:  # as code of its own builds it
        skeleton = emptied(target.skeleton)
    else:
        skeleton = build_skeleton(read_model_config(checkpoint.folder), target.dtype)
    return StreamedModel(skeleton, checkpoint.tensors, target.device, checkpoint=checkpoint, kernel=kernel)
