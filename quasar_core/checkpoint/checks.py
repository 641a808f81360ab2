"""Check that a checkpoint's weights are those that were written, and that a verifier belongs to its target.

The weights are compared with the SHA-256 of each file, as `sha256sum` prints it: `ShardWriter` computes them while it
writes, and they lie in quasar.json under "sha256". A verifier that somebody else made belongs to a target by its
fingerprint where it has one, else by content. One of another model would not spoil the exact mode, since the target
confirms every token; it would be slow there, and wrong in the mode in which the verifier decides.
"""

import hashlib
from collections.abc import Container, Iterator
from operator import itemgetter
from pathlib import Path

import torch

from quasar_core.checkpoint.headers import StoredLayer, model_layers
from quasar_core.checkpoint.reader import VerifierCheckpoint
from quasar_core.checkpoint.tensor_files import TensorFiles
from quasar_core.errors import QuasarError
from quasar_core.records import Progress, no_progress
from quasar_core.store.fingerprint import fingerprint
from quasar_core.store.model_config import read_config
from quasar_core.store.safetensors_header import weight_files

KEY = "sha256"
NONE_RECORDED = "none is recorded in this checkpoint (another tool or an older quasar wrote it), so nothing was checked"
_CHUNK = 2**22  # bytes
SAMPLE = 4096  # values of a tensor that are compared
# Values are stored in 16 bits of either kind; codes of 2 bits still lie so near to what they stand for.
ROUNDING, LEAST_COSINE = 2.0**-6, 0.7
LARGEST_FACTOR, SHARE_SCALED = 1.5, 0.1  # by which the weights of a value may seem larger, and how many may be
VALUES, FIRST_NORM = ".self_attn.v_proj", "input_layernorm.weight"


def check_digest(checkpoint: VerifierCheckpoint, progress: Progress = no_progress) -> str:
    """Read all weights and compare them with what is recorded → what was found, in words.

    QuasarError that names the first file which differs, is missing, or is not recorded.
    """
    recorded = recorded_digests(checkpoint)
    if recorded is None:
        return NONE_RECORDED
    beside = checkpoint.folder.glob("*.safetensors")  # not read, and not what was written either
    files = {file.name: file for file in sorted({*weight_files(checkpoint.folder), *beside})}
    for name in sorted(recorded.keys() ^ files.keys()):
        what = "is missing" if name in recorded else "is not among those that quasar.json records"
        raise QuasarError(f"The weights of {checkpoint.folder} are not those that were written: {name} {what}.")
    for done, (name, file) in enumerate(files.items()):
        progress("checking weights", done, len(files))
        if file_digest(file) != recorded[name]:
            raise QuasarError(f"{file} is damaged or was changed: its SHA-256 is not the one in quasar.json.")
    progress("checking weights", len(files), len(files))
    return f"{len(files)} file{'s' if len(files) > 1 else ''} of weights as they were written"


def recorded_digests(checkpoint: VerifierCheckpoint) -> dict[str, str] | None:
    """SHA-256 (hex) by file name; None where none is recorded, QuasarError where the record is no such thing."""
    recorded = checkpoint.card.get(KEY)
    if recorded is None:
        return None
    if not isinstance(recorded, dict) or not all(isinstance(value, str) for value in recorded.values()):
        raise QuasarError(f"{checkpoint.folder / 'quasar.json'} holds no digests under {KEY}.")
    return recorded


def file_digest(file: Path) -> str:
    """SHA-256 (hex) of a file; QuasarError where it cannot be read."""
    digest = hashlib.sha256()
    try:
        with file.open("rb") as stream:
            while chunk := stream.read(_CHUNK):
                digest.update(chunk)
    except OSError as error:
        raise QuasarError(f"{file} cannot be read: {error.strerror or error}.") from error
    return digest.hexdigest()


def refuse_other_target(checkpoint: VerifierCheckpoint, target: Path) -> None:
    """Refuse, with a reason, a verifier that was not made from the model in `target`, or that cannot be read."""
    folder = checkpoint.folder
    if "quantization_config" in read_config(target):
        raise QuasarError(f"{target} is quantized itself; name the model that {folder} was made from.")
    layers = model_layers(checkpoint)
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
    files = TensorFiles(target)
    shapes = {name: files.shape(name) for name in files.names()}
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
        if name.endswith(".act.scales"):
            raise QuasarError(
                f"{checkpoint.folder} has {name}, factors behind an activation, which are not computed here."
            )
        if name not in own or (checkpoint.own_norms and "norm" in name):
            continue
        stored, expected = checkpoint.tensors.load(name), own.load(name)
        if stored.shape != expected.shape or not _same(_sample(stored), _sample(expected)):
            raise QuasarError(
                f"{checkpoint.folder} was not made from {own.folder}: their {name}, which was not quantized, differ."
            )


def _refuse_codes(checkpoint: VerifierCheckpoint, layers: list[StoredLayer], own: TensorFiles) -> None:
    """Codes stand for the target's weights; of smoothed ones, those of values, with what the norm before took up."""
    looked_at = [layer.name for layer in layers if layer.name.endswith(VALUES) or not checkpoint.own_norms]
    for name in dict.fromkeys((*looked_at[:1], *looked_at[-1:])):
        expected = own.load(_weight_name(name, own)).float()
        codes = checkpoint.layer(name).dequantize(torch.float32)
        readings = [(_cosine(read, expected), read) for read in _readings(codes, name, checkpoint, own)]
        cosine, codes = max(readings, key=itemgetter(0))
        if not cosine >= LEAST_COSINE:
            raise QuasarError(
                f"{checkpoint.folder} was not made from {own.folder}: the codes of {name} do not stand for the "
                f"weights there (cosine {cosine:.2f})."
            )
        if checkpoint.own_norms and _share_scaled(codes, expected) > SHARE_SCALED:
            raise QuasarError(
                f"{checkpoint.folder} cannot verify for {own.folder}: the outputs of {name} are scaled, and both "
                "models share a cache of them. Take a checkpoint that leaves values as they are."
            )


def _readings(
    codes: torch.Tensor, layer: str, checkpoint: VerifierCheckpoint, own: TensorFiles
) -> Iterator[torch.Tensor]:
    """A layer's weight [out, in] with the factors that the norm before it took up; a norm may be stored less 1."""
    norm = f"{layer.removesuffix(VALUES)}.{FIRST_NORM}"
    if not checkpoint.own_norms or norm not in checkpoint.tensors or norm not in own:
        yield codes
        return
    smoothed, plain = checkpoint.tensors.load(norm).float(), own.load(norm).float()
    for less in (0.0, 1.0):
        yield codes * torch.nan_to_num((smoothed + less) / (plain + less), posinf=0.0, neginf=0.0)


def _cosine(one: torch.Tensor, other: torch.Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(one.flatten(), other.flatten(), dim=0))


def _share_scaled(codes: torch.Tensor, expected: torch.Tensor) -> float:
    """How many outputs have weights larger or smaller than the target's, by more than rounding makes them."""
    sizes = (codes * expected).sum(1) / expected.square().sum(1).clamp(min=1e-30)
    return float(((sizes > LARGEST_FACTOR) | (sizes < 1 / LARGEST_FACTOR)).float().mean())


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
    """Whether two samples are equal but for the rounding of another dtype."""
    least = 1e-3 * float(other.abs().max()) if len(other) else 0.0
    return torch.allclose(one, other, rtol=ROUNDING, atol=least)
