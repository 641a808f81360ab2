"""Build every library for the systems that this machine has cross compilers for: `python tests/other_systems.py`.

Linux on aarch64 by aarch64-linux-gnu-g++, Windows on x86-64 by x86_64-w64-mingw32-g++-posix (Debian's packages
g++-aarch64-linux-gnu and g++-mingw-w64-x86-64-posix). Where qemu-aarch64-static (qemu-user-static) and wine64 are here,
each multiplies some codes with 1 to 3 threads. All threads must agree to the last bit; a form that this processor runs
too, with what it computes here, and every other to rounding. Exits with 1 where anything fails.
"""

import os
import platform
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from quasar_core.kernels.cpu import build, forms  # noqa: E402

DRIVER = ROOT / "tests" / "helpers" / "multiply_codes.cpp"
CLOSE = 1e-5  # of the largest product


@dataclass(frozen=True)
class System:
    """A system, what compiles for it here, and what runs its programs: the first of some that is found."""

    name: str
    system: str
    architecture: str
    compiler: str
    static: tuple[str, ...]
    runners: tuple[tuple[str, ...], ...]

    def runner(self) -> Sequence[str] | None:
        """The command that programs of this system run under; None where none is found."""
        return next((runner for runner in self.runners if not runner or shutil.which(runner[0])), None)


HERE = System("this machine", sys.platform, platform.machine(), build.find_compiler() or "g++", ("-ldl",), ((),))
QEMU = ("qemu-aarch64-static", "-cpu", "max", "-L", "/usr/aarch64-linux-gnu")
WINE = (("wine64",), ("/usr/lib/wine/wine64",))
SYSTEMS = (
    System("Linux on aarch64", "linux", "aarch64", "aarch64-linux-gnu-g++", ("-ldl",), (QEMU,)),
    System("Windows on x86-64", "win32", "AMD64", "x86_64-w64-mingw32-g++-posix", ("-static",), WINE),
)


def compile_all(system: System, folder: Path, chosen: Sequence[forms.Chosen]) -> dict[str, Path]:
    """The passes' libraries by form, and a program that calls them; the solver's are built too."""
    folder.mkdir()
    driver = [system.compiler, "-O1", "-std=c++17", str(DRIVER), "-o", str(folder / "driver.exe"), *system.static]
    subprocess.run(driver, check=True)
    built = {}
    for source in (build.PASS, build.SOLVER):
        for form in chosen:
            library = folder / build.carried_library(source, form, system.system).name
            if not library.exists():
                code = build.HERE / f"{source}.cpp"
                subprocess.run(build.command_ahead(system.compiler, code, library, form, system.system), check=True)
            if source == build.PASS:
                built[form.key] = library
    return built


def products(system: System, library: Path, runner: Sequence[str]) -> bytes:
    """What a library computes, by one thread; an error where more compute anything else."""
    command = [*runner, str(library.parent / "driver.exe"), library.name]
    env = {**os.environ, "WINEDEBUG": "-all", "WINEPREFIX": str(library.parent / "wine")}
    env["LD_LIBRARY_PATH"] = str(library.parent)  # dlopen looks there for a bare name
    done = subprocess.run(command, cwd=library.parent, env=env, capture_output=True, text=True, timeout=300)
    lines = done.stdout.split()
    if done.returncode or len(lines) != 3 or len(set(lines)) != 1:
        sys.exit(f"{system.name}, {library.name}: {done.returncode}, {done.stdout[:300]} {done.stderr[:300]}")
    return bytes.fromhex(lines[0])


def differ(some: bytes, others: bytes) -> float:
    """The largest difference of two rows of float32 numbers, as a share of the largest of them."""
    one, two = (struct.unpack(f">{len(row) // 4}f", row) for row in (some, others))
    return max(abs(a - b) for a, b in zip(one, two, strict=True)) / max(map(abs, one))


def check(system: System, folder: Path, here: dict[str, bytes]) -> None:
    """Build for a system and, where that can be, run."""
    if shutil.which(system.compiler) is None:
        print(f"{system.name}: skipped, as {system.compiler} is not here", flush=True)
        return
    theirs = forms.all_for(system.architecture, system.system)
    libraries = compile_all(system, folder, theirs)
    runner = system.runner()
    if runner is None:
        print(f"{system.name}: {', '.join(libraries)} are built and linked; nothing here runs them", flush=True)
        return
    same_processor = set(theirs) <= set(forms.all_for(platform.machine()))
    for key, library in libraries.items():
        if same_processor and key not in here:
            print(f"{system.name}, {key}: built and linked; this processor lacks it", flush=True)
            continue
        found, reference = products(system, library, runner), here.get(key, here["portable"])
        if found != reference and (key in here or differ(found, reference) > CLOSE):
            sys.exit(f"{system.name}, {key}: it computes something else than here ({differ(found, reference):.1e})")
        print(f"{system.name}, {key}: runs, as here {'to the last bit' if key in here else 'within rounding'}")


def main() -> None:
    """See the module's text."""
    with tempfile.TemporaryDirectory() as name:
        usable = [form.name for form in forms.usable()]
        chosen = [form for form in forms.all_for(platform.machine()) if form.form.name in usable]
        chosen = [form for form in chosen if set(form.extras) <= forms.instructions()]
        libraries = compile_all(HERE, Path(name) / "here", chosen)
        here = {key: products(HERE, library, ()) for key, library in libraries.items()}
        for number, system in enumerate(SYSTEMS):
            check(system, Path(name) / str(number), here)


if __name__ == "__main__":
    main()
