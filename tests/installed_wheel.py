"""Build the wheel, install it where there is no compiler, and run it there: `python tests/installed_wheel.py [WHEEL]`.

Where: an environment of its own, in a mount namespace in which every compiler, assembler and linker of this machine is
an empty file, and so are gcc's folders. For each instruction set of this processor the demo model is quantized and
generates in C++ that the package brings, and every form says the same. Linux, root or user namespaces; else it says why
it skips. Dependencies are those of the Python that runs it, so nothing is downloaded but what pip needs to build.
"""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
COMPILERS = ("gcc", "g++", "cc", "c++", "cpp", "clang", "clang++", "as", "ld", "ld.bfd", "ld.gold", "ld.lld", "cc1plus")
FOLDERS = ("/usr/lib/gcc", "/usr/libexec/gcc", "/usr/include")
NAMESPACE = ("unshare", "--mount") if hasattr(os, "geteuid") and os.geteuid() == 0 else ("unshare", "-r", "--mount")
USABLE = """
from quasar_core.kernels.cpu.forms import usable
print(*[form.name for form in usable() if not form.by_name])  # others are not carried
"""
PROMPT = "Write a function `count_lines`."


def why_not() -> str | None:
    """Why this machine cannot run the test."""
    if sys.platform != "linux":
        return f"it hides compilers with Linux's mount namespaces, and this is {sys.platform}"
    if not shutil.which("unshare"):
        return "there is no `unshare` here"
    done = subprocess.run([*NAMESPACE, "true"], capture_output=True, text=True)
    return f"mount namespaces are not allowed here ({done.stderr.strip()})" if done.returncode else None


def build_wheel(folder: Path) -> Path:
    """The wheel of this checkout, with all its libraries."""
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, env={**os.environ, "QUASAR_COMPLETE_WHEEL": "1"})
    return next(folder.glob("*.whl"))


def install(wheel: Path, folder: Path) -> Path:
    """An environment with the wheel, and this Python's own packages behind it; its programs."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    python = folder / "bin" / "python"
    script = "import sysconfig; print(sysconfig.get_path('purelib'))"
    own = Path(subprocess.check_output([python, "-I", "-c", script], text=True).strip())
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", str(wheel)]
    subprocess.run(command, check=True, env=apart())  # pip installs nothing that a checkout's metadata says is there
    (own / "others.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    return folder / "bin"


def apart() -> dict[str, str]:
    """This environment without a checkout among Python's paths, and without a compiler of its own."""
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "CXX")}


def hiding() -> str:
    """A shell script that hides what compiles, in its own namespace, then runs its arguments."""
    names = {path for name in COMPILERS for path in every(name)}
    lines = [f"mount --bind /dev/null '{path}'" for path in sorted(names)]
    lines += [f"mount -t tmpfs none '{folder}'" for folder in FOLDERS if Path(folder).is_dir()]
    return "\n".join(["set -e", *lines, 'exec "$@"'])


def every(name: str) -> set[Path]:
    """The programs of a name in all folders that programs are looked for in, links followed; versions of them too."""
    folders = [Path(folder) for folder in os.environ["PATH"].split(os.pathsep)]
    found = [path for folder in folders for path in (folder / name, *folder.glob(f"{name}-[0-9]*"))]
    found += [path for folder in folders for path in folder.glob(f"*-linux-gnu-{name}*")]
    return {path.resolve() for path in found if path.is_file()}


class Place:
    """Where the wheel is installed and nothing compiles."""

    def __init__(self, programs: Path, folder: Path) -> None:
        self.programs, self.folder, self.script = programs, folder, hiding()

    def run(self, *command: str, isa: str = "", check: bool = True) -> subprocess.CompletedProcess[str]:
        """A command, with a home of its own."""
        paths = f"{self.programs}{os.pathsep}{os.environ['PATH']}"
        env = {**apart(), "QUASAR_HOME": str(self.folder / "home"), "PATH": paths}
        whole = [*NAMESPACE, "sh", "-c", self.script, "sh", *command]
        env |= {"QUASAR_ISA": isa} if isa else {}
        done = subprocess.run(whole, cwd=self.folder, env=env, capture_output=True, text=True)
        if check and done.returncode:
            sys.exit(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
        return done


def check_that_nothing_compiles(place: Place) -> None:
    """The test proves nothing where a compiler is left."""
    (place.folder / "x.cpp").write_text("int main() {}\n", encoding="ascii")
    for compiler in ("g++", "c++", "clang++", "gcc", "cc"):
        if place.run(compiler, "x.cpp", "-o", "x", check=False).returncode == 0:
            sys.exit(f"{compiler} still compiles, so nothing can be shown.")


def check_form(place: Place, isa: str) -> str:
    """Generate with an instruction set; the text."""
    said = place.run("quasar", "generate", "-v", "--prompt", PROMPT, "--max-new-tokens", "32", isa=isa)
    passes = next((line for line in said.stderr.splitlines() if "passes:" in line), said.stderr)
    if "in C++" not in passes or "built into the package" not in passes:
        sys.exit(f"{isa}: the pass does not run from the package: {passes}")
    print(f"- {isa}: {passes.strip('- ')}", flush=True)
    return said.stdout


def main() -> None:
    """Exit with 0 where it held, or was skipped."""
    if reason := why_not():
        print(f"skipped: {reason}")
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        wheel = Path(sys.argv[1]).resolve() if sys.argv[1:] else build_wheel(folder)
        print(f"{wheel.name}: {wheel.stat().st_size / 1e6:.1f} MB", flush=True)
        place = Place(install(wheel, folder / "venv"), folder)
        check_that_nothing_compiles(place)
        place.run("quasar", "quantize", "demo", "--bits", "4", "--samples", "4", "--seq-len", "64")
        for what in ("cpp", "quantizer_loops"):
            found = json.loads(place.run("quasar", "doctor", "--json").stdout)[what]
            if "built into the package" not in found:
                sys.exit(f"doctor says of {what}: {found}")
        usable = place.run("python", "-I", "-c", USABLE).stdout.split()
        texts = [check_form(place, isa) for isa in usable]
        if len(set(texts)) != 1:
            sys.exit(f"The instruction sets do not agree: {texts}")
        if (folder / "home" / "kernels").exists():
            sys.exit("Something was compiled.")
        print(f"The wheel runs without a compiler, and writes: {texts[0]}")


if __name__ == "__main__":
    main()
