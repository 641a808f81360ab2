"""A model of which one part at a time is in memory: its blocks one by one, its ends, or all of it memory-mapped."""

import copy
from pathlib import Path
from typing import cast

import torch
from transformers import PreTrainedModel

from quasar_core.checkpoint.reader import TensorFiles, VerifierCheckpoint
from quasar_core.kernels.linear import PackedLinear
from quasar_core.models.experts import separate_experts
from quasar_core.models.skeleton import Weights, build_skeleton, clone_structure, emptied, read_model_config
from quasar_core.models.transformers_lm import load_target
from quasar_core.quantize.blocks import find_blocks
from quasar_core.store.model_config import read_config


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
        """Of the passes."""
        return self.skeleton.dtype

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding."""
        return int(self.skeleton.config.get_text_config().vocab_size)

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
