"""Build the C++ that a wheel carries: a library of each source for every instruction set of its machine (`forms.py`).

All else stands in pyproject.toml. Without a C++ compiler the wheel is one of Python alone, and what this compiler
cannot build is left out: quasar then compiles on first use. QUASAR_COMPLETE_WHEEL=1 makes an error of what is missing.
"""

import os
import platform
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError

sys.path.insert(0, str(Path(__file__).parent))  # not there when pip builds

from quasar_core.kernels.cpu import build, forms

KERNELS = Path("quasar_core", "kernels", "cpu")
SYSTEM = sysconfig.get_platform()  # such as linux-x86_64, macosx-11.0-arm64, win-amd64
NAMED = SYSTEM.rpartition("-")[2]
MACHINE = {"amd64": "AMD64", "universal2": platform.machine()}.get(NAMED, NAMED)
WANTED = {  # by the library's name
    build.carried_library(source, form).name: (source, form)
    for source in (build.PASS, build.SOLVER)
    for form in reversed(forms.all_for(MACHINE))  # the solver's without extras
}
COMPLETE = os.environ.get("QUASAR_COMPLETE_WHEEL") == "1"


class BuildWithLibraries(build_py):
    """Copies the Python files and builds the libraries beside them; not for a checkout that is installed as it lies."""

    def run(self):
        super().run()
        if not self.editable_mode:
            self.build_libraries(Path(self.build_lib) / KERNELS / build.CARRIED.name)

    def build_libraries(self, folder: Path):
        """Every form of every source, side by side."""
        compiler = build.find_compiler()
        if compiler is None:
            self.lacks("no C++ compiler was found")
            return
        folder.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(lambda name: self.build_library(compiler, folder / name, *WANTED[name]), WANTED))

    def build_library(self, compiler, built, source, form):
        """One library, or a word on why it is missing."""
        command = build.command_ahead(compiler, KERNELS / f"{source}.cpp", built, form)
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            self.lacks(f"{built.name}: {' '.join(command)} failed:\n{done.stderr.strip()}")

    def lacks(self, what: str):
        """Say what the wheel does not carry; an error where it must be complete."""
        if COMPLETE:
            raise CompileError(what)
        self.warn(f"the wheel lacks libraries that a processor could use: {what}")


class Platform(Distribution):
    """Of one platform where libraries are carried, though Python does not import them as modules."""

    def has_ext_modules(self):
        return build.find_compiler() is not None


class AnyPython(bdist_wheel):
    """The libraries know nothing of Python, so that one wheel serves all its versions."""

    def get_tag(self):
        python, abi, system = super().get_tag()
        if not self.distribution.has_ext_modules():
            return python, abi, system
        return "py3", "none", system.replace("universal2", MACHINE)


setup(distclass=Platform, cmdclass={"build_py": BuildWithLibraries, "bdist_wheel": AnyPython})
