"""The C++ library of the CPU: its functions and the structures they take, as `kernels/cpu/` declares them.

It needs a processor with AVX-512 VNNI, Linux and a C++ compiler, which builds it on first use.
"""

import ctypes
from functools import cache
from pathlib import Path

from quasar_core.errors import QuasarError
from quasar_core.kernels.compile import load_library, why_switched_off
from quasar_core.system import processor_flags

SOURCE = Path(__file__).parent / "cpu" / "quasar.cpp"
MOST_PARTS = 3
_NEEDED = frozenset({"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni"})


class Product(ctypes.Structure):
    """A linear layer: weights of 16 or 32 bits row after row, or a stream of codes of 2, 4 or 8 bits."""

    _fields_ = (
        ("weight", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),  # float32 [out], or null
        ("bits", ctypes.c_int),
        ("inputs", ctypes.c_int),
        ("outputs", ctypes.c_int),
        ("groups", ctypes.c_int),
    )


class Joined(ctypes.Structure):
    """Products of one input, whose outputs stand beside one another."""

    _fields_ = (
        ("parts", Product * MOST_PARTS),
        ("count", ctypes.c_int),
        ("inputs", ctypes.c_int),
        ("outputs", ctypes.c_int),
    )


class Layer(ctypes.Structure):
    """A block: norms in float32, products, the positions that it sees (0: all), whether it rotates."""

    _fields_ = (
        ("input_norm", ctypes.c_void_p),
        ("mlp_norm", ctypes.c_void_p),
        ("head_norms", ctypes.c_void_p),
        ("qkv", Joined),
        ("out", Joined),
        ("gate_up", Joined),
        ("down", Joined),
        ("window", ctypes.c_int),
        ("rotates", ctypes.c_int),
    )


class Model(ctypes.Structure):
    """A decoder; the embedding is bfloat16 or float32, as the cache is."""

    _fields_ = (
        ("hidden", ctypes.c_int),
        ("heads", ctypes.c_int),
        ("kv_heads", ctypes.c_int),
        ("head_size", ctypes.c_int),
        ("layers", ctypes.c_int),
        ("is_bfloat16", ctypes.c_int),
        ("eps", ctypes.c_float),
        ("embedding", ctypes.c_void_p),
        ("norm", ctypes.c_void_p),
        ("head", Joined),
        ("layer", ctypes.POINTER(Layer)),
    )


@cache
def why_not_here() -> str | None:
    """Why this machine cannot run the library, found out once: its processor, its compiler, the build, or the user."""
    if off := why_switched_off():
        return off
    if not processor_flags() >= _NEEDED:
        return "it needs a processor with AVX-512 VNNI, and Linux"
    try:
        library()
    except QuasarError as error:
        return str(error)
    return None


@cache
def library() -> ctypes.CDLL:
    """The compiled library; QuasarError where it cannot be built or loaded."""
    pointer, number = ctypes.c_void_p, ctypes.c_int
    functions = load_library(
        SOURCE,
        {
            "quasar_multiply_codes": [pointer] * 3 + [number] * 7,
            "quasar_pass_new": [ctypes.POINTER(Model)],
            "quasar_pass_delete": [pointer, number],
            "quasar_pass_run": [
                pointer,
                number,
                pointer,
                *[number] * 2,
                *[pointer] * 3,
                number,
                *[pointer] * 3,
                number,
            ],
            "quasar_pass_seconds": [pointer, number, pointer],
            "quasar_size_of_model": [],
            "quasar_size_of_layer": [],
        },
    )
    functions.quasar_pass_new.restype = pointer
    sizes = functions.quasar_size_of_model(), functions.quasar_size_of_layer()
    if sizes != (ctypes.sizeof(Model), ctypes.sizeof(Layer)):
        raise QuasarError("its library describes models in other bytes than this version of quasar")
    return functions
