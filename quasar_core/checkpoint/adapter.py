"""Merge a LoRA (Hu et al., 2021) into the model that it was trained on: W + B·A · alpha ÷ r, in a folder of its own.

The merged folder is a model like any other, so that its verifier, its pair and its fingerprint are its own. Adapters
are read as peft writes them, from safetensors alone.
"""

import hashlib
import math
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from quasar_core.checkpoint.tensor_files import TensorFiles, open_tensors, read_tensor
from quasar_core.errors import QuasarError
from quasar_core.files import is_file, is_folder, read_json
from quasar_core.records import Progress, no_progress
from quasar_core.store.fingerprint import fingerprint
from quasar_core.store.folders import home
from quasar_core.store.safetensors_header import weight_files

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_WEIGHTS = frozenset((".bin", ".pt", ".pth", ".safetensors", ".gguf", ".h5", ".msgpack"))
_ENDS = {"lora_A.weight": "a", "lora_B.weight": "b"}
# Options of peft that change the sum above, or the model that it is added to, and the values with which they do not.
_ONLY: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),  # others begin by changing the model
}
# Options that say where it came from and how it was trained. Whatever else is set may change the sum.
_TOLD = frozenset(
    (
        *("alpha_pattern", "auto_mapping", "base_model_name_or_path", "eva_config", "exclude_modules"),
        *("inference_mode", "layers_pattern", "layers_to_transform", "loftq_config", "lora_alpha", "lora_dropout"),
        *("megatron_core", "peft_version", "qalora_group_size", "r", "rank_pattern", "revision", "target_modules"),
        *("task_type", "use_rslora", *_ONLY),
    )
)


@dataclass(frozen=True)
class Adapter:
    """A LoRA's matrices by the weight that they change: A [r, in] and B [out, r]; and the factor of their product."""

    folder: Path
    pairs: Mapping[str, tuple[torch.Tensor, torch.Tensor]]
    scales: Mapping[str, float]

    def merged(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """The weight [out, in] with what the adapter adds, summed in float32; QuasarError where it does not fit."""
        a, b = self.pairs[name]
        if (b.shape[0], a.shape[1]) != tuple(weight.shape) or a.shape[0] != b.shape[1]:
            raise QuasarError(
                f"{self.folder} does not fit this model: for {name} it has {tuple(b.shape)} times {tuple(a.shape)}, "
                f"and the weight is {tuple(weight.shape)}."
            )
        return (weight.float() + (b.float() @ a.float()) * self.scales[name]).to(weight.dtype)

    def for_files(self, files: TensorFiles) -> "Adapter":
        """The adapter by the names of the weights in a model's files; QuasarError for one that is not there.

        An adapter of a multimodal model's text part may call it as either version of transformers does, or as a text
        model does.
        """
        found: dict[str, str] = {}
        for name in self.pairs:
            stored = files.stored(files.own(name))
            if stored not in files.beside and not files.holds_whole(name):
                module = name.removesuffix(".weight")
                raise QuasarError(f"{self.folder} does not fit {files.folder}: the model has no {module}.")
            if stored in found:
                raise QuasarError(f"{self.folder} changes {stored} twice: as {found[stored]} and as {name}.")
            found[stored] = name
        return Adapter(
            self.folder,
            {stored: self.pairs[name] for stored, name in found.items()},
            {stored: self.scales[name] for stored, name in found.items()},
        )


def read_adapter(folder: Path) -> Adapter:
    """The LoRA of a folder; QuasarError where there is none, or one that adds more than products of two matrices."""
    if not is_file(folder / CONFIG):
        raise QuasarError(f"{folder} holds no adapter: it has no {CONFIG}.")
    if not is_file(folder / WEIGHTS):
        raise QuasarError(f"{folder} holds no {WEIGHTS}; pickled adapters are never loaded.")
    config = read_json(folder / CONFIG)
    wrong = [option for option, values in _ONLY.items() if config.get(option, values[0]) not in values]
    wrong += sorted(option for option, value in config.items() if value and option not in _TOLD)
    if wrong:
        raise QuasarError(f"{folder} is no plain LoRA: its {wrong[0]} is {config[wrong[0]]}.")
    found: dict[str, dict[str, torch.Tensor]] = {}
    path = folder / WEIGHTS
    with open_tensors(path) as file:
        for name in file.keys():  # noqa: SIM118
            module, end = _split(name)
            if end is None:
                raise QuasarError(f"{folder} is no plain LoRA: it holds {name}.")
            found.setdefault(f"{module}.weight", {})[end] = read_tensor(file, name, path)
    lone = next((name for name, parts in found.items() if len(parts) != 2), None)
    if lone or not found:
        raise QuasarError(f"{folder} holds {f'one matrix of two for {lone}' if lone else 'no LoRA matrices'}.")
    pairs = {name: (parts["a"], parts["b"]) for name, parts in found.items()}
    return Adapter(folder, pairs, {name: _scale(config, name, len(a), folder) for name, (a, _) in pairs.items()})


def merge_adapter(base: Path, adapter: Path, progress: Progress = no_progress) -> Path:
    """The folder with the merged model, made where it is not there yet; QuasarError where they do not fit."""
    lora, files = read_adapter(adapter), TensorFiles(base)
    if files.dequantized or "quantization_config" in read_json(base / "config.json"):
        raise QuasarError(f"{base} is quantized; an adapter is merged into weights of 16 or 32 bits.")
    lora = lora.for_files(files)
    digest = hashlib.sha256((adapter / WEIGHTS).read_bytes() + (adapter / CONFIG).read_bytes())
    digest.update(fingerprint(base).encode())
    folder = home() / "merged" / digest.hexdigest()[:12] / f"{base.name}+{adapter.name}"
    if not is_folder(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix="merging-") as beside:
            made = Path(beside) / folder.name
            _write(base, lora, made, progress)
            if not is_folder(folder):  # another process may have been first
                made.replace(folder)
    return folder


def _write(base: Path, lora: Adapter, folder: Path, progress: Progress) -> None:
    """Each file of weights with what the adapter adds, and all that lies beside them."""
    weights, left = weight_files(base), set(lora.pairs)
    shutil.copytree(base, folder, ignore=_not_copied)
    for done, path in enumerate(weights):
        progress("merging the adapter", done, len(weights))
        with open_tensors(path) as file:
            tensors = {name: read_tensor(file, name, path) for name in file.keys()}  # noqa: SIM118
        for name in left & tensors.keys():
            tensors[name] = lora.merged(name, tensors[name])
        left -= tensors.keys()
        save_file(tensors, folder / path.name, metadata={"format": "pt"})
    if left:
        raise QuasarError(f"{base} does not hold {min(left)}, which {lora.folder} changes.")
    progress("merging the adapter", len(weights), len(weights))


def _not_copied(folder: Any, names: list[str]) -> list[str]:
    """Weights, in any format, folders and hidden files."""
    others = (name for name in names if name.startswith(".") or not (Path(folder) / name).is_file())
    return [*others, *(name for name in names if Path(name).suffix in _WEIGHTS)]


def _split(name: str) -> tuple[str, str | None]:
    """The module that a matrix is of, and which of its two it is; None for anything else."""
    for end, part in _ENDS.items():
        if name.endswith(f".{end}") and name.startswith(_PREFIX):
            return name.removeprefix(_PREFIX).removesuffix(f".{end}"), part
    return name, None


def _scale(config: Mapping[str, Any], name: str, rank: int, folder: Path) -> float:
    """The factor of the product of a weight's two matrices."""
    if config.get("alpha_pattern") or config.get("rank_pattern"):
        raise QuasarError(f"{folder} is no plain LoRA: its ranks or alphas differ by layer.")
    alpha = config.get("lora_alpha")
    if not isinstance(alpha, int | float) or rank != config.get("r"):
        raise QuasarError(f"{folder} is damaged: {CONFIG} and the matrices of {name} disagree.")
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)
