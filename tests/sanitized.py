"""Run the tests of the C++ with its libraries built under the address and undefined-behaviour sanitizers.

    python tests/sanitized.py [PYTEST ARGUMENTS]

The sanitizers' runtimes are loaded before Python's own libraries. First two planted errors must be found: a check that
finds nothing proves nothing. Needs g++ and its libasan and libubsan.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
MODELS = ("test_cpu_pass.py", "test_compressed_weights.py", "test_trees.py", "test_recurrent.py")
CPP = (
    "kernels/test_vnni.py",
    "kernels/test_compressed.py",
    *(f"models/{name}" for name in MODELS),
    "quantize/test_cpu_solver.py",
)
TESTS = tuple(f"tests/{name}" for name in CPP)
FLAGS = "-O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=undefined"
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
        "QUASAR_CPU_PASS": "1",
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


def main() -> None:
    """Exit with pytest's code."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        env = environment(folder)
        check_that_errors_are_found(folder, env)
        print("Both planted errors were found; now the tests.", flush=True)
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rs", *(sys.argv[1:] or TESTS)]
        sys.exit(subprocess.run(command, env=env, cwd=ROOT).returncode)


if __name__ == "__main__":
    main()
