"""Ask a GPU for its maker, capability and state, and send launches to it."""

from contextlib import AbstractContextManager, nullcontext

import torch

AMPERE = (8, 0)


def on(device: torch.device) -> AbstractContextManager[object]:
    """A context whose launches go to this device.

    PyTorch's operations follow their tensors; events, streams, graphs and Triton's launches go to the device that is
    current in this thread, which is the first GPU unless somebody says otherwise.
    """
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def why_not_nvidia(device: torch.device, capability: tuple[int, int] = AMPERE) -> str | None:
    """Why kernels for NVIDIA's GPUs of this compute capability cannot run, or None where they can."""
    if device.type != "cuda":
        return f"it runs on CUDA, not on {device.type}"
    if torch.version.hip is not None:
        return "it is made for NVIDIA's GPUs, and this one is AMD's"
    if torch.cuda.get_device_capability(device) < capability:
        return f"it needs compute capability {'.'.join(map(str, capability))}"
    return None


def architecture(device: torch.device) -> str:
    """The name of an AMD GPU's architecture, such as gfx942."""
    return str(torch.cuda.get_device_properties(device).gcnArchName).partition(":")[0]


def is_lost() -> bool:
    """Whether this process reaches its GPUs no more, as after an illegal access.

    What needs more memory than there is, or was refused before it ran, leaves them as they were.
    """
    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:  # whatever it is: who asks has the error that came first
        return True
    return False


def raise_if_lost(error: Exception) -> None:
    """Raise the error again where no other kernel could do better: the device is lost."""
    if is_lost():
        raise error


def first_line(error: BaseException) -> str:
    """What an error says, in a line; its kind where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
