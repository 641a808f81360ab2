"""What a measured time depends on beside what was measured: the device, its threads, PyTorch, quasar's own kernels."""

import hashlib
from functools import cache
from pathlib import Path

import torch

from quasar_core.kernels.threads import most_threads
from quasar_core.system import processor_name


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's with the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = most_threads()
    return f"{processor_name()}, {threads} thread{'s' if threads > 1 else ''}"


def measured_on(device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """The conditions of a measurement: one that was made under others says nothing here."""
    return {
        "device": device_name(device),
        "dtype": str(dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "kernels": sources_hash(),
    }


@cache
def sources_hash() -> str:
    """SHA-256 (its first 16 digits) of the sources of all kernels, so that a change of any measures anew."""
    digest = hashlib.sha256()
    folder = Path(__file__).parent
    for path in sorted(path for path in folder.rglob("*") if path.suffix in (".py", ".h", ".cpp")):
        digest.update(f"{path.relative_to(folder).as_posix()}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
