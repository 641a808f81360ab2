"""Bring a model of the architecture table from its files to the device, each weight once.

A tensor is allocated first, fused ones whole, and then filled from the memory-mapped files, so that no weight is held
twice. A verifier takes from its target all that it does not hold in codes. `why_folder_not_lean`, `check_whole` and
`check_fits` tell from the files alone whether that will do.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from quasar_core.checkpoint.headers import StoredLayer
from quasar_core.checkpoint.reader import VerifierCheckpoint
from quasar_core.checkpoint.tensor_files import TensorFiles
from quasar_core.errors import QuasarError
from quasar_core.models.architectures.row import BlockNorms
from quasar_core.models.config.decoder import DecoderConfig, why_not_lean
from quasar_core.models.decoder.experts import BesideMlp, Experts
from quasar_core.models.decoder.layer import DecoderLayer, DenseLinear, LayerInputs, Linear
from quasar_core.models.decoder.lean_decoder import LeanDecoder
from quasar_core.models.decoder.linear import (
    Dense,
    Packing,
    Product,
    beside_shapes,
    block_products,
    dense_only,
    dense_rows,
    head_norm_shapes,
    head_product,
    inputs_product,
    mixture_products,
    recurrent_shapes,
    router_correction,
    stored_shapes,
)
from quasar_core.models.recurrent.rules import Recurrence
from quasar_core.models.rope import RopeTables
from quasar_core.models.weights.compressed_files import CompressedCopy
from quasar_core.models.weights.device_queues import Link
from quasar_core.models.weights.device_stream import DeviceWeights
from quasar_core.models.weights.filling import EMBEDDING, HEAD, Filling, has_no_effect
from quasar_core.models.weights.streaming import Products, StreamedWeights
from quasar_core.records import Progress, no_progress
from quasar_core.store.model_config import read_text_config

NOTHING: Products = MappingProxyType({})

__all__ = ["attach_verifier", "build_target", "load_target", "load_verifier_alone", "why_not_lean"]


def load_target(
    folder: Path,
    device: torch.device,
    dtype: torch.dtype,
    progress: Progress = no_progress,
    streamed: Products = NOTHING,
    kept: Products = NOTHING,
    copy: CompressedCopy | None = None,
    link: Link | None = None,
    sparing: bool = False,
) -> LeanDecoder:
    """The model of a folder, from safetensors only; QuasarError where `why_not_lean` has a reason."""
    config = DecoderConfig.parse(read_text_config(folder))
    return build_target(config, TensorFiles(folder), device, dtype, progress, streamed, kept, copy, link, sparing)


def build_target(
    config: DecoderConfig,
    files: TensorFiles,
    device: torch.device,
    dtype: torch.dtype,
    progress: Progress = no_progress,
    streamed: Products = NOTHING,
    kept: Products = NOTHING,
    copy: CompressedCopy | None = None,
    link: Link | None = None,
    sparing: bool = False,
) -> LeanDecoder:
    """The model of a config, from these files; QuasarError where a tensor is missing or of another shape.

    Of the `streamed` products of blocks nothing stays in memory but their biases. With a `copy` in 12 bits they come
    from there, and so do those that are `kept`. Over a `link` they come to a device from main memory. Where blocks are
    streamed, or `sparing` memory is asked for, nothing of the files stays in the system's memory.
    """
    config = tied_as_stored(config, files)
    if link is None:
        weights = StreamedWeights(files, streamed, dtype, kept, copy)
    else:
        weights = DeviceWeights(files, streamed, dtype, device, link)
    filling = Filling(files, device, dtype, config, weights.places)
    decoder = _build(config, filling, dense_only)
    filling.refuse_unknown(config, [name for name in files.names() if name not in weights.names])
    filling.fill(progress, weights if (streamed or sparing) and link is None else None)
    weights.read_kept(progress)
    if streamed:
        decoder.source = weights.stream(config.num_layers)
    return decoder


def tied_as_stored(config: DecoderConfig, files: TensorFiles) -> DecoderConfig:
    """Head and embedding are one where the config says so, and apart where the files hold two that differ.

    So it is in transformers, with a warning.
    """
    names = EMBEDDING, f"{HEAD}.weight"
    if config.tied and all(name in files for name in names) and not files.equal(*names):
        return replace(config, tied=False)
    return config


def load_verifier_alone(
    checkpoint: VerifierCheckpoint,
    device: torch.device,
    dtype: torch.dtype,
    kernel: str = "auto",
    progress: Progress = no_progress,
) -> LeanDecoder:
    """The verifier without its target: what it does not hold in codes comes from the checkpoint too."""
    config = tied_as_stored(DecoderConfig.parse(checkpoint.config), checkpoint.tensors)
    packing = Packing(checkpoint, device, dtype, kernel, progress)
    packing.refuse_unknown(config)
    filling = Filling(checkpoint.tensors, device, dtype, config)
    decoder = _build(config, filling, packing)
    biases = {
        f"{part}.bias" for name in packing.names for part in checkpoint.parts(name)
    }  # which some tools store where the architecture has none
    filling.refuse_unknown(config, [name for name in checkpoint.plain_names if name not in biases])
    filling.fill(progress)
    return decoder


def attach_verifier(
    target: LeanDecoder, checkpoint: VerifierCheckpoint, kernel: str = "auto", progress: Progress = no_progress
) -> LeanDecoder:
    """The verifier over the target's own embedding, norms and head, which are held once."""
    packing = Packing(checkpoint, target.device, target.dtype, kernel, progress)
    packing.refuse_unknown(target.config)

    def attached(product: Product, own: Linear) -> Linear:
        return packing(product, lambda part: dense_rows(own, product, part))

    def attached_layer(index: int, layer: DecoderLayer) -> DecoderLayer:
        fields = block_products(target.config, index)
        products: dict[str, Any] = {name: attached(fields[name], getattr(layer, name)) for name in fields}
        prefix = f"model.layers.{index}"
        norms: dict[str, Any] = {
            field: packing.norm(f"{prefix}.{name}.weight", getattr(layer, field), target.config.centred_norms)
            for field, name in norm_fields(target.config.norms).items()
        }
        return replace(
            layer, **norms, **products, experts=attach_experts(target.config, index, layer.experts, attached)
        )

    layers = [attached_layer(index, layer) for index, layer in enumerate(target.layers)]
    head = attached(head_product(target.config), target.head)
    return LeanDecoder(target.config, target.embedding, layers, target.norm, head, target.ropes, target.inputs)


def attach_experts(
    config: DecoderConfig, index: int, own: Experts | None, attached: Callable[[Product, Linear], Linear]
) -> Experts | None:
    """A verifier's experts over the target's own; its router is the target's."""
    products = mixture_products(config, index)
    if own is None or products is None:
        return None
    return replace(
        own,
        gate_up=tuple(map(attached, products.gate_up, own.gate_up)),
        down=tuple(map(attached, products.down, own.down)),
    )


def norm_fields(norms: BlockNorms) -> dict[str, str]:
    """The names in the files of the norms that a block has, by their field in `DecoderLayer`."""
    fields = {
        "input_norm": norms.before_attention,
        "out_norm": norms.behind_attention,
        "mlp_norm": norms.before_mlp,
        "down_norm": norms.behind_mlp,
    }
    return {field: name for field, name in fields.items() if name}


def _build(config: DecoderConfig, filling: Filling, make: Callable[[Product, Dense], Linear]) -> LeanDecoder:
    """The decoder, its tensors allocated and not yet filled."""
    shared = config.tied and EMBEDDING not in filling.files  # by the head's name alone, as transformers 4 wrote many
    embedding = filling.tensor([f"{HEAD}.weight" if shared else EMBEDDING], [config.vocab_size], config.hidden_size)
    layers = [build_layer(config, index, filling, make) for index in range(config.num_layers)]
    norm = filling.last_norm(f"model.{config.names.last_norm}.weight", config.hidden_size)
    own_head: Dense = (lambda _: DenseLinear(embedding)) if config.tied else filling.linear
    head = make(head_product(config), own_head)
    ropes = [RopeTables(rope, filling.device, filling.dtype) for rope in config.ropes]
    return LeanDecoder(config, embedding, layers, norm, head, ropes, _build_inputs(config, filling))


def _build_inputs(config: DecoderConfig, filling: Filling) -> LayerInputs | None:
    """The inputs that each block has of its own, in 16 or 32 bits."""
    if not config.inputs_size:
        return None
    size = config.num_layers * config.inputs_size
    return LayerInputs(
        filling.tensor(["model.embed_tokens_per_layer.weight"], [config.inputs_vocab], size),
        filling.linear(inputs_product(config)),
        filling.norm("model.per_layer_projection_norm.weight", config.inputs_size),
        torch.tensor(config.inputs_size**0.5, dtype=filling.dtype).item(),
    )


def build_layer(
    config: DecoderConfig, index: int, filling: Filling, make: Callable[[Product, Dense], Linear]
) -> DecoderLayer:
    """A block, its tensors allocated and not yet filled."""
    block, norms = config.blocks[index], dict[str, Any]()
    prefix = f"model.layers.{index}"
    for field in ("input_norm", "out_norm", "mlp_norm", "down_norm"):
        name = norm_fields(config.norms).get(field)
        norms[field] = filling.norm(f"{prefix}.{name}.weight", config.hidden_size) if name else None
    if config.inputs_size:
        norms["input_out_norm"] = filling.norm(f"{prefix}.post_per_layer_input_norm.weight", config.hidden_size)
    products: dict[str, Any] = dict.fromkeys(("gate_up", "down")) | {
        field: make(product, filling.product) for field, product in block_products(config, index).items()
    }
    return DecoderLayer(
        shape=block,
        head_norms=_build_head_norms(config, index, filling),
        activation=filling.xielu(index) if config.activation == "xielu" else None,
        shares=block.states_of != index,
        experts=_build_experts(config, index, filling, make),
        scalar=filling.number(f"{prefix}.layer_scalar") if config.blocks_are_scaled else None,
        recurrence=_build_recurrence(config, index, filling),
        **norms,
        **products,
    )


def _build_head_norms(config: DecoderConfig, index: int, filling: Filling) -> torch.Tensor | None:
    """The weights of the norms of a block's queries and keys, ones where the files hold none."""
    block, names = config.blocks[index], list(head_norm_shapes(config, index))
    if config.head_norms is not None and not config.head_norms.weighted:
        return filling.ones(config.num_heads + block.kv_heads, block.head_size)
    times = (config.num_heads, block.kv_heads)[: len(names)]
    return filling.repeated_norms(names, times, block.head_size) if names else None


def _build_recurrence(config: DecoderConfig, index: int, filling: Filling) -> Recurrence | None:
    """The rule of a recurrent layer, its weights in float32 and by their last names in the files."""
    shape = config.blocks[index].recurrence
    if shape is None:
        return None
    prefix = f"model.layers.{index}.{config.recurrent_module}."
    stored = recurrent_shapes(config, index)
    parts = {name.removeprefix(prefix): filling.vector(name, *size) for name, size in stored.items() if len(size) == 1}
    conv = "conv" if shape.kind == "conv" else "conv1d"
    return Recurrence(
        shape,
        config.eps,
        taps=filling.taps(f"{prefix}{conv}.weight", shape.channels, shape.taps),
        bias=parts.get(f"{conv}.bias"),
        fading=parts.get("A_log"),
        step_bias=parts.get("dt_bias"),
        passed_by=parts.get("D"),
        norm=parts.get("norm.weight"),
    )


def _build_experts(
    config: DecoderConfig, index: int, filling: Filling, make: Callable[[Product, Dense], Linear]
) -> Experts | None:
    """A block's mixture: the target's experts lie in two tensors, a verifier's each by itself."""
    products, mixture = mixture_products(config, index), config.mixture
    if products is None or mixture is None:
        return None
    gate_up, down = (
        _build_linears(some[: mixture.count], filling, make)
        + [make(product, filling.linear) for product in some[mixture.count :]]
        for some in (products.gate_up, products.down)
    )
    correction = router_correction(config, index)
    return Experts(
        config=mixture,
        router=filling.linear(products.router).weight,
        correction=filling.floats(correction, mixture.count) if correction else None,
        gate_up=tuple(gate_up),
        down=tuple(down),
        shared_gate=filling.linear(products.shared_gate).weight if products.shared_gate else None,
        beside=_build_beside(config, index, filling),
    )


def _build_beside(config: DecoderConfig, index: int, filling: Filling) -> BesideMlp | None:
    """The norms and factors of a block's experts that stand beside an MLP."""
    shapes = beside_shapes(config, index)
    if not shapes:
        return None
    *norms, factors = shapes
    mlp_out_norm, norm, out_norm, router_scale = (filling.norm(name, config.hidden_size) for name in norms)
    return BesideMlp(mlp_out_norm, norm, out_norm, router_scale, filling.floats(factors, *shapes[factors]))


def _build_linears(
    products: Sequence[Product], filling: Filling, make: Callable[[Product, Dense], Linear]
) -> list[Linear]:
    if make is dense_only:
        return list(filling.rows_of(products))
    return [make(product, filling.linear) for product in products]


def why_folder_not_lean(folder: Path) -> str | None:
    """Why the lean decoder does not run the model of a folder, or None where it does."""
    content = read_text_config(folder)
    return why_not_lean(content) or _tensor_without_place(DecoderConfig.parse(content), TensorFiles(folder))


def _tensor_without_place(config: DecoderConfig, files: TensorFiles) -> str | None:
    """Files of other names, or with more than the architecture has, are transformers' to read.

    One under `model.` is a part of the architecture that the table does not know of: loading refuses it.
    """
    known = {*stored_shapes(config), f"{HEAD}.weight"}
    for name in files.names():
        if name not in known and not name.startswith("model.") and not has_no_effect(name, config):
            return f"its files hold {name}, which {config.architecture} does not have"
    return None


def check_whole(checkpoint: VerifierCheckpoint) -> None:
    """QuasarError that names the first tensor which the checkpoint's config promises and its files do not hold."""
    if why_not_lean(checkpoint.config):
        return  # transformers' own modules tell, when they are filled
    packed = {f"{name}.weight" for name in checkpoint.layer_names}
    for name in stored_shapes(DecoderConfig.parse(checkpoint.config)):
        if name not in packed and name not in checkpoint.tensors:
            raise QuasarError(f"{checkpoint.folder} is not whole: its config promises {name}, and its files lack it.")


def check_fits(checkpoint: VerifierCheckpoint, layers: Iterable[StoredLayer]) -> None:
    """QuasarError for a quantized layer that the model of the checkpoint's config has not, or has in another size."""
    if why_not_lean(checkpoint.config):
        return  # transformers' own modules tell, when they are built
    shapes = stored_shapes(replace(DecoderConfig.parse(checkpoint.config), tied=False))
    for layer in layers:
        expected = shapes.get(f"{layer.name}.weight")
        if expected is None:
            raise QuasarError(f"The model of {checkpoint.folder} has no layer {layer.name}, which is quantized there.")
        if expected != (layer.out_features, layer.in_features):
            raise QuasarError(
                f"Layer {layer.name} of {checkpoint.folder} is {(layer.out_features, layer.in_features)}, and by its "
                f"config {expected}."
            )
