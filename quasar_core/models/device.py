"""Choose the device that a model runs on and its dtype, once, with the reason."""

import torch

from quasar_core.errors import UsageError
from quasar_core.kernels.gpu import AMPERE
from quasar_core.system import processor_flags

# Below this size float32 is as fast as bf16 on a CPU, and passes of any length agree bit for bit more often.
SMALL_MODEL_BYTES = 200_000_000
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# Of processors that multiply in bfloat16, as Linux names them: Intel's and AMD's, and ARM's.
_BF16_FLAGS = frozenset(("avx512_bf16", "amx_bf16", "bf16"))


def has_fast_bf16() -> bool:
    """Whether this processor has products in bfloat16, and PyTorch the library that uses them."""
    return torch.backends.mkldnn.is_available() and bool(processor_flags() & _BF16_FLAGS)


def choose_device(requested: str) -> torch.device:
    """`auto` is CUDA where there is one. A GPU has its number, and is the current one of this thread from then on."""
    device = _named_device(requested)
    if device.type != "cuda":
        return device
    numbered = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
    torch.cuda.set_device(numbered)
    return numbered


def _named_device(requested: str) -> torch.device:
    if requested == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(requested)
    except RuntimeError as error:
        raise UsageError(f"--device must be auto, cpu, cuda or cuda:N, not {requested}.") from error
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device must be auto, cpu, cuda or cuda:N, not {requested}.")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"--device {requested} was asked for, and PyTorch {torch.__version__} finds no CUDA device.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"--device {requested} was asked for, and there are {torch.cuda.device_count()} CUDA devices.")
    return device


def choose_dtype(
    requested: str, stored: str | None, weight_bytes: int, device: torch.device
) -> tuple[torch.dtype, str]:
    """The dtype of the passes, and why; `stored` is the dtype that the model's config names."""
    if requested != "auto":
        if requested not in DTYPES:
            raise UsageError(f"--dtype must be auto, {', '.join(DTYPES)}, not {requested}.")
        return DTYPES[requested], "asked for by --dtype"
    if device.type == "cpu" and weight_bytes < SMALL_MODEL_BYTES:
        return torch.float32, "a small model on the CPU is as fast in float32, and reproducible"
    if device.type == "cpu" and stored == "float16":
        return torch.bfloat16, "float16 is slow on the CPU"
    dtype = DTYPES.get(stored or "", torch.bfloat16)
    is_nvidia = device.type == "cuda" and torch.version.hip is None
    if is_nvidia and dtype == torch.bfloat16 and torch.cuda.get_device_capability(device) < AMPERE:
        return torch.float16, "bfloat16 is slow on GPUs before Ampere"
    return dtype, "as the model is stored"
