"""Load the C++ of the CPU, carried by a wheel or compiled here, and declare its functions and structures.

It is that for the instruction set which `forms.py` chooses. Where the package carries it, that one is loaded; else a
C++ compiler builds it on first use. What was compiled is kept in quasar's own folder, named by what it depends on
(sources, options, compiler, instruction set), so that a change of any of them compiles anew.
"""

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from quasar_core.errors import QuasarError, UsageError, reason
from quasar_core.kernels.cpu import build, private_files
from quasar_core.kernels.cpu.build import find_compiler
from quasar_core.kernels.cpu.forms import Chosen, chosen
from quasar_core.store.folders import home

SWITCH = "QUASAR_CPU_PASS"
_BUILDING = "building-"  # and the library's key: where it is compiled
_rebuilt: dict[Path, str] = {}  # by source: what was wrong with the library that was there


def load_library(source: Path, functions: Mapping[str, Sequence[Any]]) -> ctypes.CDLL:
    """Load the library of a C++ source, the one that the package carries or that is compiled here.

    `functions` are their arguments. QuasarError, with a reason, where it cannot be compiled or loaded, or lacks one of
    the functions.
    """
    carried = carried_library(source)
    path = carried or shared_library(source)
    try:
        library = ctypes.CDLL(str(carried)) if carried else private_files.load(path)
    except (OSError, QuasarError) as error:
        raise QuasarError(f"its library could not be loaded: {error}") from error
    for name, arguments in functions.items():
        try:
            getattr(library, name).argtypes = list(arguments)
        except AttributeError:
            raise QuasarError(f"its library {path} has no function {name}: delete it, and it is made anew") from None
    return library


def carried_library(source: Path) -> Path | None:
    """The library of a source that the package carries for the chosen instruction set; None where it carries none."""
    path = build.carried_library(source.stem, chosen())
    return path if source.parent == build.HERE and path.is_file() else None


def shared_library(source: Path, form: Chosen | None = None) -> Path:
    """The library of a C++ source and the headers beside it, compiled where it is not there yet or damaged.

    It is for the chosen instruction set, where no other is given. QuasarError, with a reason, where it cannot be.
    """
    compiler = find_compiler()
    if compiler is None:
        raise QuasarError("no C++ compiler was found (g++, or one that CXX names), and the package carries no library")
    form = form or chosen()
    library = _place(source, compiler, form)
    kernels = library.parent.parent
    try:
        private_files.make_private(kernels)
        _remove_what_was_left(kernels)
        with _lock(kernels, library.parent.name):  # no other process compiles it meanwhile
            if library.parent.exists():
                wrong = private_files.damage(library)
                if wrong is None:
                    return library
                _rebuilt[source] = wrong
            _compile(compiler, source, library, form)
    except OSError as error:
        raise QuasarError(f"its library could not be written to {library.parent}: {reason(error)}") from error
    return library


def _remove_what_was_left(kernels: Path) -> None:
    """Remove the folders of compilations that were ended, and of none that goes on."""
    for left in kernels.glob(f"{_BUILDING}*"):
        with suppress(Timeout), _lock(kernels, left.name.split("-")[1], timeout=0):
            if left.exists():
                shutil.rmtree(left)


def _lock(kernels: Path, key: str, timeout: float = -1) -> FileLock:
    """The lock of one library: two may be compiled at once, but not one by two processes."""
    return FileLock(kernels / f".{key}.lock", timeout=timeout)


def needs_compiling(source: Path) -> bool:
    """Whether loading a source's library compiles it: none is carried or whole, and it can be built and kept."""
    compiler = find_compiler()
    if compiler is None or why_switched_off() or carried_library(source):
        return False
    library = _place(source, compiler, chosen())
    if library.is_file():
        return private_files.damage(library) is not None
    return os.access(next(folder for folder in library.parents if folder.exists()), os.W_OK)


def remark(source: Path) -> str:
    """What is to be said of a library beside that it runs: where it comes from, and why it was compiled anew."""
    if carried_library(source):
        return ", built into the package"
    return f", compiled anew since {_rebuilt[source]}" if source in _rebuilt else ", compiled here"


def why_switched_off() -> str | None:
    """A reason where the user has switched off all that is compiled: the pass, packed products, the solver's loops."""
    value = os.environ.get(SWITCH) or "1"
    if value not in ("0", "1"):
        raise UsageError(f"{SWITCH} must be 0 or 1, not {value}.")
    return f"{SWITCH}=0 switches it off" if value == "0" else None


def _place(source: Path, compiler: str, form: Chosen) -> Path:
    """Where a source's library lies, once a compiler has built it for an instruction set."""
    return home() / "kernels" / _key(source, compiler, form) / f"{source.stem}{build.suffix()}"


def _key(source: Path, compiler: str, form: Chosen) -> str:
    sources = [path.read_text(encoding="utf-8") for path in sorted(source.parent.glob("*.[ch]*"))]
    parts = (source.name, *sources, *build.FLAGS, *form.options, os.path.realpath(compiler))
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _compile(compiler: str, source: Path, library: Path, form: Chosen) -> None:
    """Whole or not at all."""
    with tempfile.TemporaryDirectory(dir=library.parent.parent, prefix=f"{_BUILDING}{library.parent.name}-") as folder:
        built = Path(folder) / library.parent.name / library.name
        private_files.make_private(built.parent)
        try:
            command = build.command_here(compiler, source, built, form)
            run = subprocess.run(command, capture_output=True, text=True, timeout=build.PATIENCE)
        except subprocess.TimeoutExpired as error:
            raise QuasarError(f"{compiler} did not compile {source.name} within {build.PATIENCE} seconds") from error
        if run.returncode:
            first = next((line for line in run.stderr.splitlines() if "error" in line), "no message")
            raise QuasarError(f"{compiler} could not compile {source.name}: {first.strip()}")
        private_files.install(built, library)


SOURCE = build.HERE / f"{build.PASS}.cpp"
MOST_PARTS = 4


class Product(ctypes.Structure):
    """A linear layer: weights of 16 or 32 bits row after row, or a stream of codes of 2, 4 or 8 bits."""

    _fields_ = (
        ("weight", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),  # float32 [out], or null
        ("bits", ctypes.c_int),
        ("inputs", ctypes.c_int),
        ("outputs", ctypes.c_int),
        ("groups", ctypes.c_int),
        ("group", ctypes.c_int),  # inputs of each, the last one filled up
    )


class Compressed(ctypes.Structure):
    """A weight of bfloat16 in 12 bits (`compressed.h`)."""

    _fields_ = tuple((name, ctypes.c_void_p) for name in ("strips", "bases", "first", "outliers"))


class FusedWeight(ctypes.Structure):
    """Products of one input, whose outputs stand beside one another."""

    _fields_ = (
        ("parts", Product * MOST_PARTS),
        ("count", ctypes.c_int),
        ("inputs", ctypes.c_int),
        ("outputs", ctypes.c_int),
    )


class Experts(ctypes.Structure):
    """A mixture in the place of a block's MLP or beside it; its experts are arrays of products."""

    _fields_ = (
        *((name, ctypes.c_int) for name in ("count", "chosen", "shared", "scores", "normalised")),
        *((name, ctypes.c_float) for name in ("scale", "added")),
        ("router", FusedWeight),
        ("correction", ctypes.c_void_p),  # float32 [count], or null
        ("gate_up", ctypes.POINTER(FusedWeight)),
        ("down", ctypes.POINTER(FusedWeight)),
        *((name, ctypes.c_void_p) for name in ("mlp_out_norm", "router_norm", "norm", "out_norm", "factors")),
    )


class Recurrence(ctypes.Structure):
    """The rule of a layer with a state in the place of attention; its weights are float32, or null."""

    _fields_ = (
        *((name, ctypes.c_int) for name in ("kind", "taps", "key_heads", "value_heads", "key_size", "value_size")),
        *((name, ctypes.c_int) for name in ("channels", "values")),
        ("eps", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in ("weights", "bias", "fading", "step_bias", "passed_by", "norm")),
    )


class StatePlace(ctypes.Structure):
    """A state before some tokens and behind them, and what the rule reads of each."""

    _fields_ = tuple(
        (name, ctypes.c_void_p)
        for name in ("window", "matrices", "window_after", "matrices_after", "channels", "rates")
    )


class AttentionShape(ctypes.Structure):
    """What causal attention is of (`causal_attention.h`)."""

    _fields_ = (
        *((name, ctypes.c_int) for name in ("heads", "kv_heads", "queries", "keys", "size", "window")),
        *((name, ctypes.c_float) for name in ("scale", "cap")),
    )


class Layer(ctypes.Structure):
    """A block: norms in float32 or none, products, the positions that it sees (0: all), its rotation (-1: none)."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("input_norm", "out_norm", "mlp_norm", "down_norm")),
        ("head_norms", ctypes.c_void_p),
        ("activation", ctypes.c_void_p),
        *((name, FusedWeight) for name in ("qkv", "out", "gate_up", "down", "input_gate", "input_out")),
        ("input_out_norm", ctypes.c_void_p),
        ("scalar", ctypes.c_float),
        ("shares", ctypes.c_int),
        *((name, ctypes.c_int) for name in ("window", "sinks", "rope", "channels", "kv_heads", "head_size")),
        ("experts", ctypes.POINTER(Experts)),
        ("recurrence", ctypes.POINTER(Recurrence)),
    )


class Model(ctypes.Structure):
    """A decoder; the embedding is bfloat16 or float32, as the cache is."""

    _fields_ = (
        *((name, ctypes.c_int) for name in ("hidden", "heads", "layers", "is_bfloat16")),
        *((name, ctypes.c_int) for name in ("activation", "gated")),
        *((name, ctypes.c_int) for name in ("norms_whole_rows", "norms_last", "interleaved")),
        *((name, ctypes.c_int) for name in ("gates_attention", "norms_embedding")),
        *((name, ctypes.c_float) for name in ("eps", "behind_eps", "embedding_scale", "residual_scale")),
        *((name, ctypes.c_float) for name in ("scores_scale", "scores_cap", "logits_scale", "logits_cap")),
        ("embedding", ctypes.c_void_p),
        ("norm", ctypes.c_void_p),
        ("head", FusedWeight),
        ("head_tokens", ctypes.c_void_p),
        ("vocabulary", ctypes.c_int),
        ("inputs_size", ctypes.c_int),
        ("norms_values", ctypes.c_int),
        ("inputs_embedding", ctypes.c_void_p),
        ("inputs_projection", FusedWeight),
        ("inputs_norm", ctypes.c_void_p),
        ("inputs_scale", ctypes.c_float),
        ("joint", FusedWeight),
        *((name, ctypes.c_void_p) for name in ("joint_embedding_norm", "joint_rows_norm")),
        ("layer", ctypes.POINTER(Layer)),
    )


DESCRIBED: Mapping[str, type[ctypes.Structure]] = {
    "model": Model,
    "layer": Layer,
    "compressed": Compressed,
    "experts": Experts,
    "recurrence": Recurrence,
    "state_place": StatePlace,
    "attention_shape": AttentionShape,
}


def why_not_here() -> str | None:
    """Why this machine cannot run the library, found out once: its compiler, the build, or the user."""
    return why_switched_off() or _why_not_in(chosen())


def library() -> ctypes.CDLL:
    """The compiled library; QuasarError where it cannot be built or loaded."""
    return _library_in(chosen())


def multiplies_bfloat16() -> bool:
    """Whether products of bfloat16 are taken in pairs or tiles, where passes of several tokens are measured."""
    form: bytes = library().quasar_form()
    return form == b"AVX-512 with VNNI and BF16" or multiplies_in_tiles()


def multiplies_in_tiles() -> bool:
    """Whether products are taken in AMX's tiles."""
    form: bytes = library().quasar_form()
    return form == b"AVX-512 with AMX"


def describe_form() -> str:
    """The instruction set for which the library was compiled, and why, such as "AVX2 with VNNI, as QUASAR_ISA asks"."""
    return f"{library().quasar_form().decode()}, {chosen().reason}"


@cache
def _why_not_in(form: Chosen) -> str | None:
    try:
        _library_in(form)
    except QuasarError as error:
        return str(error)
    return None


@cache
def _library_in(form: Chosen) -> ctypes.CDLL:
    pointer, number = ctypes.c_void_p, ctypes.c_int
    functions = load_library(
        SOURCE,
        {
            "quasar_multiply_codes": [pointer] * 3 + [number] * 8,
            "quasar_choose_bases": [pointer, number, number, pointer, pointer, number],
            "quasar_compress": [pointer, number, number, *[pointer] * 4, number],
            "quasar_restore": [pointer, number, number, pointer, number],
            "quasar_pass_new": [ctypes.POINTER(Model)],
            "quasar_pass_delete": [pointer, number],
            "quasar_pass_run": [
                pointer,
                *[number] * 3,
                *[pointer] * 2,
                *[number] * 3,
                *[pointer] * 5,
                number,
                *[pointer] * 5,
                number,
                pointer,
                number,
            ],
            "quasar_pass_seconds": [pointer, number, pointer],
            "quasar_rms_norm": [*[pointer] * 3, ctypes.c_int64, number, ctypes.c_float, number, number],
            "quasar_attend_causally": [*[pointer] * 5, ctypes.c_int64, ctypes.POINTER(AttentionShape), number],
            "quasar_multiplies_pairs": [],
            "quasar_recur": [pointer, *[number] * 2, *[pointer] * 2, number],
            "quasar_form": [],
            **{f"quasar_size_of_{name}": [] for name in DESCRIBED},
        },
    )
    functions.quasar_pass_new.restype = pointer
    functions.quasar_form.restype = ctypes.c_char_p
    if any(getattr(functions, f"quasar_size_of_{name}")() != ctypes.sizeof(kind) for name, kind in DESCRIBED.items()):
        raise QuasarError("its library describes models in other bytes than this version of quasar")
    return functions
