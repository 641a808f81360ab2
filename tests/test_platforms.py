"""Systems that lack what Linux has: macOS and Windows, as far as Python's side of them can be pretended here."""

import builtins
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from quasar_cli import messages
from quasar_core import system
from quasar_core.bench import run_code
from quasar_core.bench.arms import BenchConfig
from quasar_core.bench.peers import process, talk
from quasar_core.errors import QuasarError, UsageError
from quasar_core.kernels.cpu import build, private_files
from quasar_core.kernels.cpu import library as compiling
from quasar_core.models.weights import weight_reads
from quasar_core.quantize import job

ROOT = Path(__file__).parents[1]
# What Windows lacks of Python's own library.
MODULES = ("fcntl", "resource", "readline", "termios", "pwd", "grp", "tty", "pty")
OF_OS = (
    "geteuid",
    "sched_getaffinity",
    "killpg",
    "pread",
    "pwrite",
    "getloadavg",
    "O_NOFOLLOW",
    "O_NONBLOCK",
)
IMPORT_ALL = f"""
import builtins, os, pkgutil, importlib
import torch, transformers, filelock, typer, rich, asyncio, multiprocessing.context  # others see to themselves
original = builtins.__import__
def refuse(name, globals=None, *others, **named):
    if name in {MODULES!r} and (globals or {{}}).get("__name__", "").startswith("quasar"):
        raise ImportError(name)
    return original(name, globals, *others, **named)
builtins.__import__ = refuse
for name in {OF_OS!r}:
    delattr(os, name)
import quasar_core, quasar_cli
for package in (quasar_core, quasar_cli):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if not module.name.endswith(("_process", ".harness")) and ".serve" not in module.name:  # what needs extras
            importlib.import_module(module.name)
print("all")
"""


def without(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Modules that cannot be imported."""
    original: Callable[..., Any] = builtins.__import__

    def refuse(name: str, *arguments: Any, **named: Any) -> Any:
        if name in names:
            raise ImportError(name)
        return original(name, *arguments, **named)

    monkeypatch.setattr(builtins, "__import__", refuse)


def test_every_module_is_imported_without_what_posix_has() -> None:
    done = subprocess.run([sys.executable, "-c", IMPORT_ALL], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "all", done.stderr


def test_what_a_system_does_not_tell_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (system.total_memory() or 0) > 2**20
    assert system.peak_memory() > 2**20
    monkeypatch.delattr(system.os, "sysconf")
    without(monkeypatch, "resource")
    assert system.total_memory() is None
    assert (system.peak_memory(), talk.peak_memory()) == (0, 0)


MAC = """hw.optional.AdvSIMD: 1
hw.optional.arm.FEAT_DotProd: 1
hw.optional.arm.FEAT_BF16: 0
hw.optional.arm.FEAT_I8MM: 1
hw.optional.arm64: 1
hw.optional.armv8_crc32: 1
"""


def test_a_macs_instruction_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system.sys, "platform", "darwin")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(stdout=MAC))
    assert system.processor_flags.__wrapped__() == {"asimd", "asimddp", "i8mm"}

    def fail(*_: object, **__: object) -> None:
        raise FileNotFoundError("sysctl")

    monkeypatch.setattr(subprocess, "run", fail)
    assert system.processor_flags.__wrapped__() == set()


def test_quantizing_is_refused_where_no_folder_is_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "fcntl")
    with (tmp_path / "lock").open("a+") as lock, pytest.raises(UsageError, match="Quantizing needs Linux or macOS"):
        job.take_lock(lock.fileno(), tmp_path)


def test_programs_are_not_run_without_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    assert BenchConfig(arms=("vanilla",), run_code=True).run_code
    monkeypatch.setattr(run_code, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="--run-code cannot be: this system sets no limits on what a program takes"):
        BenchConfig(arms=("vanilla",), run_code=True)


def test_a_program_runs_where_memory_has_no_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """macOS refuses RLIMIT_AS."""
    monkeypatch.setattr(run_code.sys, "platform", "darwin")
    asked: list[int] = []
    import resource

    monkeypatch.setattr(resource, "setrlimit", lambda kind, limits: asked.append(kind))
    run_code._limit(5)
    assert resource.RLIMIT_CPU in asked
    assert resource.RLIMIT_AS not in asked


def test_a_peer_is_ended_where_processes_have_no_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process.sys, "platform", "win32")
    monkeypatch.delattr(process.os, "killpg")
    child = process.Child([sys.executable, "-c", "import time; time.sleep(600)"], with_pipes=False)
    child.close()
    assert child.process.returncode is not None


def test_weights_are_not_streamed_without_reads_at_a_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(weight_reads.os, "preadv")
    with pytest.raises(QuasarError, match="on Linux and macOS alone"):
        weight_reads.OpenFile(tmp_path / "file")


@pytest.mark.parametrize("has_owners", [True, False])
def test_a_library_is_loaded_by_its_path_where_there_are_no_descriptors(
    has_owners: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on macOS, and without owners as on Windows; one that was changed is refused there too."""
    if build.find_compiler() is None:
        pytest.skip("no C++ compiler was found")
    monkeypatch.setattr(private_files, "_DESCRIPTORS", tmp_path / "nowhere")
    monkeypatch.setattr(private_files, "_HAS_OWNERS", has_owners)
    if not has_owners:
        monkeypatch.delattr(private_files.os, "geteuid")
    source = tmp_path / "seven.cpp"
    source.write_text('extern "C" int seven() { return 7; }\n')
    assert compiling.load_library(source, {"seven": []}).seven() == 7
    library = compiling.shared_library(source)
    content = bytearray(library.read_bytes())
    content[len(content) // 2] ^= 1
    library.unlink()  # not written over: it is mapped
    library.write_bytes(content)
    with pytest.raises(QuasarError, match="is not what was compiled"):
        private_files.load(library)


@pytest.mark.parametrize("more", [True, False])
def test_a_paste_is_noticed_on_windows(more: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(messages.sys, "platform", "win32")
    monkeypatch.setattr(messages.sys, "stdin", SimpleNamespace(isatty=lambda: True))
    monkeypatch.setitem(sys.modules, "msvcrt", SimpleNamespace(kbhit=lambda: more))
    assert messages._more_is_there() is more


def test_lines_are_read_without_readline(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "readline")
    monkeypatch.setattr(messages.sys, "stdin", SimpleNamespace(isatty=lambda: True))
    monkeypatch.setattr(messages, "find_spec", lambda name: None)
    typed = iter(["hello"])

    def type_line(prompt: str) -> str:
        if line := next(typed, None):
            return line
        raise EOFError

    monkeypatch.setattr(builtins, "input", type_line)
    monkeypatch.setattr(messages, "_more_is_there", lambda: False)
    assert list(messages.read_messages(keep_history=True)) == ["hello"], "and none of earlier chats are looked for"
