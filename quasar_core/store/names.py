"""Resolve the name that a user gives to a folder on this machine, and to the folder of its verifier."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from quasar_core.config import QuantizeConfig
from quasar_core.errors import QuasarError, UsageError
from quasar_core.files import absolute, is_file, is_folder, refuse_special_files
from quasar_core.store.folders import home
from quasar_core.store.gguf import is_gguf, unpacked
from quasar_core.store.hub import download_model
from quasar_core.store.model_config import check_counts, read_config
from quasar_core.store.safetensors_header import weight_files

DEMO = "demo"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_BARE_NAME = re.compile(r"[A-Za-z0-9][\w.-]*")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")

# How a bare name begins, and the organisation that publishes such models; the first that fits is taken.
_ORGANISATIONS = (
    ("QwQ", "Qwen"),
    ("Qwen", "Qwen"),
    ("Llama-2", "meta-llama"),
    ("Llama-3", "meta-llama"),
    ("Meta-Llama", "meta-llama"),
    ("Mistral", "mistralai"),
    ("Ministral", "mistralai"),
    ("SmolLM", "HuggingFaceTB"),
    ("openPangu-Embedded", "FreedomIntelligence"),
    ("vicuna", "lmsys"),
    ("TinyLlama", "TinyLlama"),
    ("DeepSeek", "deepseek-ai"),
    ("Phi", "microsoft"),
    ("gemma", "google"),
    ("OLMo", "allenai"),
    ("Falcon", "tiiuae"),
    ("Yi", "01-ai"),
)


@dataclass(frozen=True)
class ModelSource:
    """A model found: `name` finds it again from anywhere ("demo", "org/name", or an absolute path)."""

    name: str
    folder: Path
    kind: Literal["demo", "folder", "hub"]

    @property
    def label(self) -> str:
        """The short name to show and to write into a checkpoint: no part of this machine's paths."""
        return self.folder.name if self.kind == "folder" else self.name


def resolve_model(name: str) -> ModelSource:
    """The model that `name` means: `demo`, a folder, a GGUF file, a hub id, or a bare name (a folder, else a hub id).

    A hub model is downloaded once, a GGUF file unpacked once. UsageError for a name that cannot be one, QuasarError for
    a folder that holds no model and for a download that fails.
    """
    full = full_name(name)
    if full == DEMO:
        return ModelSource(DEMO, check_model_folder(demo_folder()), "demo")
    if Path(full).is_absolute() and is_file(Path(full)):
        return ModelSource(full, check_model_folder(unpacked(Path(full))), "folder")
    if Path(full).is_absolute():
        return ModelSource(full, check_model_folder(Path(full)), "folder")
    return ModelSource(full, download_model(full, name), "hub")


def full_name(name: str) -> str:
    """What `name` stands for: `demo`, an absolute folder or GGUF file, or a hub id; UsageError where it is neither."""
    if name == DEMO:
        return DEMO
    if not name.strip():
        raise UsageError("The model's name is empty: give a folder, a hub id such as Qwen/Qwen3-8B, or demo.")
    folder = absolute(Path(name))
    if is_folder(folder):
        return str(folder)
    if is_gguf(folder):
        return str(folder)
    if is_file(folder):
        raise UsageError(f"{name} is a file, and not of GGUF; give the folder that holds the model.")
    return _hub_id(name)


def demo_folder() -> Path:
    """The folder of the model that the package carries."""
    return Path(__file__).parents[1] / "demo" / "model"


def _hub_id(name: str) -> str:
    """The hub id that `name` is or stands for; UsageError where it can be neither."""
    if _HUB_ID.fullmatch(name):
        return name
    if not _BARE_NAME.fullmatch(name):
        raise UsageError(f"There is no folder {name}, and a hub id has the form of Qwen/Qwen3-8B.")
    for prefix, organisation in _ORGANISATIONS:
        if name.lower().startswith(prefix.lower()):
            return f"{organisation}/{name}"
    raise UsageError(
        f"{name} is neither a folder here nor a model whose organisation is known: "
        "give a folder, a hub id such as Qwen/Qwen3-8B, or demo."
    )


def check_model_folder(folder: Path) -> Path:
    """`folder`, if it holds a config and safetensors weights; else a QuasarError that says what is missing."""
    if not is_file(folder / "config.json"):
        raise QuasarError(f"{folder} holds no model: it has no config.json.")
    if "transformers_weights" in read_config(folder):
        raise QuasarError(f"{folder}/config.json names its weights by transformers_weights, which is not supported.")
    if not weight_files(folder):
        if any(next(folder.glob(pattern), None) for pattern in _PICKLES):
            raise QuasarError(
                f"{folder} holds only pickled weights, which are never loaded; convert them to safetensors."
            )
        raise QuasarError(f"{folder} holds no weights: it has no *.safetensors file.")
    refuse_special_files(folder)
    check_counts(folder)
    return folder


def default_output(source: ModelSource, config: QuantizeConfig) -> Path:
    """Where the verifier of `source` goes: beside a folder, else in home()/verifiers.

    The name tells method, bits and group size, such as Qwen3-8B-gptq-4bit-g128; `gchannel` stands for one group per
    output channel (a group size of −1). W8A8 and fp8 have no bits to choose: Qwen3-8B-w8a8. Widths by layer:
    Qwen3-8B-gptq-mixed4.25bit-g128, or by the agreement asked for, Qwen3-8B-gptq-agree0.97-g128.
    """
    width = f"{config.bits}bit"
    if config.mixed:
        width = f"agree{config.target_agreement:g}" if config.mean_bits is None else f"mixed{config.mean_bits:g}bit"
    group = "gchannel" if config.groups_of == -1 else f"g{config.groups_of}"
    suffix = f"-{config.method}-{width}-{group}" if config.method == "gptq" else f"-{config.method}"
    if source.kind == "folder":
        return source.folder.parent / (source.folder.name + suffix)
    return home() / "verifiers" / (source.name.replace("/", "--") + suffix)
