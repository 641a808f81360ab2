"""AMX's form for processors that have AVX-512 alone: its own code, whose instructions of tiles are emulated.

`trapped_tiles.cpp` says how.
"""

import ctypes
from dataclasses import replace
from pathlib import Path

from quasar_core.kernels.cpu.forms import Form
from quasar_core.kernels.cpu.library import load_library

SOURCE = Path(__file__).with_suffix(".cpp")


def without_tiles(form: Form) -> Form:
    """That form as it needs no tiles of the processor."""
    return replace(form, needs=frozenset(name for name in form.needs if not name.startswith("amx")))


def load() -> ctypes.CDLL:
    """What catches instructions of tiles; QuasarError where it cannot be compiled."""
    nothing: list[object] = []
    traps = load_library(SOURCE, {"catch_tiles": nothing, "let_tiles_go": nothing, "tiles_multiplied": [ctypes.c_int]})
    traps.tiles_multiplied.restype = ctypes.c_long
    return traps
