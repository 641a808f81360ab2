"""Quantize a language model once, then generate with it fast: see docs/library.md.

    import quasar_core as quasar

    pair = quasar.load("demo")
    for piece in quasar.stream(pair, "Why is the sky blue?"):
        print(piece, end="")

What stands here is imported when it is first used, so that `import quasar_core` loads no PyTorch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quasar_core.errors import QuasarError, UsageError
    from quasar_core.library import generate, load, quantize_model, stream
    from quasar_core.models.pair import Pair
    from quasar_core.records import FidelityReport, GenerationResult, QuantizeReport, Stats

__version__ = "0.1.0"

__all__ = [
    "FidelityReport",
    "GenerationResult",
    "Pair",
    "QuantizeReport",
    "QuasarError",
    "Stats",
    "UsageError",
    "__version__",
    "generate",
    "load",
    "quantize_model",
    "stream",
]

_HOMES = {
    "quasar_core.library": ("generate", "load", "quantize_model", "stream"),
    "quasar_core.errors": ("QuasarError", "UsageError"),
    "quasar_core.models.pair": ("Pair",),
    "quasar_core.records": ("FidelityReport", "GenerationResult", "QuantizeReport", "Stats"),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
