"""Run any causal language model through transformers: slower than our own decoder, right for all of them."""

import inspect
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel

from quasar_core.checkpoint.reader import VerifierCheckpoint
from quasar_core.checkpoint.tensor_files import TensorFiles
from quasar_core.errors import QuasarError, foreign_errors
from quasar_core.foreign_bars import hidden_bars
from quasar_core.kernels.linear import PackedLinear
from quasar_core.kernels.threads import steered
from quasar_core.models.base import CausalLM
from quasar_core.models.decoder.two_tables import PIECE
from quasar_core.models.hf.cache import (
    PreallocatedCache,
    RecurrentCache,
    TwoTableCache,
    cache_argument,
    recurrent_layers,
)
from quasar_core.models.hf.experts import separate_experts
from quasar_core.models.hf.rope import TextRope
from quasar_core.models.hf.skeleton import Weights, build_empty, build_skeleton, clone_structure, read_model_config
from quasar_core.models.hf.stored_names import StoredNames
from quasar_core.records import Progress, no_progress
from quasar_core.store.model_config import read_config
from quasar_core.store.text_part import has_text_part, key_mapping

AnyCache = PreallocatedCache | TwoTableCache | RecurrentCache


class TransformersLM(CausalLM):
    """A transformers model in evaluation mode."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model.eval()
        # Recurrent layers are passed as transformers passes them, so its own rotations are right.
        self.rope = None if recurrent_layers(model.config) else TextRope.of(model)
        self.left_out: list[str] = []  # tensors of the files that the model has no place for
        known = inspect.signature(type(model).forward).parameters
        self._cache_argument = cache_argument(type(model))
        self._keeps_last = "logits_to_keep" in known
        self._takes_positions = "position_ids" in known and _counts_positions(model)

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

    def new_cache(self, capacity: int) -> AnyCache:
        """A cache for this model, and for any copy of it; what must be computed anew in it, this model computes."""
        if recurrent_layers(self.model.config):
            return RecurrentCache(self.model.config, capacity)
        layers = self.model.config.get_text_config().num_hidden_layers
        if self.rope is None:
            return PreallocatedCache(layers, capacity)
        if not self.rope.recomputes:
            return PreallocatedCache(layers, capacity, self.rope.limit)
        cache = TwoTableCache(layers, capacity, self.rope.limit)
        cache.writer = self
        return cache

    @steered
    @torch.inference_mode()
    def forward(self, tokens: Sequence[int], cache: AnyCache, last_only: bool = False) -> torch.Tensor:
        """One pass of T tokens → float32 logits [T, V] ([1, V] with `last_only`)."""
        cache.make_room(len(tokens))
        if self.rope is None:
            assert not isinstance(cache, TwoTableCache)
            return self._pass(tokens, cache, last_only)
        assert not isinstance(cache, RecurrentCache)
        start = cache.length
        logits = [
            self._pass_within(self.rope, tokens[begin - start : end - start], cache, length, last_only)
            for begin, end, length in self.rope.runs(start, start + len(tokens), cache.prompt_length)
        ]
        return logits[-1] if last_only else torch.cat(logits)

    def _pass_within(
        self,
        rope: TextRope,
        tokens: Sequence[int],
        cache: PreallocatedCache | TwoTableCache,
        text_length: int,
        last_only: bool,
    ) -> torch.Tensor:
        """A pass of tokens that are all rotated as a text of one length has it."""
        with rope.held(text_length):
            if isinstance(cache, PreallocatedCache):
                return self._pass(tokens, cache, last_only)
            buffer = cache.buffer_for(text_length)
            if buffer.length < cache.length:
                cache.writer.write_again(cache, buffer, text_length)
            logits = self._pass(tokens, buffer, last_only)
        cache.tokens += tokens
        return logits

    def write_again(self, cache: TwoTableCache, buffer: PreallocatedCache, text_length: int) -> None:
        """Bring a buffer up to the text, as a text of that length has it."""
        assert self.rope is not None
        with self.rope.held(text_length):
            while buffer.length < cache.length:
                piece = cache.tokens[buffer.length : buffer.length + PIECE]
                self._pass(piece, buffer, last_only=True)

    def _pass(self, tokens: Sequence[int], cache: PreallocatedCache | RecurrentCache, last_only: bool) -> torch.Tensor:
        ids = torch.tensor([list(tokens)], device=self.device)
        options: dict[str, Any] = {self._cache_argument: cache}
        if self._keeps_last:
            options["logits_to_keep"] = int(last_only)
        if self._takes_positions:
            options["position_ids"] = self._positions(cache, len(tokens))
        # A config may be one that transformers builds and cannot run, or a class may want a cache of its own.
        with foreign_errors(f"transformers could not run this {self.model.config.model_type} model"):
            logits = self.model(input_ids=ids, use_cache=True, **options).logits[0]
        return logits[-1:].float() if last_only else logits.float()  # type: ignore[no-any-return]

    def _positions(self, cache: PreallocatedCache | RecurrentCache, count: int) -> torch.Tensor:
        """Where the tokens of a pass stand [1, T]: some classes count from elsewhere, or from 0 in each pass."""
        start = cache.length - count if isinstance(cache, RecurrentCache) else cache.length
        return torch.arange(start, start + count, device=self.device)[None]


def _counts_positions(model: PreTrainedModel) -> bool:
    """Whether transformers' `generate` numbers the tokens from 0 on, and no class does it in a way of its own."""
    name = "_prepare_position_ids_for_generation"
    same = getattr(type(model), name, None) is getattr(GenerationMixin, name, None)
    return same and not model.config.is_encoder_decoder


def load_target(
    folder: Path, device: torch.device, dtype: torch.dtype, trust_remote_code: bool = False
) -> TransformersLM:
    """The model of a folder, from safetensors only."""
    if TensorFiles(folder).dequantized:
        raise QuasarError(
            f"The weights in {folder} are stored in 8-bit floats, with which transformers would compute: name "
            "a copy of this model in bfloat16."
        )
    if not (trust_remote_code and "auto_map" in read_config(folder)):
        _check_sizes(folder, dtype)
    with hidden_bars(), foreign_errors(f"The model in {folder} could not be loaded"):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            local_files_only=True,
            output_loading_info=True,
            **_text_part_alone(folder),
        )
    model, found = loaded
    if found["missing_keys"]:  # transformers would go on with random values
        raise QuasarError(f"{folder} holds no tensor {min(found['missing_keys'])}.")
    target = TransformersLM(model.to(device))
    target.left_out = sorted(found["unexpected_keys"])
    return target


def _text_part_alone(folder: Path) -> dict[str, Any]:
    """What has transformers load the text part of a multimodal model; nothing for a text model."""
    if not has_text_part(read_config(folder)):
        return {}
    return {"config": read_model_config(folder), "key_mapping": key_mapping()}


def _check_sizes(folder: Path, dtype: torch.dtype) -> None:
    """QuasarError where the config gives a tensor another size than the files do, before any of it is allocated."""
    model, files = build_empty(read_model_config(folder), dtype), TensorFiles(folder)
    names = StoredNames(model, files.names(), str(folder))
    for name, tensor in model.named_parameters():
        stored = names.stored(name)
        if stored in files and math.prod(files.shape(stored)) != tensor.numel():  # some are stored transposed
            files.check_shape(stored, tuple(tensor.shape))


def attach_verifier(
    target: TransformersLM, checkpoint: VerifierCheckpoint, kernel: str = "auto", progress: Progress = no_progress
) -> TransformersLM:
    """The verifier over the target's own embedding, norms and head, which are held once.

    Every module of the verifier is the target's, apart from the linear layers whose codes the checkpoint holds, and
    from norms that took up their smoothing.
    """
    model = cast(PreTrainedModel, clone_structure(target.model))
    if any(".experts." in name for name in checkpoint.layer_names):
        separate_experts(model)  # the target's own stay together
    names = StoredNames(model, checkpoint.layer_names, str(checkpoint.folder))
    _pack_layers(model, names, checkpoint, target.device, target.model.dtype, kernel, progress)
    if checkpoint.own_norms:
        _replace_norms(model, names, checkpoint)
    return TransformersLM(model)


def load_verifier_alone(
    checkpoint: VerifierCheckpoint,
    device: torch.device,
    dtype: torch.dtype,
    kernel: str = "auto",
    progress: Progress = no_progress,
) -> TransformersLM:
    """The verifier without its target: its own embedding and norms come from the checkpoint."""
    model = build_skeleton(read_model_config(checkpoint.folder), dtype)
    weights = Weights(model, checkpoint.tensors)
    weights.check_shapes(model)
    _pack_layers(model, weights.names, checkpoint, device, dtype, kernel, progress)
    plain = set(checkpoint.plain_names)
    wrong = [*weights.missing(model), *(name for name in weights.names.unknown if name in plain)]
    if wrong:
        raise QuasarError(f"{checkpoint.folder} does not hold the model of its config: {wrong[0]}.")
    weights.fill(model, "", device)
    return TransformersLM(model)


def _pack_layers(
    model: torch.nn.Module,
    names: StoredNames,
    checkpoint: VerifierCheckpoint,
    device: torch.device,
    dtype: torch.dtype,
    kernel: str,
    progress: Progress,
) -> None:
    for name in checkpoint.layer_names:
        linear = _linear_named(model, names.of_layer(name), name, checkpoint)
        weight = checkpoint.layer(name)
        shape = (weight.out_features, weight.in_features)
        if (linear.out_features, linear.in_features) != shape:
            raise QuasarError(f"Layer {name} of {checkpoint.folder} is {shape}, and the target's is not.")
        parent, _, child = names.of_layer(name).rpartition(".")
        bias = _bias(linear, f"{name}.bias", checkpoint)
        packed = PackedLinear.build(weight, bias, device, dtype, kernel, progress)
        setattr(model.get_submodule(parent), child, packed)


def _bias(linear: torch.nn.Linear, name: str, checkpoint: VerifierCheckpoint) -> torch.Tensor | None:
    """The target's, or the checkpoint's own where smoothing may have changed it."""
    if linear.bias is None or not checkpoint.own_norms or name not in checkpoint.tensors:
        return linear.bias
    return checkpoint.tensors.load(name).to(linear.bias)


def _replace_norms(model: torch.nn.Module, names: StoredNames, checkpoint: VerifierCheckpoint) -> None:
    for name in checkpoint.plain_names:
        if name.endswith("norm.weight"):
            norm = model.get_submodule(names.of_layer(name.removesuffix(".weight")))
            stored = checkpoint.tensors.load(name).to(cast(torch.Tensor, norm.weight))
            norm._parameters["weight"] = torch.nn.Parameter(stored, requires_grad=False)


def _linear_named(model: torch.nn.Module, own: str, name: str, checkpoint: VerifierCheckpoint) -> torch.nn.Linear:
    try:
        linear = model.get_submodule(own)
    except AttributeError as error:
        raise QuasarError(f"The target has no layer {name}, which {checkpoint.folder} quantizes.") from error
    if not isinstance(linear, torch.nn.Linear):
        raise QuasarError(f"{checkpoint.folder} quantizes {name}, which is no linear layer of the target.")
    return linear
