"""Kernels in C++, compiled on first use for this processor and kept in quasar's own folder.

A shared library is named by what it depends on (sources, flags, compiler, processor, PyTorch), so that a change of any
of them compiles anew, and nothing is ever loaded that was built for another machine.
"""

import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

from quasar_core.errors import QuasarError
from quasar_core.store.home import home

FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC")
_PATIENCE = 120  # seconds


def shared_library(source: Path) -> Path:
    """The library of a C++ source and the headers beside it, compiled where it is not there yet.

    QuasarError, with a reason, where it cannot be.
    """
    compiler = find_compiler()
    if compiler is None:
        raise QuasarError("no C++ compiler was found (g++, or one that CXX names)")
    library = home() / "kernels" / _key(source, compiler) / f"{source.stem}.so"
    if not library.exists():
        try:
            library.parent.mkdir(parents=True, exist_ok=True)
            _compile(compiler, source, library)
        except OSError as error:
            raise QuasarError(f"its library could not be written to {library.parent}: {error}") from error
    return library


def find_compiler() -> str | None:
    """The path of the C++ compiler: the one that CXX names, else a common one."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "c++", "clang++"]
    return next((path for path in map(shutil.which, names) if path), None)


def processor_flags() -> frozenset[str]:
    """The instruction sets of this processor as Linux names them; none on other systems."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    listed = next((line for line in lines if line.startswith("flags")), "")
    return frozenset(listed.partition(":")[2].split())


def _key(source: Path, compiler: str) -> str:
    processor = " ".join(sorted(processor_flags()))
    sources = [path.read_text(encoding="utf-8") for path in sorted(source.parent.glob("*.[ch]*"))]
    parts = (*sources, *FLAGS, os.path.realpath(compiler), processor, torch.__version__)
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _compile(compiler: str, source: Path, library: Path) -> None:
    """Whole or not at all: two processes may compile at once, and either result will do."""
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        built = Path(folder) / library.name
        command = [compiler, *FLAGS, str(source), "-o", str(built)]
        try:
            run = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE)
        except subprocess.TimeoutExpired as error:
            raise QuasarError(f"{compiler} did not compile {source.name} within {_PATIENCE} seconds") from error
        if run.returncode:
            first = next((line for line in run.stderr.splitlines() if "error" in line), "no message")
            raise QuasarError(f"{compiler} could not compile {source.name}: {first.strip()}")
        os.replace(built, library)
