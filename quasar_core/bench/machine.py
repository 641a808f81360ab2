"""Describe this machine for `doctor`: versions, processor, memory, kernels, and what passes of a pair cost here."""

import platform
from dataclasses import asdict
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from quasar_core import store
from quasar_core.bench.steps import read_bandwidth
from quasar_core.bench.verifiers.compare_verifiers import compare_verifiers
from quasar_core.checkpoint.reader import VerifierCheckpoint
from quasar_core.errors import QuasarError
from quasar_core.kernels.cpu import library
from quasar_core.kernels.select import describe_kernels
from quasar_core.kernels.times import device_name
from quasar_core.models.context import context_limit
from quasar_core.models.memory.estimate import describe, pair_need
from quasar_core.quantize.solve.cpp import describe_loops
from quasar_core.records import Progress
from quasar_core.system import processor_flags, total_memory

_PACKAGES = ("quasar-cli", "torch", "transformers", "safetensors", "huggingface_hub", "numpy")
_OPTIONAL = ("optimum", "gptqmodel", "triton", "matplotlib", "vllm")
# The instruction sets that packed products gain from.
_CPU_FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_int8", "amx_bf16", "asimddp", "i8mm")


def examine(progress: Progress) -> dict[str, Any]:
    """The JSON form of everything that `doctor` knows; what has not been measured yet is."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16
    pair, bandwidth = store.current_pair(), read_bandwidth(device)
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "optional_packages": {name: _version(name) if find_spec(name) else None for name in _OPTIONAL},
        "cpu": {"name": device_name(torch.device("cpu")), "features": _cpu_features()},
        "memory_bytes": total_memory(),
        "gpu": _gpu(),
        "device": str(device),
        "read_bandwidth_bytes_per_s": bandwidth,
        "kernels": [asdict(report) for report in describe_kernels(device, dtype, progress)],
        "cpp": describe_cpp(),
        "quantizer_loops": describe_loops(),
        "home": str(store.home()),
        "current_pair": asdict(pair) if pair else None,
        "speed": describe_speed(Path(pair.verifier), bandwidth) if pair else None,
        "pair_memory": describe_memory(pair.target, Path(pair.verifier)) if pair and device.type == "cuda" else None,
    }


def describe_speed(verifier: Path, bandwidth: float | None = None) -> dict[str, Any]:
    """The JSON form of what the verifiers of one target cost and yield here, or the sentence why that is not known."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        checkpoint = VerifierCheckpoint(verifier)
        return asdict(compare_verifiers(checkpoint, device, bandwidth or read_bandwidth(device)))
    except QuasarError as error:
        return {"unknown": str(error)}


def describe_memory(target: str, verifier: Path) -> str:
    """What a pair takes of the GPU's memory, and how long a context fits; or why that is not known."""
    try:
        folder = store.resolve_model(target).folder
        need = pair_need(folder, VerifierCheckpoint(verifier), torch.bfloat16, rounds_head=True)
        if need is None:
            return "not known: the pair runs through transformers"
        return describe(need, torch.cuda.mem_get_info()[0], context_limit(folder))
    except QuasarError as error:
        return f"not known: {error}"


def describe_cpp() -> str:
    """The instruction set that the CPU's passes and products run on in C++, and why; or why they do not."""
    obstacle = library.why_not_here()
    if obstacle:
        return f"not here: {obstacle}"
    return f"for {library.describe_form()}{library.remark(library.SOURCE)}"


def _cpu_features() -> list[str]:
    """The instruction sets of interest that this processor has; empty where the system does not tell."""
    return [feature for feature in _CPU_FEATURES if feature in processor_flags()]


def _gpu() -> dict[str, Any] | None:
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "memory_bytes": properties.total_memory,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "cuda": torch.version.cuda,
    }


def _version(name: str) -> str:
    """The version of a package, which is not imported."""
    if name == "quasar-cli":  # known where a checkout is not installed, too
        return str(import_module("quasar_core").__version__)  # which imports the library above this layer
    try:
        return version(name)
    except PackageNotFoundError:
        return "unknown version"
