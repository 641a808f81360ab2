"""Whether a verifier that somebody else made belongs to a target: by fingerprint where it has one, else by content.

A verifier of another model would not spoil the exact mode, since the target confirms every token; it would be slow
there, and wrong in the mode in which the verifier decides.
"""

from collections.abc import Container
from pathlib import Path

import torch

from quasar_core.checkpoint.headers import StoredLayer, stored_layers
from quasar_core.checkpoint.reader import TensorFiles, VerifierCheckpoint
from quasar_core.errors import QuasarError
from quasar_core.store.fingerprint import fingerprint
from quasar_core.store.model_config import read_config
from quasar_core.store.safetensors_header import read_headers

SAMPLE = 4096  # values of a tensor that are compared
# Values are stored in 16 bits of either kind; codes of 2 bits still lie so near to what they stand for.
ROUNDING, LEAST_COSINE = 2.0**-6, 0.7


def refuse_other_target(checkpoint: VerifierCheckpoint, target: Path) -> None:
    """Refuse, with a reason, a verifier that was not made from the model in `target`, or that cannot be read."""
    folder = checkpoint.folder
    if "quantization_config" in read_config(target):
        raise QuasarError(f"{target} is quantized itself; name the model that {folder} was made from.")
    layers = stored_layers(checkpoint)
    if not layers:
        raise QuasarError(f"{folder} holds no quantized layer.")
    made_from = checkpoint.target_fingerprint
    if made_from is not None and made_from != fingerprint(target):
        raise QuasarError(f"{folder} was not made from {target}: their fingerprints differ.")
    _refuse_shapes(layers, target, folder)
    if made_from is None:
        own = TensorFiles(target)
        _refuse_plain(checkpoint, own)
        _refuse_codes(checkpoint, layers, own)


def _refuse_shapes(layers: list[StoredLayer], target: Path, folder: Path) -> None:
    """Every quantized layer must be one of the target's, of its size."""
    shapes = {entry.name: entry.shape for entry in read_headers(target)}
    for layer in layers:
        shape = shapes.get(_weight_name(layer.name, shapes))
        if shape is None:
            raise QuasarError(f"{folder} was not made from {target}: that model has no layer {layer.name}.")
        if shape != (layer.out_features, layer.in_features):
            raise QuasarError(
                f"{folder} was not made from {target}: {layer.name} has {layer.in_features} inputs and "
                f"{layer.out_features} outputs, and {shape[-1]} and {shape[0]} in that model."
            )


def _refuse_plain(checkpoint: VerifierCheckpoint, own: TensorFiles) -> None:
    """Tensors that were not quantized are the target's, but for norms that took up a smoothing."""
    for name in checkpoint.plain_names:
        if name not in own or (checkpoint.own_norms and "norm" in name):
            continue
        stored, expected = checkpoint.tensors.load(name), own.load(name)
        if stored.shape != expected.shape or not _same(_sample(stored), _sample(expected)):
            raise QuasarError(
                f"{checkpoint.folder} was not made from {own.folder}: their {name}, which was not quantized, differ."
            )


def _refuse_codes(checkpoint: VerifierCheckpoint, layers: list[StoredLayer], own: TensorFiles) -> None:
    """Codes stand for the target's weights; smoothed ones do not."""
    if checkpoint.own_norms:
        return
    for layer in {layers[0], layers[-1]}:
        expected = own.load(_weight_name(layer.name, own)).float()
        codes = checkpoint.layer(layer.name).dequantize(torch.float32)
        cosine = float(torch.nn.functional.cosine_similarity(codes.flatten(), expected.flatten(), dim=0))
        if not cosine >= LEAST_COSINE:
            raise QuasarError(
                f"{checkpoint.folder} was not made from {own.folder}: the codes of {layer.name} do not stand for the "
                f"weights there (cosine {cosine:.2f})."
            )


def _weight_name(layer: str, names: Container[str] | TensorFiles) -> str:
    """The target's tensor behind a layer; a head that is the embedding is stored under the embedding's name."""
    name = f"{layer}.weight"
    return "model.embed_tokens.weight" if layer == "lm_head" and name not in names else name


def _sample(tensor: torch.Tensor) -> torch.Tensor:
    """Values from the tensor's middle, in float32."""
    flat = tensor.flatten()
    start = max(0, (len(flat) - SAMPLE) // 2)
    return flat[start : start + SAMPLE].float()


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """But for the rounding of another dtype."""
    least = 1e-3 * float(other.abs().max()) if len(other) else 0.0
    return torch.allclose(one, other, rtol=ROUNDING, atol=least)
