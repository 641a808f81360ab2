"""Run the tests of the C++ with its libraries built under the address and undefined-behaviour sanitizers.

    python tests/sanitized.py [PYTEST ARGUMENTS]

The sanitizers' runtimes are loaded before Python's own libraries. First two planted errors must be found: a check that
finds nothing proves nothing. Passes and products run in every instruction set of this processor, test by test; the
quantizer's loops in the best, then in each other one. Needs g++ and its libasan and libubsan.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from quasar_core.kernels.cpu import forms  # noqa: E402

FOLDERS = ("kernels", "models", "quantize")
PASSES, SOLVER = (
    ('"cpp_pass"', '"form"', '"tiles"', "load_library("),
    ('"cpp_solver"',),
)  # what tests name that run the C++
BUILDING = ("test_forms.py", "test_compiled_files.py")  # of how it is built and kept, by a compiler of their own
FLAGS = "-O1 -g1 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=undefined"
BEYOND = "int planted(int i) { int* volatile four = new int[4](); int read = four[i]; delete[] four; return read; }"
SHIFT = "int planted(int i) { return 1 << (i * 10); }"
PLANTED = {BEYOND: "AddressSanitizer", SHIFT: "runtime error: shift exponent 40"}
CALL = """
import sys, pathlib
from quasar_core.kernels.cpu.library import load_library
print(load_library(pathlib.Path(sys.argv[1]), {"planted": []}).planted(4))
"""


def environment(folder: Path) -> dict[str, str]:
    """A compiler that adds the sanitizers, their runtimes, and a home of its own for what is built with them."""
    compiler = folder / "g++-sanitized"
    compiler.write_text(f'#!/bin/sh\nexec g++ "$@" {FLAGS}\n')
    compiler.chmod(0o755)
    return {
        **os.environ,
        "CXX": str(compiler),
        "QUASAR_HOME": str(folder / "home"),
        "QUASAR_TEST_COMPILED": str(folder / "home"),
        "QUASAR_CPU_PASS": "1",
        "QUASAR_TEST_COMPILES": "1",  # what is skipped shows nothing
        "PYTHONPATH": str(ROOT),
        "LD_PRELOAD": " ".join(runtime(name) for name in ("libasan.so", "libubsan.so")),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python's own, at its end
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }


def runtime(name: str) -> str:
    """The path of a sanitizer's runtime; g++ gives the bare name back where it has none."""
    path = subprocess.run(
        ["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True
    ).stdout.strip()
    if not Path(path).is_absolute():
        sys.exit(f"g++ has no {name}: install its sanitizers' runtimes (Debian: libasan and libubsan, with gcc).")
    return path


def check_that_errors_are_found(folder: Path, env: dict[str, str]) -> None:
    """End the program where a planted error passes."""
    for number, (code, report) in enumerate(PLANTED.items()):
        source = folder / f"planted{number}" / "planted.cpp"
        source.parent.mkdir()
        source.write_text(f'extern "C" {code}\n')
        done = subprocess.run([sys.executable, "-c", CALL, str(source)], env=env, capture_output=True, text=True)
        if done.returncode == 0 or report not in done.stderr:
            sys.exit(f"A planted error was not found ({report}):\n{done.stdout}{done.stderr}")


def naming(words: Sequence[str]) -> list[str]:
    """The files of tests in which one of these words stands."""
    files = [path for folder in FOLDERS for path in sorted((ROOT / "tests" / folder).rglob("test_*.py"))]
    found = [path for path in files if any(word in path.read_text(encoding="utf-8") for word in words)]
    return [str(path.relative_to(ROOT)) for path in found if path.name not in BUILDING]


def main() -> None:
    """Exit with 1 where a test failed in any instruction set."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        env = environment(folder)
        check_that_errors_are_found(folder, env)
        print("Both planted errors were found; now the tests.", flush=True)
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rs"]
        if sys.argv[1:]:
            sys.exit(subprocess.run([*command, *sys.argv[1:]], env=env, cwd=ROOT).returncode)
        failed = subprocess.run([*command, *naming(PASSES + SOLVER)], env=env, cwd=ROOT).returncode
        for form in forms.usable()[1:]:
            print(f"The quantizer's loops for {form.title}:", flush=True)
            there = {**env, forms.VARIABLE: form.name}
            failed |= subprocess.run([*command, *naming(SOLVER)], env=there, cwd=ROOT).returncode
        sys.exit(bool(failed))


if __name__ == "__main__":
    main()
