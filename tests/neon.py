"""Run the tests of the C++ pass as Arm processors compute it: cross-compiled, under an emulator of one.

    python tests/neon.py [PYTEST ARGUMENTS]

Three processors: one with dot products and BF16, one with dot products, one of Armv8.0. Needs Debian's
g++-aarch64-linux-gnu and qemu-user; says so and ends with 0 where they are missing.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
PROCESSORS = {
    "dot products and BF16": "armv8.2-a+dotprod+bf16+i8mm",
    "dot products": "armv8.2-a+dotprod",
    "Armv8.0": "armv8-a",
}
KERNELS = ("vnni", "compressed", "rms_norm")
MODELS = ("cpu_pass", "compressed_weights", "recurrent", "trees", "mtp", "mixtures")
NAMED = [(folder, name) for folder, names in (("kernels", KERNELS), ("models", MODELS)) for name in names]
TESTS = tuple(str(path) for folder, name in NAMED for path in (ROOT / "tests" / folder).rglob(f"test_{name}.py"))
ELSEWHERE = ("no_compiler", "a_build", "does_not_load", "a_home", "compiled_once", "triton")  # of this processor alone
LEFT_OUT = " and ".join(f"not {name}" for name in ELSEWHERE)
SHORT = f"{LEFT_OUT} and not exact_text and not transformers"  # of the processors after the first
OPTIONS = ("-std=c++17", "-O2", "-ffp-contract=off", "-pthread", "-static", "-DQUASAR_NEON")


def build(architecture: str, program: Path) -> None:
    """The program that runs calls, for a processor."""
    source, headers = ROOT / "tests" / "helpers" / "emulated.cpp", ROOT / "quasar_core" / "kernels" / "cpu"
    command = [COMPILER, *OPTIONS, f"-march={architecture}", f"-I{headers}", str(source), "-o", str(program)]
    subprocess.run(command, check=True)


def main() -> int:
    """1 where a test failed on one of the processors."""
    missing = [name for name in (COMPILER, EMULATOR) if shutil.which(name) is None]
    if missing:
        print(f"NEON is not tested here: {' and '.join(missing)} missing (Debian: g++-aarch64-linux-gnu, qemu-user).")
        return 0
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, architecture) in enumerate(PROCESSORS.items()):
            program = Path(folder) / f"emulated-{number}"
            build(architecture, program)
            print(f"An Arm processor with {name}:" if number < 2 else f"An Arm processor of {name}:", flush=True)
            env = {**os.environ, "QUASAR_TEST_EMULATED": f"{EMULATOR} {program}", "PYTHONPATH": str(ROOT)}
            chosen = ["-k", SHORT if number else LEFT_OUT]
            command = [
                sys.executable,
                "-m",
                "pytest",
                "-p",
                "no:cacheprovider",
                *chosen,
                *(sys.argv[1:] or TESTS),
            ]
            failed |= subprocess.run(command, env=env, cwd=ROOT).returncode != 0
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
