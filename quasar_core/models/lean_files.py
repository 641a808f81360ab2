"""Whether the lean decoder runs a model of these files: its config, and whether it has a place for every tensor."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from quasar_core.checkpoint.headers import StoredLayer
from quasar_core.checkpoint.reader import TensorFiles, VerifierCheckpoint
from quasar_core.errors import QuasarError
from quasar_core.models.architectures import DecoderConfig, why_not_lean
from quasar_core.models.lean_weights import HEAD, has_no_effect
from quasar_core.models.linear import stored_shapes
from quasar_core.store.model_config import read_config


def why_folder_not_lean(folder: Path) -> str | None:
    """Why the lean decoder does not run the model of a folder, or None where it does."""
    content = read_config(folder)
    return why_not_lean(content) or _tensor_without_place(DecoderConfig.parse(content), TensorFiles(folder))


def _tensor_without_place(config: DecoderConfig, files: TensorFiles) -> str | None:
    """Files of other names, or with more than the architecture has, are transformers' to read.

    One under `model.` is a part of the architecture that the table does not know of: loading refuses it.
    """
    known = {*stored_shapes(config), f"{HEAD}.weight"}
    for name in files.names():
        if name not in known and not name.startswith("model.") and not has_no_effect(name):
            return f"its files hold {name}, which {config.architecture} does not have"
    return None


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
