"""How a library of C++ is built, and where a wheel has those that were built ahead.

`setup.py` builds all that its machine could use, before PyTorch is there, so this needs the standard library alone;
`library.py` loads what was built, or builds the one that it needs.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from quasar_core.kernels.cpu.forms import Chosen

HERE = Path(__file__).parent
CARRIED = HERE / "built"  # where a wheel's libraries lie; a checkout has none
PASS, SOLVER = "quasar", "solver"  # the sources, without .cpp
# Products and sums are fused where the code says so, and nowhere else: then all instruction sets know what is rounded.
FLAGS = ("-std=c++17", "-O3", "-ffp-contract=off", "-pthread", "-shared")
PATIENCE = 600  # seconds, of a compiler that takes some ten of a core: others may need the cores too


def find_compiler() -> str | None:
    """The path of the C++ compiler: the one that CXX names, else a common one."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "c++", "clang++"]
    return next((path for path in map(shutil.which, names) if path), None)


def suffix(system: str = sys.platform) -> str:
    """How the names of a system's libraries end."""
    return {"win32": ".dll", "darwin": ".dylib"}.get(system, ".so")


def carried_library(source: str, form: Chosen, system: str = sys.platform) -> Path:
    """Where a wheel has a source's library for an instruction set, whose extras the solver has no use for."""
    key = form.form.name if source == SOLVER else form.key
    return CARRIED / f"{source}-{key}{suffix(system)}"


def command_here(compiler: str, source: Path, built: Path, form: Chosen) -> list[str]:
    """Build for this machine; an old compiler does without the options that it does not know, and so does the code."""
    options = [option for option in form.options if _is_known(compiler, option)]
    return [compiler, *FLAGS, *_of_system(compiler, sys.platform), *options, str(source), "-o", str(built)]


def command_ahead(compiler: str, source: Path, built: Path, form: Chosen, system: str = sys.platform) -> list[str]:
    """Build for other machines of one system: what the compiler adds to every program comes with the library."""
    runtime = ["-static-libstdc++", "-static-libgcc", "-Wl,--exclude-libs,ALL", "-s"] if system == "linux" else []
    own = [*FLAGS, *_of_system(compiler, system), *runtime]
    return [compiler, *own, *form.options, str(source), "-o", str(built)]


def _of_system(compiler: str, system: str) -> list[str]:
    if system != "win32":
        return ["-fPIC"]
    # g++ takes the stack for aligned to 32 and 64 bytes there, which it is not: moves that insist on it would crash.
    return ["-static", *["-Wa,-muse-unaligned-vector-move"] * ("clang" not in Path(compiler).name)]


def _is_known(compiler: str, option: str) -> bool:
    """Whether a compiler knows an option."""
    empty = [compiler, option, "-fsyntax-only", "-x", "c++", os.devnull]
    return not option.startswith("-m") or subprocess.run(empty, capture_output=True, timeout=PATIENCE).returncode == 0
